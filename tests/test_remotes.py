"""Data and models in S3: real dvc against a real S3 server, from several clones."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from project import Project, real_environment, reproduced_project
from s3_server import S3Server, add_remote, clone, s3_server
from tracker import wait_for

pytestmark = pytest.mark.slow

LARGE = 2**26  # bytes
DVC = [sys.executable, "-m", "dvc"]


@pytest.fixture(scope="module")
def server() -> Iterator[S3Server]:
    with s3_server() as server:
        yield server


@pytest.fixture
def first(tmp_path_factory: pytest.TempPathFactory, server: S3Server, request: pytest.FixtureRequest) -> Project:
    """A committed project in which everything is done, with a remote of its own that has nothing yet."""
    project = reproduced_project(tmp_path_factory, export_formats="[onnx]")
    project.env = server.environment
    project.commit()
    add_remote(project, server, request.node.name)
    return project


def test_a_clone_pulls_data_and_model_and_has_nothing_left_to_do(
    first: Project, server: S3Server, tmp_path: Path
) -> None:
    first.dvc("push")
    second = clone(first.root, tmp_path / "second/project", server.environment)
    second.dvc("pull")
    assert second.outputs() == first.outputs()
    assert second.stages_run(second.dvc("repro").stdout) == []
    verified = second.run(sys.executable, "-m", "classifier", "verify")
    assert "bit-identical" in verified.stdout
    assert "drifted" not in verified.stdout


def test_what_another_has_trained_comes_from_the_run_cache(first: Project, server: S3Server, tmp_path: Path) -> None:
    second = clone(first.root, tmp_path / "second/project", server.environment)  # of the state before
    first.set_params(lr="0.05")
    first.dvc("repro")
    first.run(sys.executable, "-m", "classifier", "push")
    second.dvc("fetch", "--run-cache", "download")
    second.set_params(lr="0.05")
    again = second.dvc("repro", "--pull")
    assert second.outputs() == first.outputs()
    assert "is cached - skipping run" in again.stdout
    assert second.stages_run(again.stdout) == []


def killed(project: Project, arguments: list[str], server: S3Server, condition: Callable[[], object]) -> None:
    """Start a command of DVC's, stop the server when the condition holds, kill the command, let the server go on."""
    with subprocess.Popen(
        [*DVC, *arguments], cwd=project.root,
        env=real_environment(project.root.parent, **project.env),
        stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
    ) as process:  # fmt: skip
        wait_for(lambda: process.poll() is not None or condition())
        server.process.send_signal(signal.SIGSTOP)
        try:
            assert process.poll() is None
            os.killpg(process.pid, signal.SIGKILL)
        finally:
            server.process.send_signal(signal.SIGCONT)


def test_killed_pushes_and_pulls_are_repeated_without_loss(
    first: Project, server: S3Server, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    large = first.root / "data/own/large.bin"  # which takes so long that nothing is over when it is killed
    large.parent.mkdir(parents=True, exist_ok=True)
    large.write_bytes(os.urandom(LARGE))
    first.dvc("add", str(large.relative_to(first.root)))
    first.commit()
    prefix = request.node.name
    killed(first, ["push", "--jobs", "1"], server, lambda: server.objects(prefix))
    pushed = server.objects(prefix)
    first.dvc("push")
    assert len(server.objects(prefix)) > len(pushed)

    second = clone(first.root, tmp_path / "second/project", server.environment)
    cache = second.root / ".dvc/cache/files"
    killed(second, ["pull", "--jobs", "1"], server, lambda: list(cache.rglob("*/*")))
    assert len([path for path in cache.rglob("*") if path.is_file()]) < len(server.objects(prefix))
    second.dvc("pull")
    assert second.outputs() == first.outputs()
    second.dvc("status", "--cloud")


def test_without_credentials_nothing_is_sent_and_none_are_in_git(
    first: Project, server: S3Server, request: pytest.FixtureRequest
) -> None:
    first.env = {"AWS_SHARED_CREDENTIALS_FILE": os.devnull, "AWS_EC2_METADATA_DISABLED": "true"}
    refused = first.dvc("push", check=False)
    assert refused.returncode != 0
    assert server.objects(request.node.name) == {}
    first.env = server.environment
    first.dvc("push")
    for value in server.environment.values():
        if value.endswith("of-the-test"):
            assert first.run("git", "grep", "-c", value, check=False).stdout == ""
            tracked = first.run("git", "ls-files", "--cached", "--others", "--exclude-standard").stdout.split()
            assert not any(value.encode() in (first.root / name).read_bytes() for name in tracked)


def test_a_record_that_was_not_sent_is_an_error_and_the_next_push_sends_it(
    first: Project, server: S3Server, request: pytest.FixtureRequest
) -> None:
    push = [sys.executable, "-m", "classifier", "push"]
    (record, *_) = [path for path in (first.root / ".dvc/cache/runs").rglob("*/*/*") if path.is_file()]
    content = record.read_bytes()
    record.unlink()
    record.symlink_to("nowhere")  # so that it cannot be read
    refused = first.run(*push, check=False)
    assert refused.returncode == 1
    assert "1 records of the run cache failed to upload" in refused.stderr
    assert "Traceback" not in refused.stderr

    record.unlink()
    record.write_bytes(content)
    first.run(*push)
    records = [path for path in (first.root / ".dvc/cache/runs").rglob("*/*/*") if path.is_file()]
    prefix = f"{request.node.name}/runs/"
    assert len(server.objects(prefix)) == len(records)


def test_without_a_remote_it_is_said_how_to_have_one(tmp_path_factory: pytest.TempPathFactory) -> None:
    done = reproduced_project(tmp_path_factory).run(sys.executable, "-m", "classifier", "push", check=False)
    assert done.returncode == 1
    assert "no remote" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_server_that_is_away_is_told_in_one_line(first: Project) -> None:
    first.dvc("remote", "modify", "team", "endpointurl", "http://127.0.0.1:9")
    done = first.run(sys.executable, "-m", "classifier", "push", check=False, AWS_MAX_ATTEMPTS="1")
    assert done.returncode == 1
    assert "The push is incomplete: " in done.stderr
    assert "Traceback" not in done.stderr
