"""DVC's own views of two states show what a person looks for in them, and its registry of artifacts finds the model."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from project import Project, reproduced_project

from classifier.data.lockfile import locked_md5s
from classifier.pipeline.outputs import hash_file

pytestmark = pytest.mark.slow

STAGES = ["check", "download", "annotate", "train", "evaluate", "export"]
EPOCHS = [1, 2, 3, 4]
LR = {"main": 0.1, "slow": 0.001}
REVISIONS = {"main": "main", "slow": "release"}  # the branch that is made of the experiment
PICTURES = ["mistakes", "reliability", "saliency", "samples"]
FIGURES = [
    "train_loss",
    "val_loss",
    "val_accuracy",
    "accuracy",
    "loss",
    "balanced_accuracy",
    "macro_f1",
    "top3_accuracy",
    "ece",
]
# As docs/experiments.md has it: only columns that differ, and none for files, whose md5s they would hold
CHANGED = ("--only-changed", "--drop", ".*/|Created|State|Executor")


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """A committed result on main, with the model's version v1.0.0, and an experiment `slow`, which is v2.0.0."""
    project = reproduced_project(tmp_path_factory, export_formats="[onnx]")
    project.run("git", "config", "user.name", "Test")
    project.run("git", "config", "user.email", "test@example.org")
    project.commit()
    project.run("gto", "register", "classifier", "--version", "v1.0.0")
    project.dvc("exp", "run", "--name", "slow", "-S", f"lr={LR['slow']}")
    project.run("git", "restore", ".")
    project.dvc("checkout")
    project.dvc("exp", "branch", "slow", "release")
    project.run("gto", "register", "classifier", "release", "--version", "v2.0.0")
    return project


@pytest.fixture(scope="module")
def figures(project: Project) -> dict[str, dict[str, float]]:
    """The metrics by the revision, from the files that it holds."""
    found: dict[str, dict[str, float]] = {}
    for name, revision in REVISIONS.items():
        train, test = (json.loads(show(project, revision, f"metrics/{file}.json")) for file in ("train", "test"))
        found[name] = {key: value for key, value in (train | test).items() if not isinstance(value, list)}
    assert all(found["main"][key] != found["slow"][key] for key in FIGURES)
    return found


def show(project: Project, revision: str, path: str) -> str:
    """The content of a file at a revision."""
    return project.run("git", "show", f"{revision}:{path}").stdout


def table(markdown: str) -> list[dict[str, str]]:
    """The rows of a Markdown table by their heads."""
    head, _, *rows = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in markdown.splitlines() if line.startswith("|")
    ]
    return [dict(zip(head, row, strict=True)) for row in rows]


def differences(markdown: str, key: str) -> dict[str, dict[str, str]]:
    return {row[key]: row for row in table(markdown)}


def shown(value: float) -> Any:
    """Equal to how DVC shows a number: with five digits."""
    return pytest.approx(value, rel=1e-4)


# ---- tables


def test_exp_show_lists_the_rate_and_the_accuracy_of_both(
    project: Project, figures: dict[str, dict[str, float]]
) -> None:
    rows = table(project.dvc("exp", "show", "--md", "--hide-workspace", *CHANGED).stdout)
    main, slow = rows
    assert main["Experiment"] == "main"
    assert "[slow]" in slow["Experiment"]
    for row, name in ((main, "main"), (slow, "slow")):
        assert float(row["lr"]) == LR[name]
        assert float(row["accuracy"]) == shown(figures[name]["accuracy"])
        assert float(row["val_loss"]) == shown(figures[name]["val_loss"])


def test_exp_show_stays_readable(project: Project) -> None:
    (main, *_) = table(project.dvc("exp", "show", "--md", *CHANGED).stdout)
    assert set(main) - {"epoch"} == {"Experiment", *FIGURES, "lr"}


def test_exp_diff_shows_old_new_and_change(project: Project, figures: dict[str, dict[str, float]]) -> None:
    metrics, parameters = project.dvc("exp", "diff", "--md", "main", "slow").stdout.split("| Path", 2)[1:]
    expect_figures(differences("| Path" + metrics, "Metric"), figures)
    (lr,) = table("| Path" + parameters)
    assert (lr["Param"], float(lr["main"]), float(lr["slow"])) == ("lr", LR["main"], LR["slow"])
    assert float(lr["Change"]) == pytest.approx(LR["slow"] - LR["main"])


def test_metrics_diff_shows_old_new_and_change(project: Project, figures: dict[str, dict[str, float]]) -> None:
    expect_figures(differences(project.dvc("metrics", "diff", "--md", "main", "slow").stdout, "Metric"), figures)


def expect_figures(rows: dict[str, dict[str, str]], figures: dict[str, dict[str, float]]) -> None:
    assert set(rows) - {"epoch"} == set(FIGURES)
    for key in FIGURES:
        old, new = figures["main"][key], figures["slow"][key]
        assert (float(rows[key]["main"]), float(rows[key]["slow"])) == (shown(old), shown(new))
        assert float(rows[key]["Change"]) == pytest.approx(new - old, abs=1e-4)


def test_params_diff_shows_the_parameter_that_differs(project: Project) -> None:
    (row,) = table(project.dvc("params", "diff", "--md", "main", "slow").stdout)
    assert row == {"Path": "params.yaml", "Param": "lr", "main": "0.1", "slow": "0.001"}


# ---- pictures


def test_plots_diff_holds_curves_confusion_and_pictures_of_both(project: Project, tmp_path: Path) -> None:
    project.dvc("plots", "diff", "main", "slow", "--out", str(tmp_path))
    check_page(project, tmp_path, ["main", "slow"])


def test_plots_show_holds_those_of_this_checkout(project: Project, tmp_path: Path) -> None:
    project.dvc("plots", "show", "--out", str(tmp_path))
    check_page(project, tmp_path, ["workspace"])


def check_page(project: Project, folder: Path, revisions: list[str]) -> None:
    """Charts and pictures of DVC's page: index.html, and the pictures below static/."""
    page = (folder / "index.html").read_text()
    charts = {spec["title"]["text"]: spec for spec in specifications(page)}
    assert charts.keys() == {"Loss by epoch", "Accuracy by epoch", "Confusion"}

    losses = charts["Loss by epoch"]["data"]["values"]
    curves = {(value["rev"], value["field"], int(value["epoch"])): value for value in losses}
    lines = ("train_loss", "val_loss")
    assert curves.keys() == {(rev, line, epoch) for rev in revisions for line in lines for epoch in EPOCHS}
    accuracies = charts["Accuracy by epoch"]["data"]["values"]
    assert {(value["rev"], int(value["epoch"])) for value in accuracies if value["val_accuracy"]} == {
        (rev, epoch) for rev in revisions for epoch in EPOCHS
    }

    answers = charts["Confusion"]["data"]["values"]
    assert {rev: sum(answer["rev"] == rev for answer in answers) for rev in revisions} == dict.fromkeys(revisions, 80)
    assert "rect" in json.dumps(charts["Confusion"])  # a cell of the matrix: DVC's template `confusion`, no curve
    assert {"actual", "predicted"} <= answers[0].keys()

    pictures = re.findall(r'<img src="([^"]+)">', page)
    assert sorted(pictures) == sorted(
        f"static/{rev}_metrics_plots_{name}.png" for rev in revisions for name in PICTURES
    )
    assert len({hash_file(folder / name) for name in pictures}) == len(pictures) - (len(revisions) - 1)  # same samples
    for name in PICTURES:
        here = hash_file(project.root / f"metrics/plots/{name}.png")
        assert hash_file(folder / f"static/{revisions[0]}_metrics_plots_{name}.png") == here


def specifications(page: str) -> list[dict[str, Any]]:
    """The Vega-Lite specifications of a page's charts."""
    return [json.JSONDecoder().raw_decode(page, match.end())[0] for match in re.finditer("var spec = ", page)]


def test_dag_names_the_stages_in_order(project: Project) -> None:
    assert re.findall(r"\| (\w+) \|", project.dvc("dag").stdout) == STAGES


# ---- the model


def test_gto_lists_the_versions_of_the_model(project: Project) -> None:
    shown = json.loads(project.run("gto", "show", "--json").stdout)
    assert shown["classifier"]["version"] == "v2.0.0"
    assert project.run("git", "tag", "--list").stdout.split() == ["classifier@v1.0.0", "classifier@v2.0.0"]


@pytest.mark.parametrize(("version", "revision"), [("v1.0.0", "main"), ("v2.0.0", "release"), (None, "release")])
def test_artifacts_get_brings_the_model_of_a_version_from_outside_the_repository(
    project: Project, tmp_path: Path, version: str | None, revision: str
) -> None:
    outside = Project(tmp_path / "outside")
    outside.root.mkdir()
    options = ["--rev", version] if version else []
    outside.dvc("artifacts", "get", str(project.root), "classifier", *options, "--out", "model.onnx")

    lock = tmp_path / "dvc.lock"
    lock.write_text(show(project, revision, "dvc.lock"))
    folder = locked_md5s(lock)["models/export"]
    listed = json.loads((project.root / f".dvc/cache/files/md5/{folder[:2]}/{folder[2:]}").read_text())
    (model,) = [file["md5"] for file in listed if file["relpath"] == "model.onnx"]
    assert hash_file(outside.root / "model.onnx") == model
    assert [path.name for path in outside.root.iterdir()] == ["model.onnx"]
