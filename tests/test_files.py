"""Atomic writing, JSON and hashes, and what is read from dvc.lock."""

import errno
import hashlib
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from classifier.data.lockfile import locked_md5s
from classifier.pipeline.errors import PipelineError
from classifier.pipeline.outputs import atomic, existing, hash_file, read_json, temporary_folder, write_json

LOCK = """\
schema: '2.0'
stages:
  download:
    cmd: python -m stages download
    deps:
    - path: stages/download.py
      hash: md5
      md5: 0df5962279bb7c2a541f732259c038bd
    outs:
    - path: data/raw
      hash: md5
      md5: 5f974fc07a228533b94e96f0786e9bcc.dir
      nfiles: 4
  check:
    cmd: 'true'
  train:
    cmd: python -m stages train
    outs:
    - path: metrics/train.json
      hash: md5
      md5: 0cc175b9c0f1b6a831c399e269772661
    - path: models/model_weights.pth
      hash: md5
      md5: 92eb5ffee6ae2fec3ad71c777531578f
"""


class Interrupted(Exception):
    """What stops a block in these tests."""


def write_half(target: Path, error: type[BaseException] | BaseException) -> None:
    with atomic(target) as path:
        path.write_text("half")
        raise error


def write_half_a_folder(target: Path) -> None:
    with atomic(target) as path:
        path.mkdir()
        (path / "a.png").write_text("half")
        raise Interrupted


def names_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_a_file_appears_when_the_block_ends(tmp_path: Path) -> None:
    target = tmp_path / "models" / "weights.pth"  # its folder is made
    with atomic(target) as path:
        path.write_text("new")
        assert path.name == target.name
        assert not target.exists()
    assert target.read_text() == "new"
    assert names_in(target.parent) == {"weights.pth"}


def test_a_file_is_replaced(tmp_path: Path) -> None:
    target = tmp_path / "weights.pth"
    target.write_text("old")
    with atomic(target) as path:
        path.write_text("new")
        assert target.read_text() == "old"
    assert target.read_text() == "new"


def test_a_read_only_file_is_replaced(tmp_path: Path) -> None:
    target = tmp_path / "weights.pth"
    target.write_text("old")
    target.chmod(0o444)  # as DVC leaves files that are links into its cache
    with atomic(target) as path:
        path.write_text("new")
    assert target.read_text() == "new"


def test_a_link_is_replaced_and_not_followed(tmp_path: Path) -> None:
    cached, target = tmp_path / "cached", tmp_path / "weights.pth"
    cached.write_text("old")
    target.symlink_to(cached)
    with atomic(target) as path:
        path.write_text("new")
    assert (target.read_text(), cached.read_text()) == ("new", "old")


@pytest.mark.parametrize("error", [Interrupted, KeyboardInterrupt])
def test_the_old_file_stays_when_the_block_raises(tmp_path: Path, error: type[BaseException]) -> None:
    target = tmp_path / "weights.pth"
    target.write_text("old")
    with pytest.raises(error):
        write_half(target, error)
    assert target.read_text() == "old"
    assert names_in(tmp_path) == {"weights.pth"}


def test_nothing_appears_when_the_block_raises(tmp_path: Path) -> None:
    with pytest.raises(Interrupted):
        write_half(tmp_path / "weights.pth", Interrupted)
    assert names_in(tmp_path) == set()


def test_a_folder_is_replaced_as_a_whole(tmp_path: Path) -> None:
    target = tmp_path / "plots"
    for content in ({"a.png", "b.png"}, {"b.png", "c.png"}):
        with atomic(target) as path:
            path.mkdir()
            for name in content:
                (path / name).write_text(name)
        assert names_in(target) == content
    assert names_in(tmp_path) == {"plots"}


def test_the_old_folder_stays_when_the_block_raises(tmp_path: Path) -> None:
    target = tmp_path / "plots"
    target.mkdir()
    (target / "a.png").write_text("old")
    with pytest.raises(Interrupted):
        write_half_a_folder(target)
    assert (target / "a.png").read_text() == "old"
    assert names_in(tmp_path) == {"plots"}


def test_a_folder_that_several_replace_at_once_is_one_of_theirs(tmp_path: Path) -> None:
    target = tmp_path / "plots"

    def replace_often(name: str) -> None:
        for _ in range(100):
            with atomic(target) as path:
                path.mkdir()
                (path / name).touch()
                (path / "both").write_text(name)

    with ThreadPoolExecutor() as pool:
        list(pool.map(replace_often, ["one", "two"]))
    assert names_in(target) == {"both", (target / "both").read_text()}
    assert names_in(tmp_path) == {"plots"}


def test_what_a_killed_process_left_goes_and_what_others_have_stays(tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", ""]) as ended:
        pass
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as alive:
        left = tmp_path / f".images.zip.{ended.pid}.abc"
        others = [
            tmp_path / f".images.zip.{alive.pid}.abc",
            tmp_path / f".images.zip.{os.getpid()}.abc",
            tmp_path / f".other.zip.{ended.pid}.abc",
            tmp_path / ".images.zip.backup",
            tmp_path / f"images.zip.{ended.pid}.abc",
        ]
        for folder in (left, *others):
            folder.mkdir()
            (folder / "images.zip").write_text("half")
        before = tmp_path / f".images.zip.{os.getpid()}.before"  # of another that had the number of this process
        before.mkdir()
        os.utime(before, (0, 0))
        with temporary_folder(tmp_path / "images.zip"):
            assert not left.exists()
            assert not before.exists()
        assert names_in(tmp_path) == {folder.name for folder in others}
        assert all((folder / "images.zip").exists() for folder in others)
        alive.communicate(b"\n")


@pytest.mark.parametrize("kind", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_a_lack_of_room_names_what_was_to_be_written(tmp_path: Path, kind: int) -> None:
    target = tmp_path / "weights.pth"
    with pytest.raises(OSError, match=r"weights\.pth'$") as caught:
        write_half(target, OSError(kind, "no room"))
    assert caught.value.filename == str(target)


def test_a_file_that_may_not_be_read_is_named_itself(tmp_path: Path) -> None:
    with pytest.raises(PermissionError) as caught:
        write_half(tmp_path / "weights.pth", PermissionError(errno.EACCES, "Permission denied", "image.png"))
    assert caught.value.filename == "image.png"


def test_json_comes_back_exactly(tmp_path: Path) -> None:
    content = {"loss": 0.1 + 0.2, "interval": [1e-17, 1 / 3], "epoch": 3, "name": "Bär"}
    write_json(tmp_path / "train.json", content)
    assert read_json(tmp_path / "train.json") == content
    text = (tmp_path / "train.json").read_text()
    assert text.startswith('{\n  "loss": 0.30000000000000004,\n')
    assert text.endswith("}\n")


def test_a_missing_file_is_an_error_that_says_what_to_do(tmp_path: Path) -> None:
    for read in (read_json, existing):
        with pytest.raises(PipelineError, match=r"train\.json: missing; `dvc repro` makes it"):
            read(tmp_path / "train.json")


def test_json_that_is_cut_off_is_named(tmp_path: Path) -> None:
    (tmp_path / "train.json").write_text('{"loss": 0.')
    with pytest.raises(PipelineError, match=r"train\.json: not valid JSON .*; `dvc repro` writes it again"):
        read_json(tmp_path / "train.json")


def test_an_existing_path_is_given_back(tmp_path: Path) -> None:
    assert existing(tmp_path) == tmp_path


def test_hash_file(tmp_path: Path) -> None:
    content = bytes(range(256)) * 5000
    (tmp_path / "file").write_bytes(content)
    assert hash_file(tmp_path / "file") == hashlib.md5(content).hexdigest()  # noqa: S324, DVC's name of the file
    assert hash_file(tmp_path / "file", "sha256") == hashlib.sha256(content).hexdigest()


def test_locked_md5s(tmp_path: Path) -> None:
    lock = tmp_path / "dvc.lock"
    assert locked_md5s(lock) == {}
    lock.write_text(LOCK)
    assert locked_md5s(lock) == {
        "data/raw": "5f974fc07a228533b94e96f0786e9bcc.dir",
        "metrics/train.json": "0cc175b9c0f1b6a831c399e269772661",
        "models/model_weights.pth": "92eb5ffee6ae2fec3ad71c777531578f",
    }


@pytest.mark.parametrize(
    "text",
    [f"<<<<<<< HEAD\n{LOCK}=======\n", "- 1\n", "stages:\n", "stages: {train: }\n", "stages: {a: {outs: [1]}}\n", "\0"],
)
def test_a_lock_that_is_not_dvcs_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "dvc.lock").write_text(text)
    with pytest.raises(PipelineError, match=r"dvc\.lock: not as DVC writes it, .*; `git restore dvc\.lock`"):
        locked_md5s(tmp_path / "dvc.lock")


def test_a_file_takes_the_place_of_a_folder_and_a_folder_that_of_a_file(tmp_path: Path) -> None:
    path = tmp_path / "images.zip"
    for _ in range(2):
        with atomic(path) as folder:
            folder.mkdir()
            (folder / "images-00000.zip").write_bytes(b"part")
        assert (path / "images-00000.zip").read_bytes() == b"part"
        with atomic(path) as file:
            file.write_bytes(b"whole")
        assert path.read_bytes() == b"whole"
    assert list(tmp_path.iterdir()) == [path]
