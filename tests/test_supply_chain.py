"""Third-party code is pinned by content: packages by hash, actions by commit, images by digest."""

import json
import re
from typing import Any

import pytest
import yaml
from imports import ROOT

WORKFLOWS = sorted(ROOT.glob(".github/workflows/*.yml"))
LOCKS = ["requirements.lock", "benchmarks/requirements.lock", "deploy/requirements.lock"]


def test_actions_are_pinned_by_commit() -> None:
    used = [line for path in WORKFLOWS for line in re.findall(r"uses: (.*)", path.read_text())]
    assert used != []
    assert [line for line in used if not re.fullmatch(r"[\w./-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+", line)] == []


def services() -> dict[str, Any]:
    """Return the services of deploy/compose.yaml by name."""
    found: dict[str, Any] = yaml.safe_load((ROOT / "deploy/compose.yaml").read_text())["services"]
    return found


def test_images_are_pinned_by_digest() -> None:
    images = [service["image"] for service in services().values() if "image" in service]
    images += re.findall(r"FROM (\S+)", (ROOT / "deploy/compose.yaml").read_text())
    assert len(images) == len(services()) == 4
    assert [image for image in images if not re.fullmatch(r"[\w./:-]+@sha256:[0-9a-f]{64}", image)] == []


@pytest.mark.parametrize("name", LOCKS)
def test_packages_are_pinned_with_hashes(name: str) -> None:
    entries = re.split(r"^(?=[a-z0-9])", (ROOT / name).read_text(), flags=re.MULTILINE)[1:]
    assert len(entries) > 50
    assert [entry for entry in entries if "==" not in entry or "--hash=sha256:" not in entry] == []


@pytest.mark.parametrize("name", ["Makefile", "deploy/compose.yaml"])
def test_pip_installs_by_hash_alone(name: str) -> None:
    lines = [line for line in (ROOT / name).read_text().splitlines() if "pip install" in line]
    assert lines != []
    assert all("--require-hashes" in line for line in lines)


def test_only_the_s3_server_and_its_set_up_have_the_root_secret() -> None:
    assert {name for name, service in services().items() if "${S3_SECRET" in str(service)} == {"s3", "bucket"}
    given = services()["mlflow"]["environment"]
    assert (given["AWS_ACCESS_KEY_ID"], given["AWS_SECRET_ACCESS_KEY"]) == ("mlflow", "${MLFLOW_S3_SECRET}")


def test_the_account_of_mlflow_is_limited_to_the_bucket_of_the_team() -> None:
    policy = json.loads(yaml.safe_load((ROOT / "deploy/compose.yaml").read_text())["configs"]["team"]["content"])
    resources = {resource for statement in policy["Statement"] for resource in statement["Resource"]}
    assert resources == {"arn:aws:s3:::team", "arn:aws:s3:::team/*"}
    assert "mc admin policy attach minio team --user mlflow\n" in services()["bucket"]["command"][0]
