"""What others make is taken by its content: packages by hash, actions by commit, images by digest."""

import re

import pytest
from imports import ROOT

WORKFLOWS = sorted(ROOT.glob(".github/workflows/*.yml"))
LOCKS = ["requirements.lock", "benchmarks/requirements.lock", "deploy/requirements.lock"]


def test_actions_are_pinned_by_commit() -> None:
    used = [line for path in WORKFLOWS for line in re.findall(r"uses: (.*)", path.read_text())]
    assert used != []
    assert [line for line in used if not re.fullmatch(r"[\w./-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+", line)] == []


def test_images_are_pinned_by_digest() -> None:
    text = (ROOT / "deploy/compose.yaml").read_text()
    images = re.findall(r"(?:image:|FROM) (\S+)", text)
    assert len(images) == 3
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
