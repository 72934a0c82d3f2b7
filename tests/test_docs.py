"""The documents: links, named tests, and the commands and recipes that they show."""

import ast
import json
import re
import shutil
import sys
from pathlib import Path

import pytest
from imports import ROOT
from project import Project
from tracker import query

DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])


def test_every_test_that_proves_a_promise_exists() -> None:
    text = "".join(document.read_text(encoding="utf-8") for document in DOCUMENTS)
    named = re.findall(r"`(test_\w+\.py)::(test_\w+)`", text)
    assert len(named) > 60
    missing = [f"{file}::{test}" for file, test in named if f"\ndef {test}(" not in (ROOT / "tests" / file).read_text()]
    assert missing == []


def tier(file: str, test: str) -> str:
    """What runs a test: `make test` (fast), `make slow` or `make nightly`."""
    marks: list[str] = []
    for node in ast.parse((ROOT / "tests" / file).read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "pytestmark":
            marks.append(ast.unparse(node.value))
        elif isinstance(node, ast.FunctionDef) and node.name == test:
            marks += map(ast.unparse, node.decorator_list)
    return next((name for name in ("nightly", "slow") if f"pytest.mark.{name}" in marks), "fast")


def test_every_promise_names_the_tier_of_its_tests() -> None:
    rows = (ROOT / "docs/reliability.md").read_text(encoding="utf-8").splitlines()
    wrong = []
    for row in rows:
        if row.startswith("| ") and (named := re.findall(r"`(test_\w+\.py)::(test_\w+)`", row)):
            tiers = [tier(file, test) for file, test in named]
            told = row.strip("| ").split("|")[-1].strip().split("<br>")
            if told not in (tiers, sorted(set(tiers))):
                wrong.append(row)
    assert wrong == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_link_to_a_file_leads_to_one(document: Path) -> None:
    text = document.read_text(encoding="utf-8")
    links = [link.partition("#")[0] for link in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in link]
    assert [link for link in links if link and not (document.parent / link).exists()] == []


@pytest.mark.slow
def test_the_recipes_for_a_network_a_source_and_a_metric_work(tmp_path: Path) -> None:
    """Apply the diffs of CONTRIBUTING.md to a copy of the project, and run its command."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    project = Project.create(tmp_path / "project")
    project.commit()
    for number, diff in enumerate(re.findall(r"```diff\n(.*?)```", text, re.DOTALL)):
        (tmp_path / f"{number}.diff").write_text(diff)
        project.run("git", "apply", str(tmp_path / f"{number}.diff"))
    changed = project.run("git", "status", "--porcelain").stdout.splitlines()
    metrics, *added = "classifier/evaluation/metrics.py", "classifier/networks/small.py", "classifier/sources/digits.py"
    assert changed == [f" M {metrics}", *(f"?? {path}" for path in added)]
    if (cache := ROOT / ".mypy_cache").is_dir():  # without it mypy reads all of torch, which takes a minute
        shutil.copytree(cache, project.root / ".mypy_cache")
    for check in (["ruff", "check"], ["ruff", "format", "--check"], ["mypy"]):
        project.run(sys.executable, "-m", *check, metrics, *added)

    command = text.split("```sh\n")[-1].split("```")[0].strip()
    project.run("sh", "-c", command)
    test = json.loads((project.root / "metrics/test.json").read_text())
    assert test["accuracy"] > 0.8
    assert 0 < test["brier_score"] < 0.5

    score = f"{test['brier_score']:.5f}"
    assert f"| Brier score | {score} |\n" in (project.root / "models/export/README.md").read_text()
    project.run("python", "-m", "classifier", "report")  # which also sends what MLflow has not got yet
    page = (project.root / "reports/report.html").read_text(encoding="utf-8")
    assert re.search(rf'>Brier score</th>.*>{score}<span class="interval">0\.\d+ to 0\.\d+</span>', page)
    logged = query(project.root / "mlflow.db", "SELECT value FROM latest_metrics WHERE key = 'test_brier_score'")
    assert logged == [(pytest.approx(test["brier_score"]),)]


@pytest.mark.slow
@pytest.mark.parametrize("epochs", [1, pytest.param(15, marks=pytest.mark.nightly)])
def test_the_commands_of_own_images_do_what_the_page_says(tmp_path: Path, epochs: int) -> None:
    """With one epoch, each command; with the page's, its accuracy too."""
    text = (ROOT / "docs/own-images.md").read_text(encoding="utf-8")
    blocks = [block.split("\n", 1) for block in text.split("```")[1::2]]
    (script,) = [content for language, content in blocks if language == "python"]
    shell = [content for language, content in blocks if language == "sh"]
    commands = "".join(shell[:3]).splitlines()  # of the sections 1 to 3; that for photos is README's
    assert [line.split()[0] for line in commands] == ["python", "dvc", "classifier", "classifier"]

    project = Project.create(tmp_path / "project")
    project.commit()
    (project.root / "digits.py").write_text(script)
    printed = ""
    for line in commands:
        # The command `classifier` is of the checkout that it was installed in
        command = re.sub(r"^classifier ", "python -m classifier ", line)
        if "predict" in command:
            command += " --format table"  # as on a terminal
        command = command.replace("epochs=15", f"epochs={epochs}")
        printed += project.run("sh", "-c", command).stdout
    assert epochs == 1 or json.loads((project.root / "metrics/test.json").read_text())["accuracy"] >= 0.97
    assert (project.root / "reports/samples.png").stat().st_size > 1000
    shown = "".join(content for language, content in blocks if language == "").splitlines()
    assert len(shown) == 13
    # Numbers may differ in their last digits on other processors, and the runner-up with them
    kinds = {re.sub(r"[\d.]+", "#", line) for line in printed.splitlines()}
    assert [line for line in shown if line != "..." and re.sub(r"[\d.]+", "#", line) not in kinds] == []
