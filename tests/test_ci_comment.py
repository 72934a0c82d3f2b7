"""What CI puts on a pull request: the text, and the workflows, of which only the one without any code may write."""

import json
import os
import re
import shutil
import stat
import subprocess
import zipfile
from pathlib import Path
from typing import Any

import pytest
import yaml
from imports import ROOT
from project import Project, clean_environment

SCRIPT = ".ci/metrics-comment"
WORKFLOWS = {path.stem: path for path in (ROOT / ".github/workflows").glob("*.yml")}
PERMISSIONS = {
    "ci": {"test": {"contents": "read"}, "report": {"contents": "read"}},
    "comment": {"comment": {"actions": "read", "pull-requests": "write"}},
    "nightly": {"test": {"contents": "read"}},
}

# Answers as GitHub's command line does, from files beside it, and keeps the comments that it is told to write.
GH = """#!/usr/bin/env python3
import json, subprocess, sys
from pathlib import Path
here = Path(__file__).parent
arguments = sys.argv[1:]
with (here / "calls.jsonl").open("a") as calls:
    calls.write(json.dumps(arguments) + "\\n")
if arguments[0] == "api":
    (path,) = [argument for argument in arguments if argument.startswith("repos/")]
    answer = (here / path.rsplit("/", 1)[1]).read_bytes()
    if "--jq" in arguments:
        query = arguments[arguments.index("--jq") + 1]
        answer = subprocess.run(["jq", "--raw-output", query], input=answer, capture_output=True, check=True).stdout
    sys.stdout.buffer.write(answer)
else:
    body = Path(arguments[arguments.index("--body-file") + 1])
    (here / f"comment-{arguments[2]}.md").write_text(body.read_text())
"""


# ---- the text


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """A repository with the tags `bare`, without metrics, `old` and `new`, which differ in figures and parameters.

    main is where `new` is. `other` is as `old`, of other images.
    """
    project = Project.create(tmp_path_factory.mktemp("comment") / "project")

    def commit(tag: str) -> None:
        project.commit()
        project.run("git", "tag", tag)

    commit("bare")
    write_lock(project, images="f" * 32)
    write_metrics(project, accuracy=0.6978, loss=0.81401, epoch=10)
    commit("old")
    write_metrics(project, accuracy=0.8505, loss=0.41612, epoch=10)
    project.set_params(lr="0.01", freeze="['linear_relu_stack.0.*']")
    commit("new")
    project.run("git", "switch", "--quiet", "--detach", "old")
    write_lock(project, images="0" * 32)
    commit("other")
    project.run("git", "switch", "--quiet", "main")
    return project


def write_lock(project: Project, images: str) -> None:
    """The part of dvc.lock that tells the images apart, by their md5."""
    outputs = {"data/images": images, "data/annotations": f"{'1' * 32}.dir"}
    outs = [{"path": path, "hash": "md5", "md5": md5} for path, md5 in outputs.items()]
    lock = {"schema": "2.0", "stages": {"annotate": {"cmd": "python -m stages annotate", "outs": outs}}}
    (project.root / "dvc.lock").write_text(yaml.safe_dump(lock, sort_keys=False))


def write_metrics(project: Project, accuracy: float, loss: float, epoch: int) -> None:
    folder = project.root / "metrics"
    folder.mkdir(exist_ok=True)
    (folder / "test.json").write_text(json.dumps({"accuracy": accuracy, "loss": loss, "accuracy_ci95": [0.1, 0.9]}))
    train = {"epoch": epoch, "train_loss": 0.5, "val_loss": 0.5, "val_accuracy": 0.8}
    (folder / "train.json").write_text(json.dumps(train))
    (folder / "environment.json").write_text(json.dumps([{"device": "cpu", "threads": 2}]))


def rows(markdown: str) -> dict[str, list[str]]:
    """The cells after the name of a metric or parameter, by that name."""
    table = [[cell.strip() for cell in line.strip("|").split("|")] for line in markdown.splitlines() if line[:1] == "|"]
    return {cells[1]: cells[2:] for cells in table}


def short(project: Project, revision: str) -> str:
    return project.run("git", "rev-parse", "--short", revision).stdout.strip()


@pytest.mark.slow
def test_the_text_shows_old_new_and_change_of_each_metric_and_the_parameters_that_differ(project: Project) -> None:
    text = project.run(SCRIPT, "old").stdout
    assert text.startswith(f"## Metrics against {short(project, 'old')}\n\n|")
    metrics, parameters = map(rows, text.split("## Parameters"))
    assert metrics["Metric"] == [short(project, "old"), "HEAD", "Change"]
    assert metrics["accuracy"] == ["0.6978", "0.8505", "0.1527"]
    assert metrics["loss"] == ["0.81401", "0.41612", "-0.39789"]
    assert metrics["epoch"] == ["10", "10", "0"]
    assert list(parameters)[2:] == ["freeze", "lr"]
    assert parameters["lr"] == ["0.001", "0.01"]


@pytest.mark.slow
def test_figures_of_other_images_are_shown_and_not_subtracted(project: Project) -> None:
    text = project.run(SCRIPT, "other").stdout
    assert "\nThe images or their splits differ, so the figures are not subtracted.\n" in text
    metrics = rows(text.partition("## Parameters")[0])
    assert metrics["Metric"] == [short(project, "other"), "HEAD"]
    assert metrics["accuracy"] == ["0.6978", "0.8505"]


@pytest.mark.slow
def test_a_base_without_metrics_is_told_and_the_new_figures_are_shown(project: Project) -> None:
    text = project.run(SCRIPT, "bare").stdout
    assert f"\n{short(project, 'bare')} has no metrics.\n" in text
    assert rows(text)["accuracy"] == ["-", "0.8505", "-"]


@pytest.mark.slow
@pytest.mark.parametrize("base", ["HEAD^7", "--all"])
def test_a_base_that_does_not_exist_is_told_and_the_figures_are_shown(project: Project, base: str) -> None:
    text = project.run(SCRIPT, base).stdout
    assert f"\nThere is no commit {base} here to compare with.\n" in text
    assert "0.8505" in text


@pytest.mark.slow
def test_nothing_to_compare_is_told(project: Project) -> None:
    text = project.run(SCRIPT, "HEAD").stdout
    assert "There are no metrics to compare." in text
    assert text.endswith("No parameter differs.\n")


def test_a_failure_of_dvc_is_not_shown_as_an_empty_table(project: Project, tmp_path: Path) -> None:
    (tmp_path / "dvc").write_text("#!/bin/sh\nexit 1\n")
    (tmp_path / "dvc").chmod(0o755)
    path = f"{tmp_path}:{clean_environment(tmp_path)['PATH']}"
    for base in ("old", "no-such-commit"):
        done = project.run(SCRIPT, base, check=False, PATH=path)
        assert (done.returncode, done.stdout) == (1, "")


# ---- the workflows


def workflow(name: str) -> dict[Any, Any]:
    content: dict[Any, Any] = yaml.safe_load(WORKFLOWS[name].read_text())
    content["on"] = content.pop(True)  # YAML 1.1 reads the key `on` as a truth value
    return content


def steps(name: str) -> list[dict[str, Any]]:
    return [step for job in workflow(name)["jobs"].values() for step in job["steps"]]


def test_each_job_may_do_what_it_has_to_and_no_more() -> None:
    found = {
        name: {job: content.get("permissions", workflow(name)["permissions"]) for job, content in jobs.items()}
        for name in WORKFLOWS
        for jobs in [workflow(name)["jobs"]]
    }
    assert found == PERMISSIONS


def test_code_of_a_fork_never_meets_a_secret() -> None:
    assert set(workflow("ci")["on"]) == {"push", "pull_request"}
    assert set(workflow("comment")["on"]) == {"workflow_run"}
    assert set(workflow("nightly")["on"]) == {"schedule", "workflow_dispatch"}
    assert not any("secrets." in WORKFLOWS[name].read_text() for name in ("ci", "nightly"))
    assert set(re.findall(r"secrets\.(\w+)", WORKFLOWS["comment"].read_text())) == {"GITHUB_TOKEN"}
    checkouts = [step for step in steps("ci") + steps("nightly") if step.get("uses", "").startswith("actions/checkout")]
    assert all(step["with"]["persist-credentials"] is False for step in checkouts)


def test_what_others_name_reaches_a_shell_as_environment_only() -> None:
    assert not [step["run"] for name in WORKFLOWS for step in steps(name) if "${{" in step.get("run", "")]


def test_actions_are_official_and_of_a_stated_commit_and_the_comment_uses_none() -> None:
    used = {step["uses"] for name in WORKFLOWS for step in steps(name) if "uses" in step}
    assert all(re.fullmatch(r"actions/(checkout|setup-python|upload-artifact)@[0-9a-f]{40}", action) for action in used)
    assert not [step for step in steps("comment") if "uses" in step]


def test_the_two_workflows_mean_the_same_artifact() -> None:
    uploads = [step["with"] for step in steps("ci") if step.get("uses", "").startswith("actions/upload-artifact")]
    assert {"name": "report", "path": "reports"} in uploads
    assert [upload["name"] for upload in uploads].count("report") == 1
    assert "reports/metrics.md" in WORKFLOWS["ci"].read_text()
    assert workflow("comment")["on"]["workflow_run"]["workflows"] == [workflow("ci")["name"]]


# ---- the comment


class GitHub:
    """A folder with a `gh` that answers for GitHub, and one in which the commenting step is run."""

    def __init__(self, folder: Path) -> None:
        self.bin, self.work = folder / "bin", folder / "work"
        self.bin.mkdir()
        self.work.mkdir()
        (self.bin / "gh").write_text(GH)
        (self.bin / "gh").chmod(0o755)
        self.answer("pulls", [{"number": 7, "head": {"sha": "c0ffee"}}, {"number": 8, "head": {"sha": "decade"}}])
        self.answer("artifacts", {"artifacts": [{"id": 41}, {"id": 42}]})
        self.pack("## Metrics\n")

    def answer(self, name: str, content: Any) -> None:
        (self.bin / name).write_text(json.dumps(content))

    def pack(self, text: str, mode: int = stat.S_IFREG | 0o644) -> None:
        """The artifact: a zip with this text as metrics.md, and a file that names another pull request."""
        member = zipfile.ZipInfo("metrics.md")
        member.create_system, member.external_attr = 3, mode << 16
        with zipfile.ZipFile(self.bin / "zip", "w") as archive:
            archive.writestr(member, text)
            archive.writestr("number", "8")

    def comment(self) -> dict[str, str]:
        """Run the step; the comments that were written, by the number of the pull request."""
        (step,) = steps("comment")
        env = clean_environment(self.work) | {
            "GH_REPO": "owner/repository", "RUN": "5", "RUN_URL": "https://github.com/owner/repository/actions/runs/5",
            "HEAD": "stranger:branch", "HEAD_SHA": "c0ffee",
        }  # fmt: skip
        env["PATH"] = f"{self.bin}:{env['PATH']}"
        subprocess.run(["bash", "-e", "-c", step["run"]], cwd=self.work, env=env, check=True)
        return {path.stem.partition("-")[2]: path.read_text() for path in self.bin.glob("comment-*.md")}

    def calls(self) -> list[list[str]]:
        return [json.loads(line) for line in (self.bin / "calls.jsonl").read_text().splitlines()]


@pytest.fixture
def github(tmp_path: Path) -> GitHub:
    if missing := [program for program in ("jq", "unzip") if shutil.which(program) is None]:
        (pytest.fail if "CI" in os.environ else pytest.skip)(f"needs {' and '.join(missing)}")
    return GitHub(tmp_path)


def test_the_comment_goes_to_the_pull_request_of_the_commit_that_ci_ran(github: GitHub) -> None:
    github.pack("## Metrics against 1234567\n\n| accuracy |\n")
    comments = github.comment()
    assert comments.keys() == {"7"}
    assert "https://github.com/owner/repository/actions/runs/5/artifacts/42" in comments["7"]
    assert comments["7"].endswith("\n\n## Metrics against 1234567\n\n| accuracy |\n")
    assert "head=stranger:branch" in github.calls()[0]


def test_a_later_push_updates_the_comment(github: GitHub) -> None:
    github.comment()
    assert {"--edit-last", "--create-if-none"} < set(github.calls()[-1])


def test_a_branch_that_has_gone_on_gets_no_comment_on_its_past(github: GitHub) -> None:
    github.answer("pulls", [{"number": 7, "head": {"sha": "decade"}}])
    assert github.comment() == {}


def test_without_a_report_there_is_no_comment(github: GitHub) -> None:
    github.answer("artifacts", {"artifacts": []})
    assert github.comment() == {}


def test_of_the_artifact_one_file_is_read_and_none_is_unpacked(github: GitHub, tmp_path: Path) -> None:
    (tmp_path / "token").write_text("a secret")
    github.pack(str(tmp_path / "token"), mode=stat.S_IFLNK | 0o777)  # a link, to have the file read by another
    assert "a secret" not in github.comment()["7"]
    assert {path.name for path in github.work.iterdir()} == {"report.zip", "comment.md"}


def test_a_text_beyond_githubs_limit_is_cut(github: GitHub) -> None:
    github.pack("x" * 70_000)
    assert 60_000 < len(github.comment()["7"]) < 65_536
