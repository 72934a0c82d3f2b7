"""A team's tracker and storage: deploy/mlflow-server.sh on a real PostgreSQL and a real S3 server, several clones."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from io import StringIO
from pathlib import Path

import pandas as pd
import pytest
import requests
from dvc_queue import run_queue
from imports import ROOT
from postgres import Postgres, postgres
from project import Project, python, reproduced_project
from s3_server import BUCKET, S3Server, add_remote, clone, s3_server
from tracker import Server, wait_for, waiting

pytestmark = pytest.mark.slow

ADMIN = ("admin", "password-of-the-admin")
PAGES = "https://mlflow.example.org"
MEMBERS = {"first": "password-of-the-first", "second": "password-of-the-second"}


class TeamServer(Server):
    """The server that docs/team.md starts."""

    def __init__(self, folder: Path, database: Postgres, storage: S3Server) -> None:
        super().__init__(folder)
        self.postgres = database
        self.storage = storage

    def command(self) -> list[str]:
        return [str(ROOT / "deploy/mlflow-server.sh")]

    def environment(self) -> dict[str, str]:
        return self.postgres.environment | self.storage.environment | {
            "PYTHON": python(), "PORT": str(self.port), "WORKERS": "2", "ARTIFACTS": f"s3://{BUCKET}/mlflow",
            "MLFLOW_AUTH_ADMIN_PASSWORD": ADMIN[1], "MLFLOW_FLASK_SERVER_SECRET_KEY": "a long random text",
            "MLFLOW_SERVER_CORS_ALLOWED_ORIGINS": PAGES,
        }  # fmt: skip

    def member(self, name: str) -> dict[str, str]:
        """What one of the team has in the environment: an address without a password, and the password beside it."""
        return {
            "MLFLOW_TRACKING_URI": self.address,
            "MLFLOW_TRACKING_USERNAME": name,
            "MLFLOW_TRACKING_PASSWORD": MEMBERS[name],
        }


@pytest.fixture(scope="module")
def storage() -> Iterator[S3Server]:
    with s3_server() as server:
        yield server


@pytest.fixture(scope="module")
def team(tmp_path_factory: pytest.TempPathFactory, storage: S3Server) -> Iterator[TeamServer]:
    with postgres() as database:
        server = TeamServer(tmp_path_factory.mktemp("team"), database, storage)
        server.start()
        try:
            for name, password in MEMBERS.items():
                made = requests.post(
                    f"{server.address}/api/2.0/mlflow/users/create", auth=ADMIN, timeout=60,
                    json={"username": name, "password": password},
                )  # fmt: skip
                assert made.ok, made.text
            yield server
        finally:
            server.kill()


@pytest.fixture
def project(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Project:
    """A project in which everything is done, with an experiment in MLflow and a registered model of its own."""
    project = reproduced_project(tmp_path_factory)
    name = request.node.originalname
    names = {"experiment": name, "registered_model": name}
    project.set_params(**names, export_formats="[onnx]")
    project.commit()
    return project


def runs(team: TeamServer, experiment: str) -> list[tuple[str, str]]:
    """Name and status of each run."""
    return [
        (str(name), str(status))
        for name, status in team.postgres.query(
            "SELECT r.name, r.status FROM runs r JOIN experiments e USING (experiment_id) "
            "WHERE e.name = %s ORDER BY r.name",
            experiment,
        )
    ]


def test_who_has_no_password_is_refused_and_loses_nothing(team: TeamServer, project: Project) -> None:
    experiment = "test_who_has_no_password_is_refused_and_loses_nothing"
    anonymous = {"MLFLOW_TRACKING_URI": team.address}
    done = project.dvc("repro", "--force", "--single-item", "train", check=True, **anonymous)
    assert "401" in done.stderr
    assert "You are not authenticated" in done.stderr
    wrong = team.member("first") | {"MLFLOW_TRACKING_PASSWORD": "another"}
    refused = project.run(sys.executable, "-m", "classifier", "sync", check=False, **wrong)
    assert refused.returncode == 1
    assert runs(team, experiment) == []

    project.run(sys.executable, "-m", "classifier", "sync", check=True, **team.member("first"))
    ((_, status),) = runs(team, experiment)
    assert status == "FINISHED"
    assert_nowhere(team, project)


def test_a_password_is_in_no_file_while_the_server_is_away_nor_in_the_store(team: TeamServer, project: Project) -> None:
    team.kill()
    try:
        project.dvc("repro", "--force", "--single-item", "train", check=True, **team.member("first"))
        assert waiting(project)
        assert_nowhere(team, project)
    finally:
        team.start()
    project.run(sys.executable, "-m", "classifier", "sync", check=True, **team.member("first"))
    assert not waiting(project)
    assert_nowhere(team, project)


def assert_nowhere(team: TeamServer, project: Project) -> None:
    """No password is in a file of the checkout, or among what the store tells of runs."""
    for password in (*MEMBERS.values(), ADMIN[1]):
        found = project.run(
            "grep", "--recursive", "--fixed-strings", "--files-with-matches", password, ".", check=False
        )
        assert (found.returncode, found.stdout) == (1, "")
        for table in ("tags", "params", "experiment_tags"):
            assert team.postgres.query(f"SELECT * FROM {table} WHERE strpos(value, %s) > 0", password) == []  # noqa: S608


@pytest.mark.parametrize(("origin", "status"), [(PAGES, 200), ("https://elsewhere.example.org", 403)])
def test_its_pages_work_where_they_are_served_and_nowhere_else(team: TeamServer, origin: str, status: int) -> None:
    """A browser says where the page came from that asks; the client of the stages says nothing."""
    answer = requests.post(
        f"{team.address}/api/2.0/mlflow/experiments/search", auth=("first", MEMBERS["first"]), timeout=60,
        json={"max_results": 1}, headers={"Origin": origin},
    )  # fmt: skip
    assert answer.status_code == status, answer.text


@pytest.mark.parametrize("count", [3, pytest.param(8, marks=pytest.mark.nightly)])
def test_experiments_at_once_lose_nothing_while_the_server_restarts(
    team: TeamServer, project: Project, count: int
) -> None:
    experiment = "test_experiments_at_once_lose_nothing_while_the_server_restarts"
    project.env = team.member("first")
    rates = [f"0.0{number}" for number in range(1, count + 1)]
    project.dvc("exp", "run", "--queue", "-S", f"lr={','.join(rates)}")
    with ThreadPoolExecutor() as pool:
        queue = pool.submit(run_queue, project, workers=count)
        wait_for(lambda: queue.done() or len(runs(team, experiment)) >= 2, seconds=600)
        team.kill()
        assert not queue.done()
        team.start()
        queue.result()
    project.run(sys.executable, "-m", "classifier", "sync", check=True, **team.member("first"))
    assert waiting(project) == []
    found = runs(team, experiment)
    assert len({name for name, _ in found}) == len(rates)
    assert [status for _, status in found] == ["FINISHED"] * len(rates)
    logged = team.postgres.query(
        "SELECT p.value, count(*), count(DISTINCT m.step) FROM params p JOIN metrics m USING (run_uuid) "
        "JOIN runs USING (run_uuid) JOIN experiments e USING (experiment_id) "
        "WHERE e.name = %s AND p.key = 'lr' AND m.key = 'val_accuracy' GROUP BY p.value ORDER BY p.value",
        experiment,
    )
    assert logged == [(rate, 4, 4) for rate in rates]
    versions = team.postgres.query("SELECT version FROM model_versions WHERE name = %s", experiment)
    assert len(versions) == len(rates)
    models = [key for key in team.storage.objects("mlflow") if key.endswith("model.onnx")]
    assert len(models) >= len(rates)


def test_two_members_share_runs_models_and_data_and_a_lost_clone_loses_nothing(
    team: TeamServer, project: Project, tmp_path: Path
) -> None:
    server = team.storage
    project.env = server.environment
    add_remote(project, server, "shared")
    project.dvc("push")
    central = tmp_path / "central.git"
    project.run("git", "clone", "--quiet", "--bare", ".", str(central))

    def work(name: str, rate: str) -> dict[str, object]:
        """An experiment in a clone, shared as docs/team.md says; what made its model."""
        member = clone(central, tmp_path / name / "project", server.environment | team.member(name))
        member.dvc("pull")
        member.dvc("exp", "run", "--name", f"rate-{name}", "-S", f"lr={rate}")
        member.dvc("exp", "push", "origin", f"rate-{name}")
        return lineage(member, f"rate-{name}")

    with ThreadPoolExecutor() as pool:
        before = dict(zip(MEMBERS, pool.map(work, MEMBERS, ("0.05", "0.02")), strict=True))
    for name, found in before.items():
        shutil.rmtree(tmp_path / name)
        other = next(member for member in MEMBERS if member != name)
        again = clone(central, tmp_path / name / "again", server.environment | team.member(other))
        again.dvc("exp", "pull", "origin", f"rate-{name}")
        again.dvc("pull")
        again.dvc("exp", "apply", f"rate-{name}")
        verified = again.run(sys.executable, "-m", "classifier", "verify")
        assert "bit-identical" in verified.stdout
        assert "drifted" not in verified.stdout
        assert lineage(again, f"rate-{name}") == found
        assert found["runs"]


def test_a_sweep_on_two_machines_is_one_table(team: TeamServer, project: Project, tmp_path: Path) -> None:
    project.env = team.storage.environment | team.member("first")
    add_remote(project, team.storage, "sweep")
    project.dvc("push")
    central = tmp_path / "central.git"
    project.run("git", "clone", "--quiet", "--bare", ".", str(central))

    def sweep(name: str, rates: str) -> None:
        machine = clone(central, tmp_path / name / "project", project.env)
        machine.dvc("pull")
        machine.dvc("exp", "run", "--queue", "-S", f"lr={rates}")
        run_queue(machine, workers=1)
        machine.dvc("exp", "push", "origin", "--rev", "HEAD")
        shutil.rmtree(machine.root.parent)

    parts = {"first": "0.01,0.03", "second": "0.05,0.07"}
    with ThreadPoolExecutor() as pool:
        list(pool.map(sweep, parts, parts.values()))
    third = clone(central, tmp_path / "third/project", project.env)
    third.dvc("exp", "pull", "origin", "--rev", "HEAD")
    table = pd.read_csv(StringIO(third.dvc("exp", "show", "--csv").stdout))
    experiments = table[table["rev"].notna() & table["Experiment"].notna()]
    assert sorted(experiments["lr"]) == [0.01, 0.03, 0.05, 0.07]
    assert experiments["accuracy"].notna().all()
    for name in experiments["Experiment"]:
        third.dvc("exp", "apply", name)
        assert (third.root / "models/export/model.onnx").is_file()


def lineage(project: Project, target: str) -> dict[str, object]:
    done = project.run(sys.executable, "-m", "classifier", "lineage", target, "--json")
    found: dict[str, object] = json.loads(done.stdout)
    return found


def test_the_server_script_names_what_it_lacks(tmp_path: Path) -> None:
    script = ROOT / "deploy/mlflow-server.sh"
    done = subprocess.run([script], env={"PATH": os.environ["PATH"]}, capture_output=True, text=True)
    assert done.returncode != 0
    assert "PGHOST: set it to the host of PostgreSQL" in done.stderr
