"""A disk that is full or closed to writing: one clear message, all as it was, and the next run succeeds.

Two ways to have no room: a limit on the size of files, which works everywhere, and, where mounting is allowed, a small
disk in the place of a folder of the project, or of the whole project.
"""

import os
import resource
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from project import Project, clean_environment, python, reproduced_project, small_project

from classifier.pipeline.errors import run_main
from classifier.pipeline.outputs import hash_file
from classifier.sources.fashion_mnist import DEBIAN_FOLDER, FILES

PAGE = 4096  # bytes that a small disk gives at a time
PLENTY = 2**30
NO_ROOM = " cannot be written: {}; earlier files are unchanged. Free some space, then run the same command again."


def can_mount() -> bool:
    return os.geteuid() == 0 and sys.platform == "linux" and not subprocess.call(["unshare", "--mount", "true"])


needs_mount = pytest.mark.skipif(not can_mount(), reason="only root may mount a small disk, and not in every container")


def run_stage(
    root: Path, stage: str, limit: int | None = None, prefix: tuple[str, ...] = (), **env: str
) -> subprocess.CompletedProcess[str]:
    """Run a stage without DVC, which removes outputs; `limit` is the size in bytes that its files may have."""

    def set_limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit or 0, limit or 0))

    if limit is not None:
        env["PYTHONDONTWRITEBYTECODE"] = "1"  # Python would keep what the limit lets through of a compiled module
        env["COVERAGE_PROCESS_CONFIG"] = ""  # with `make coverage`, its own file would not be written
    return subprocess.run(
        [*prefix, sys.executable if prefix else python(), "-m", "stages", stage],
        cwd=root, env=clean_environment(root.parent, **env), stdin=subprocess.DEVNULL,
        capture_output=True, text=True, preexec_fn=None if limit is None else set_limit,
    )  # fmt: skip


def bytes_on_disk(path: Path) -> int:
    """What a file, or the files of a folder, take on a small disk."""
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    return sum(-(-file.stat().st_size // PAGE) * PAGE for file in files)


def mark_as_old(path: Path) -> None:
    """Give an output a content that the stage would not write."""
    (path / "old" if path.is_dir() else path).write_text("old")


class SmallDisk:
    """A disk in place of a folder, with the files that were in it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        content = folder.with_name(f"{folder.name}-content")
        folder.rename(content)
        folder.mkdir()
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={PLENTY}", "tmpfs", folder], check=True)
        shutil.copytree(content, folder, symlinks=True, dirs_exist_ok=True)
        shutil.rmtree(content)

    def leave(self, room: int) -> None:
        """Make the disk so small that no more than this can be added, or large."""
        usage = shutil.disk_usage(self.folder)
        self._remount(f"size={usage.used + room}")

    def make_read_only(self) -> None:
        self._remount("ro")

    def _remount(self, option: str) -> None:
        subprocess.run(["mount", "-o", f"remount,{option}", self.folder], check=True)


@contextmanager
def small_disk(folder: Path) -> Iterator[SmallDisk]:
    disk = SmallDisk(folder)
    try:
        yield disk
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """A project in which `dvc repro` ran with room. Tests leave it as it is."""
    return reproduced_project(tmp_path_factory)


@pytest.fixture
def copied(reference: Project, tmp_path: Path) -> Project:
    return reference.copy(tmp_path / "project")


def check_failed_cleanly(done: subprocess.CompletedProcess[str], line: str) -> None:
    """The stage ended with one line of its own; below it there may be one about what MLflow does not have yet."""
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr
    assert done.stderr.splitlines().count(line) == 1, done.stderr
    others = [text for text in done.stderr.splitlines() if text != line]
    assert all(text.startswith("MLflow does not have everything") for text in others), done.stderr


# The message


def test_a_lack_of_room_is_told_that_a_library_hides(capsys: pytest.CaptureFixture[str]) -> None:
    def main() -> None:
        try:
            raise OSError(28, "No space left on device", "weights.pth")
        except OSError:
            raise RuntimeError("unexpected pos 3008 vs 2902")  # noqa: B904, as torch does

    with pytest.raises(SystemExit, match=r"^weights\.pth" + NO_ROOM.format("the disk is full")):
        run_main(main)


def test_a_defect_is_not_taken_for_a_lack_of_room() -> None:
    def main() -> None:
        try:
            raise OSError(28, "No space left on device")
        except OSError:
            raise ValueError("a defect") from None

    with pytest.raises(ValueError, match="a defect"):
        run_main(main)


# Download: three ways to get the data, all of which write


@pytest.fixture
def downloading(tmp_path: Path) -> Path:
    """A folder with the project's files and an earlier download."""
    project = Project.create(tmp_path / "project")
    (project.root / "data/raw").mkdir(parents=True)
    (project.root / "data/raw/old").write_text("old")
    return project.root


@contextmanager
def mirror(folder: Path) -> Iterator[dict[str, str]]:
    """A mirror that gives the files of a folder; returns the way to it."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            content = (folder / self.path.rpartition("/")[2]).read_bytes()
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, format: str, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.05,)).start()
        try:
            yield {"http_proxy": f"http://127.0.0.1:{server.server_address[1]}"}
        finally:
            server.shutdown()


def check_download(done: subprocess.CompletedProcess[str], root: Path, reason: str, places: int) -> None:
    check_failed_cleanly(done, "data/raw" + NO_ROOM.format(reason))
    assert done.stdout.count("Fashion-MNIST from ") == places
    assert Project(root).outputs() == {"data/raw/old": hash_file(root / "data/raw/old")} | {
        name: md5 for name, md5 in Project(root).outputs().items() if name.startswith("data/own/")
    }
    assert {path.name for path in (root / "data").iterdir()} <= {"raw", "own"}


def test_a_copied_download_without_room_tries_no_other_place(downloading: Path, fashion_mnist_dir: Path) -> None:
    done = run_stage(downloading, "download", limit=1_000_000, FASHION_MNIST_DIR=str(fashion_mnist_dir))
    check_download(done, downloading, "file too large", places=1)
    done = run_stage(downloading, "download", FASHION_MNIST_DIR=str(fashion_mnist_dir))
    assert done.returncode == 0, done.stderr
    assert {name: hash_file(downloading / "data/raw" / name) for name in FILES} == FILES


def test_a_mirrored_download_without_room_tries_no_other_place(downloading: Path, tmp_path: Path) -> None:
    (tmp_path / "mirror").mkdir()
    for name in FILES:
        (tmp_path / "mirror" / f"{name}.gz").write_bytes(bytes(2_000_000))
    with mirror(tmp_path / "mirror") as way:
        done = run_stage(downloading, "download", limit=1_000_000, **way)  # type: ignore[arg-type]
    check_download(done, downloading, "file too large", places=1)


@needs_mount
@pytest.mark.skipif((Path("/") / DEBIAN_FOLDER).is_dir(), reason="apt-get would not be used here")
def test_a_program_without_room_is_no_failure_of_the_place(downloading: Path, tmp_path: Path) -> None:
    """apt-get and dpkg-deb say in many ways that the disk is full."""
    programs = tmp_path / "bin"
    programs.mkdir()
    for name in ("apt-get", "dpkg-deb"):
        (programs / name).write_text("#!/bin/sh\nexec /usr/bin/head -c 100000000 /dev/zero > lists\n")
        (programs / name).chmod(0o755)
    with small_disk(downloading / "data") as disk:
        disk.leave(60_000_000)
        done = run_stage(downloading, "download", PATH=str(programs), http_proxy="http://127.0.0.1:9")
        check_download(done, downloading, "the disk is full", places=2)


# Every stage, with a limit on the size of its files


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "limit", "name"),
    [
        ("annotate", 100_000, "data/images"),
        ("evaluate", 50_000, "metrics/plots"),
        ("export", 1_000_000, "models/export"),
        ("export", 2_690_000, "models/export"),  # between the sizes of model.pth and model.pt2
    ],
)
def test_a_stage_whose_file_would_be_too_large(copied: Project, stage: str, limit: int, name: str) -> None:
    mark_as_old(copied.root / name)
    before = copied.outputs()
    done = run_stage(copied.root, stage, limit=limit)
    check_failed_cleanly(done, name + NO_ROOM.format("file too large"))
    assert copied.outputs() == before


@pytest.mark.slow
def test_git_without_room_is_told(copied: Project) -> None:
    before = copied.outputs()
    done = run_stage(copied.root, "evaluate", limit=300)
    assert done.returncode == 1
    *told, failed = done.stderr.splitlines()  # the tracker ends no stage; the first output that is too large does
    assert "cannot be determined: Command 'git read-tree' died with <Signals.SIGXFSZ: 25>." in told[0]
    assert NO_ROOM.format("file too large") in failed
    assert copied.outputs() == before


@pytest.mark.slow
def test_a_training_goes_on_that_had_no_room_for_a_checkpoint(copied: Project, reference: Project) -> None:
    mark_as_old(copied.root / "models/model_weights.pth")
    before = copied.outputs()
    done = run_stage(copied.root, "train", limit=1_000_000)
    assert done.returncode == 1
    assert done.stderr.startswith(str(copied.root / ".checkpoints"))
    assert done.stderr.splitlines()[0].endswith(NO_ROOM.format("file too large"))
    assert "Traceback" not in done.stderr
    assert copied.outputs() == before
    assert run_stage(copied.root, "train").returncode == 0
    assert copied.outputs() == reference.outputs()
    assert not list((copied.root / ".checkpoints").glob("*/"))


# Every kind of file, on a disk that has room for those before it


def room_for(*names: str) -> Callable[[Path], int]:
    return lambda root: sum(bytes_on_disk(root / name) for name in names)


MODELS = [f"models/export/model.{suffix}" for suffix in ("pth", "pt2", "onnx", "safetensors")]
# The stage; the folder that is a disk; how much room it has; the outputs that are not there, for their room would be
# free again; and what there is no room for.
FULL_DISKS = {
    "images": ("annotate", "data", room_for(), [], "data/images"),
    "annotations": ("annotate", "data", room_for("data/images"), ["data/images"], "data/annotations"),
    "weights": ("train", "models", room_for("metrics/plots"), [], "models/model_weights.pth"),
    "epochs": ("train", "metrics", room_for(), [], "metrics/epochs.csv"),
    "train metrics": ("train", "metrics", room_for("metrics/epochs.csv"), ["metrics/epochs.csv"], "metrics/train.json"),
    "class metrics": ("evaluate", "metrics", room_for(), [], "metrics/classes.csv"),
    "pictures": ("evaluate", "metrics", room_for("metrics/plots/samples.png"), [], "metrics/plots"),
    "predictions": ("evaluate", "metrics", room_for("metrics/plots"), ["metrics/plots"], "metrics/predictions.csv"),
    "test metrics": (
        "evaluate",
        "metrics",
        room_for("metrics/plots", "metrics/predictions.csv"),
        ["metrics/plots", "metrics/predictions.csv"],
        "metrics/test.json",
    ),
    "pth": ("export", "models", room_for("metrics/plots"), [], "models/export"),
    "pt2": ("export", "models", room_for(*MODELS[:1]), [], "models/export"),
    "onnx": ("export", "models", room_for(*MODELS[:2]), [], "models/export"),
    "safetensors": ("export", "models", room_for(*MODELS[:3]), [], "models/export"),
    "manifest": ("export", "models", room_for("models/export/model.onnx"), [], "models/export"),
    "card": (
        "export",
        "models",
        room_for("models/export/model.onnx", "models/export/manifest.json"),
        [],
        "models/export",
    ),
}


@pytest.mark.slow
@needs_mount
@pytest.mark.parametrize("kind", FULL_DISKS)
def test_a_full_disk_leaves_all_as_it_was(copied: Project, kind: str) -> None:
    stage, folder, room, missing, name = FULL_DISKS[kind]
    root = copied.root
    if kind in ("manifest", "card"):
        copied.set_params(export_formats="[onnx]")  # which is soon written
    bytes_free = room(root)
    for output in missing:
        shutil.rmtree(root / output) if (root / output).is_dir() else (root / output).unlink()
    mark_as_old(root / name)
    before = Project(root).outputs()
    with small_disk(root / folder) as disk:
        disk.leave(bytes_free)
        done = run_stage(root, stage)
        check_failed_cleanly(done, name + NO_ROOM.format("the disk is full"))
        after = Project(root).outputs()
    written = {path for output in missing for path in after if path.startswith(output)}
    assert written or not missing
    assert {path: md5 for path, md5 in after.items() if path not in written} == before


@pytest.mark.slow
@needs_mount
@pytest.mark.parametrize("stage", ["train", "evaluate", "export"])
def test_a_stage_without_room_for_its_journal_succeeds_and_leaves_none(copied: Project, stage: str) -> None:
    copied.set_params(export_formats="[onnx]")
    before = copied.outputs()
    (copied.root / ".journal/.filler").write_text("a disk of no bytes would have no limit")
    with small_disk(copied.root / ".journal") as disk:
        disk.leave(0)
        done = run_stage(copied.root, stage)
        assert done.returncode == 0, done.stderr
        assert "MLflow will not have all records of this run" in done.stderr
        assert "Traceback" not in done.stderr
        assert not list((copied.root / ".journal").glob("*-*"))
    assert copied.outputs().keys() <= before.keys()


# Folders that are closed to writing


@needs_mount
def test_a_read_only_disk_is_named(tmp_path: Path) -> None:
    root = small_project(tmp_path).root
    shutil.copytree(tmp_path / "idx", root / "data/raw")
    with small_disk(root / "data") as disk:
        disk.make_read_only()
        done = run_stage(root, "annotate")
    check_failed_cleanly(
        done,
        "data/images: the disk is read-only; earlier files are unchanged. Allow access, then run the "
        "same command again.",
    )


@pytest.mark.skipif(os.geteuid() == 0 and not shutil.which("setpriv"), reason="root may write everywhere")
@pytest.mark.parametrize(("closed", "mode", "name"), [("data", 0o555, "data/images"), ("params.yaml", 0, None)])
def test_a_missing_permission_is_named(tmp_path: Path, closed: str, mode: int, name: str | None) -> None:
    root = small_project(tmp_path).root
    shutil.copytree(tmp_path / "idx", root / "data/raw")
    (root / closed).chmod(mode)
    powerless = (
        "setpriv",
        "--bounding-set=-dac_override,-dac_read_search",
        "--inh-caps=-dac_override,-dac_read_search",
    )
    done = run_stage(root, "annotate", prefix=powerless if os.geteuid() == 0 else ())
    (root / closed).chmod(0o755)
    check_failed_cleanly(
        done,
        f"{name or closed}: permission denied; earlier files are unchanged. Allow access, then run the same "
        "command again.",
    )


def test_no_folder_for_temporary_files(downloading: Path) -> None:
    done = run_stage(downloading, "download", limit=0)
    assert done.returncode == 1
    assert done.stderr.startswith("No usable temporary directory found in ['/")
    assert done.stderr.endswith("set TMPDIR to a folder with space, then run the same command again.\n")


# The whole project on a disk that is full


@pytest.mark.slow
@needs_mount
def test_half_a_compiled_module_does_not_outlive_the_full_disk(tmp_path: Path) -> None:
    root = small_project(tmp_path).root
    shutil.copytree(tmp_path / "idx", root / "data/raw")
    with small_disk(root) as disk:
        for free_pages in (2, 5, 9, 20):
            disk.leave(free_pages * PAGE)
            assert run_stage(root, "annotate").returncode == 1
            disk.leave(PLENTY)
            assert not list(root.glob("classifier/__pycache__/errors.*"))
        done = run_stage(root, "annotate")
        assert done.returncode == 0, done.stderr


@pytest.mark.slow
@needs_mount
def test_dvc_repro_completes_after_the_disk_was_full_again_and_again(reference: Project, tmp_path: Path) -> None:
    project = reference.copy_without_results(tmp_path / "project")
    lock, filler = project.root / "dvc.lock", project.root / ".filler"
    last_stages = set()
    with small_disk(project.root) as disk:
        for megabytes in (0.3, 1, 4, 9, 13):
            disk.leave(2**26)
            filler.write_bytes(bytes(2**26 - int(megabytes * 2**20)))
            failed = project.dvc("repro", check=False)
            assert failed.returncode != 0
            print(megabytes, failed.stdout, failed.stderr)
            assert "Traceback" not in failed.stderr
            last_stages.add(project.stages_run(failed.stdout)[-1])
            filler.unlink()
            if project.dvc("status", check=False).returncode != 0:  # DVC writes dvc.lock in place
                lock.unlink()
        disk.leave(PLENTY)
        project.dvc("repro")
        assert project.outputs() == reference.outputs()
        assert lock.read_bytes() == (reference.root / "dvc.lock").read_bytes()
        assert project.stages_run(project.dvc("repro").stdout) == []
        assert not list((project.root / ".checkpoints").glob("*/"))
        for path in (project.root / ".dvc/cache/files/md5").glob("*/[!.]*"):  # DVC leaves hidden ones that are half
            assert f"{path.parent.name}{path.name}".removesuffix(".dir") == hash_file(path)
    assert len(last_stages) > 2
