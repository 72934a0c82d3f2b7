"""Image folders and zips of them: read alike, and zips whose bytes are reproducible."""

import hashlib
import multiprocessing
import os
import pickle
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from imports import ROOT
from torch.utils.data import DataLoader, Dataset

from classifier.archive import Images, write_zip
from classifier.errors import PipelineError

FILES = {f"train/{index:03d}.png": bytes([index]) * (100 + index) for index in range(40)} | {"grün/ä.png": b"\0" * 9}


@pytest.fixture
def zipped(tmp_path: Path) -> Path:
    write_zip(tmp_path / "images.zip", FILES.items())
    return tmp_path / "images.zip"


@pytest.fixture(params=["zip", "folder"])
def images(request: pytest.FixtureRequest, tmp_path: Path, zipped: Path) -> Images:
    if request.param == "zip":
        return Images(zipped)
    with zipfile.ZipFile(zipped) as archive:
        archive.extractall(tmp_path / "folder")
    return Images(tmp_path / "folder")


def test_folder_and_zip_read_alike(images: Images) -> None:
    assert {name: images.read(name) for name in FILES} == FILES


def test_missing_file_is_named(images: Images) -> None:
    with pytest.raises(PipelineError, match=r"(images\.zip|folder): has no file train/999\.png"):
        images.read("train/999.png")


def test_missing_archive_is_named(tmp_path: Path) -> None:
    with pytest.raises(PipelineError, match=r"nowhere\.zip: no such image folder or zip"):
        Images(tmp_path / "nowhere.zip")


def test_corrupted_member_is_named(zipped: Path) -> None:
    content = bytearray(zipped.read_bytes())
    position = content.index(FILES["train/007.png"])
    content[position + 50] ^= 1
    zipped.write_bytes(content)
    images = Images(zipped)
    with pytest.raises(PipelineError, match=r"images\.zip: train/007\.png is not readable: Bad CRC-32"):
        images.read("train/007.png")
    assert images.read("train/008.png") == FILES["train/008.png"]


def test_any_flipped_bit_is_an_error_or_harmless(tmp_path: Path) -> None:
    """No damage gives other bytes, and none gives another kind of exception."""
    files = {"a.png": b"first" * 9, "b.png": b"second" * 9}
    write_zip(tmp_path / "whole.zip", files.items())
    content = (tmp_path / "whole.zip").read_bytes()
    refused = 0
    for position in range(len(content)):
        damaged = bytearray(content)
        damaged[position] ^= 1 << position % 8
        (tmp_path / "damaged.zip").write_bytes(damaged)
        for name, expected in files.items():
            try:
                assert Images(tmp_path / "damaged.zip").read(name) == expected, position
            except PipelineError:
                refused += 1
    assert refused > sum(map(len, files.values()))


@pytest.mark.parametrize("content", [b"", b"not a zip", b"PK\x03\x04" + bytes(100)], ids=["empty", "text", "cut"])
def test_not_a_zip(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "photos.zip").write_bytes(content)
    with pytest.raises(PipelineError, match=r"photos\.zip: a\.png is not readable: File is not a zip file"):
        Images(tmp_path / "photos.zip").read("a.png")


def test_encrypted_zip_is_refused(zipped: Path) -> None:
    content = bytearray(zipped.read_bytes())
    for signature, flags in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        content[content.index(signature) + flags] |= 1  # "this member is encrypted", for the first one
    zipped.write_bytes(content)
    with pytest.raises(PipelineError, match=r"train/000\.png is not readable: .*encrypted"):
        Images(zipped).read("train/000.png")


def test_zip_made_elsewhere(tmp_path: Path) -> None:
    """A user's own zip may be compressed."""
    with zipfile.ZipFile(tmp_path / "own.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in FILES.items():
            archive.writestr(name, content)
    images = Images(tmp_path / "own.zip")
    assert {name: images.read(name) for name in FILES} == FILES


def test_zip_bytes_do_not_depend_on_the_process(zipped: Path, tmp_path: Path) -> None:
    code = (
        f"from classifier.archive import write_zip; from pathlib import Path; write_zip(Path('o.zip'), {FILES}.items())"
    )
    env = os.environ | {"PYTHONPATH": str(ROOT), "TZ": "Asia/Tokyo", "PYTHONHASHSEED": "7"}
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=env, umask=0o077, check=True)
    assert (tmp_path / "o.zip").read_bytes() == zipped.read_bytes()


def test_zip_bytes_are_pinned(zipped: Path) -> None:
    """The same today as on the day this was written."""
    assert hashlib.md5(zipped.read_bytes(), usedforsecurity=False).hexdigest() == "5732d1364eed83ed62fac08aaf05da72"


def test_pickled_images_open_the_zip_anew(images: Images) -> None:
    name = next(iter(FILES))
    images.read(name)
    assert pickle.loads(pickle.dumps(images)).read(name) == FILES[name]  # noqa: S301, our own


class Contents(Dataset[tuple[int, bytes]]):
    def __init__(self, images: Images) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(FILES)

    def __getitem__(self, index: int) -> tuple[int, bytes]:
        return os.getpid(), self.images.read(list(FILES)[index])


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="this system cannot fork")
def test_workers_do_not_share_a_position(images: Images) -> None:
    """The zip is open before the workers are forked, and parent and workers read at the same time."""
    contents = Contents(images)
    expected = list(FILES.values())
    assert contents[0][1] == expected[0]
    loader = DataLoader(contents, batch_size=None, num_workers=2, multiprocessing_context="fork")
    for _ in range(3):
        processes, read = set(), []
        for index, (process, content) in enumerate(loader):
            processes.add(process)
            read.append(content)
            assert contents[-1 - index][1] == expected[-1 - index]
        assert read == expected
        assert len(processes - {os.getpid()}) == 2
