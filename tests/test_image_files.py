"""Image folders and zips of them, read alike, and what is refused of them."""

import errno
import multiprocessing
import os
import pickle
import re
import socket
import stat
import struct
import tempfile
import tracemalloc
import warnings
import zipfile
from pathlib import Path

import pytest
from pictures import write_zip
from torch.utils.data import DataLoader, Dataset

from classifier.pipeline.errors import PipelineError
from classifier.pipeline.image_files import LARGEST_FILE, ImageFiles
from classifier.pipeline.outputs import hash_bytes

FILES = {f"train/{index:03d}.png": bytes([index]) * (100 + index) for index in range(40)} | {"grün/ä.png": b"\0" * 9}


@pytest.fixture
def zipped(tmp_path: Path) -> Path:
    write_zip(tmp_path / "images.zip", FILES.items())
    return tmp_path / "images.zip"


@pytest.fixture(params=["zip", "folder"])
def images(request: pytest.FixtureRequest, tmp_path: Path, zipped: Path) -> ImageFiles:
    if request.param == "zip":
        return ImageFiles(zipped)
    with zipfile.ZipFile(zipped) as archive:
        archive.extractall(tmp_path / "folder")
    return ImageFiles(tmp_path / "folder")


def test_folder_and_zip_read_alike(images: ImageFiles) -> None:
    assert {name: images.read(name) for name in FILES} == FILES


def test_missing_file_is_named(images: ImageFiles) -> None:
    with pytest.raises(PipelineError, match=r"train/999\.png is missing in .*(images\.zip|folder)"):
        images.read("train/999.png")


def test_missing_archive_is_named(tmp_path: Path) -> None:
    with pytest.raises(PipelineError, match=r"nowhere\.zip: no such image folder or zip"):
        ImageFiles(tmp_path / "nowhere.zip")


def test_corrupted_member_is_named(zipped: Path) -> None:
    content = bytearray(zipped.read_bytes())
    position = content.index(FILES["train/007.png"])
    content[position + 50] ^= 1
    zipped.write_bytes(content)
    images = ImageFiles(zipped)
    with pytest.raises(PipelineError, match=r"train/007\.png in .*images\.zip is not readable: Bad CRC-32"):
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
                assert ImageFiles(tmp_path / "damaged.zip").read(name) == expected, position
            except PipelineError:
                refused += 1
    assert refused > sum(map(len, files.values()))


@pytest.mark.parametrize("content", [b"", b"not a zip", b"PK\x03\x04" + bytes(100)], ids=["empty", "text", "cut"])
def test_not_a_zip(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "photos.zip").write_bytes(content)
    with pytest.raises(PipelineError, match=r"photos\.zip: not readable as a zip: File is not a zip file"):
        ImageFiles(tmp_path / "photos.zip")


def test_encrypted_zip_is_refused(zipped: Path) -> None:
    content = bytearray(zipped.read_bytes())
    for signature, flags in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        content[content.index(signature) + flags] |= 1  # "this member is encrypted", for the first one
    zipped.write_bytes(content)
    with pytest.raises(PipelineError, match=r"train/000\.png in .*images\.zip is not readable: .*encrypted"):
        ImageFiles(zipped).read("train/000.png")


def test_zip_made_elsewhere(tmp_path: Path) -> None:
    """A user's own zip may be compressed."""
    with zipfile.ZipFile(tmp_path / "own.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in FILES.items():
            archive.writestr(name, content)
    images = ImageFiles(tmp_path / "own.zip")
    assert {name: images.read(name) for name in FILES} == FILES


def test_zip_cut_short(zipped: Path) -> None:
    content = zipped.read_bytes()
    for length in (10, len(content) // 2, len(content) - 1):
        zipped.write_bytes(content[:length])
        with pytest.raises(PipelineError, match=r"images\.zip: not readable as a zip"):
            ImageFiles(zipped)


def own_zip(
    path: Path, *members: tuple[zipfile.ZipInfo | str, bytes], compression: int = zipfile.ZIP_STORED
) -> ImageFiles:
    with zipfile.ZipFile(path, "w", compression) as archive, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # duplicate names
        for member, content in members:
            archive.writestr(member, content)
    return ImageFiles(path)


def refused(images: ImageFiles, name: str, why: str) -> None:
    with pytest.raises(PipelineError, match=rf"{re.escape(name)} in .* is not readable: {why}"):
        images.read(name)


def test_members_that_are_no_plain_files(tmp_path: Path) -> None:
    link = zipfile.ZipInfo("link.png")
    link.create_system, link.external_attr = 3, (stat.S_IFLNK | 0o777) << 16
    images = own_zip(tmp_path / "a.zip", (link, b"a.png"), ("sub/", b""), ("a.png", b"1"), ("a.png", b"2"), ("b", b"3"))
    refused(images, "link.png", "it is a folder or a symbolic link")
    refused(images, "sub/", "it is a folder or a symbolic link")
    refused(images, "a.png", "it is there more than once")
    assert images.read("b") == b"3"


def test_names_are_those_of_files_but_for_hidden_ones_and_what_systems_add(tmp_path: Path) -> None:
    names = ["b/", "b/2.png", "./1.png", ".hidden.png", "b/.x/3.png", "__MACOSX/b/2.png", "b/Thumbs.db"]
    images = own_zip(tmp_path / "a.zip", *((name, b"") for name in names))
    assert list(images.names()) == ["./1.png", "b/2.png"]


@pytest.mark.parametrize("compression", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_rare_compressions_are_refused(tmp_path: Path, compression: int) -> None:
    images = own_zip(tmp_path / "a.zip", ("a.png", bytes(1000)), compression=compression)
    refused(images, "a.png", "it is neither stored nor deflated; zip it anew")


def test_zip_bomb_is_not_unpacked(tmp_path: Path) -> None:
    """Whether it declares its size, or declares a small one and unpacks to more."""
    bomb = bytes(LARGEST_FILE + 1)
    own_zip(tmp_path / "bomb.zip", ("a.png", bomb), compression=zipfile.ZIP_DEFLATED)
    content = (tmp_path / "bomb.zip").read_bytes()
    declared = struct.pack("<I", len(bomb))
    assert content.count(declared) == 2
    (tmp_path / "lying.zip").write_bytes(content.replace(declared, struct.pack("<I", 1000)))
    del bomb
    tracemalloc.start()
    try:
        refused(ImageFiles(tmp_path / "bomb.zip"), "a.png", "its 268,435,457 bytes are more than 268,435,456")
        refused(ImageFiles(tmp_path / "lying.zip"), "a.png", "Bad CRC-32")
        assert tracemalloc.get_traced_memory()[1] < 3 * 2**20
    finally:
        tracemalloc.stop()


def test_overlapping_members(tmp_path: Path) -> None:
    """A directory that leads to the same bytes under two names."""
    own_zip(tmp_path / "a.zip", ("a.png", b"1" * 50), ("b.png", b"2" * 50))
    content = bytearray((tmp_path / "a.zip").read_bytes())
    second = content.rindex(b"PK\x01\x02")
    content[second + 42 : second + 46] = bytes(4)  # where b.png starts: at a.png
    (tmp_path / "a.zip").write_bytes(content)
    with pytest.raises(PipelineError, match=r"a\.zip: 'a\.png' and 'b\.png' share bytes of the zip"):
        ImageFiles(tmp_path / "a.zip")


def test_names_that_are_not_utf8_although_they_say_so(tmp_path: Path) -> None:
    own_zip(tmp_path / "a.zip", ("ä.png", b"1"))
    content = (tmp_path / "a.zip").read_bytes().replace("ä".encode(), b"\xff\xff")
    (tmp_path / "a.zip").write_bytes(content)
    with pytest.raises(PipelineError, match=r"a\.zip: not readable as a zip: 'utf-8' codec"):
        ImageFiles(tmp_path / "a.zip")


# Folders


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside/secret.png").write_bytes(b"secret")
    (tmp_path / "images/sub").mkdir(parents=True)
    (tmp_path / "images/sub/a.png").write_bytes(b"a")
    return tmp_path / "images"


def test_links_are_followed_inside_the_folder(folder: Path) -> None:
    (folder / "link.png").symlink_to("sub/a.png")
    (folder / "linked").symlink_to(folder / "sub", target_is_directory=True)
    (folder.parent / "other").symlink_to(folder, target_is_directory=True)
    for images in (ImageFiles(folder), ImageFiles(folder.parent / "other")):
        assert images.read("link.png") == images.read("linked/a.png") == b"a"


def test_nothing_outside_the_folder_is_read(folder: Path) -> None:
    (folder / "link.png").symlink_to(folder.parent / "outside/secret.png")
    (folder / "linked").symlink_to("../outside", target_is_directory=True)
    (folder.parent / "images-too").mkdir()  # begins like the folder
    (folder.parent / "images-too/a.png").write_bytes(b"b")
    absolute = str(folder.parent / "outside/secret.png")
    for name in ("link.png", "linked/secret.png", "../outside/secret.png", absolute, "../images-too/a.png"):
        refused(ImageFiles(folder), name, "it leads out of the image folder")


def cached(cache: Path, content: bytes) -> Path:
    """A file where DVC's cache has this content."""
    md5 = hash_bytes(content)
    path = cache / "files/md5" / md5[:2] / md5[2:]
    path.parent.mkdir(parents=True)
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("way", ["absolute", "relative", "through a link to the cache"])
def test_links_into_the_cache_of_dvc_are_followed(folder: Path, way: str) -> None:
    target = cached(folder.parent / "cache", b"b")
    (folder.parent / "moved").symlink_to("cache")
    link = folder / "sub/b.png"
    if way == "through a link to the cache":
        target = folder.parent / "moved" / target.relative_to(folder.parent / "cache")
    link.symlink_to(os.path.relpath(target, link.parent) if way == "relative" else target)
    assert ImageFiles(folder).read("sub/b.png") == b"b"
    assert list(ImageFiles(folder).names()) == ["sub/a.png", "sub/b.png"]


def test_a_link_to_a_file_that_is_not_named_by_its_content_is_not_followed(folder: Path) -> None:
    target = cached(folder.parent / "cache", b"b")
    (folder / "link.png").symlink_to(target)
    target.write_bytes(b"another secret")
    refused(ImageFiles(folder), "link.png", "it leads to .*, whose content is not what its name says")
    target.unlink()
    os.mkfifo(target)
    refused(ImageFiles(folder), "link.png", "it is not a regular file")


def test_a_name_that_leads_into_the_cache_is_no_link_of_dvc(folder: Path) -> None:
    target = cached(folder.parent / "cache", b"b")
    for name in (f"../{target.relative_to(folder.parent)}", str(target)):
        refused(ImageFiles(folder), name, "it leads out of the image folder")


def test_only_regular_files_are_read(folder: Path) -> None:
    """A pipe would be waited for, for ever."""
    os.mkfifo(folder / "pipe.png")
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(folder / "socket.png"))
    for name in ("pipe.png", "socket.png", "sub"):
        refused(ImageFiles(folder), name, "it is not a regular file")
    for name in ("sub/a.png/b.png", "x" * 300, "a\0b"):
        refused(ImageFiles(folder), name, "Not a directory|File name too long|embedded null byte")
    (folder / "loop.png").symlink_to("loop.png")
    refused(ImageFiles(folder), "loop.png", "Too many levels of symbolic links")
    with pytest.raises(PipelineError, match=r"pipe\.png: neither a folder nor a zip"):
        ImageFiles(folder / "pipe.png")


def test_large_file_is_not_read(folder: Path) -> None:
    with (folder / "large.png").open("wb") as file:
        file.truncate(1 << 40)  # takes no room on disk
    refused(ImageFiles(folder), "large.png", "its 1,099,511,627,776 bytes are more than 268,435,456")


@pytest.mark.skipif(os.name == "nt", reason="other permissions there")
def test_file_without_permission() -> None:
    with tempfile.TemporaryDirectory() as name:  # pytest's own folders are closed to others
        folder = Path(name)
        folder.chmod(0o755)
        (folder / "closed").mkdir()
        for path in (folder / "a.png", folder / "closed/b.zip"):
            path.touch(0o600)
        (folder / "closed").chmod(0o700)
        user = os.geteuid()
        if user == 0:
            os.seteuid(65534)
        else:
            (folder / "a.png").chmod(0)
            (folder / "closed").chmod(0)
        try:
            refused(ImageFiles(folder), "a.png", "Permission denied")
            with pytest.raises(PipelineError, match=r"b\.zip: no such image folder or zip"):
                ImageFiles(folder / "closed/b.zip")
        finally:
            if user == 0:
                os.seteuid(user)
            (folder / "closed").chmod(0o700)


# Unusual zips


def test_zips_with_long_records_and_something_around_them(tmp_path: Path) -> None:
    """Long names, extra fields and comments; bytes in front, as of a program that unpacks itself; a comment behind."""
    files = {f"{index}/{'long' * index}.png": bytes([index]) * 300 for index in range(1, 200)}
    with zipfile.ZipFile(tmp_path / "a.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for number, (name, content) in enumerate(files.items()):
            member = zipfile.ZipInfo(name)
            member.comment, member.extra = b"c" * 300 * number, struct.pack("<2H", 9, 4 * number) + bytes(4 * number)
            archive.writestr(member, content, zipfile.ZIP_DEFLATED)
        archive.comment = b"the end"
    content = (tmp_path / "a.zip").read_bytes()
    (tmp_path / "a.zip").write_bytes(b"#!/bin/unpack\n" * 50 + content)
    images = ImageFiles(tmp_path / "a.zip")
    assert images.names() == sorted(files)
    assert {name: images.read(name) for name in files} == files


def quoted_overlap(path: Path, members: int, size: int) -> None:
    """A zip of members that share the bytes of one: David Fifield 2019, "A better zip bomb"."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("0.png", bytes(size))
        kept = archive.getinfo("0.png")
        for number in range(1, members):
            member = zipfile.ZipInfo(f"{number}.png")
            for key in ("compress_type", "CRC", "compress_size", "file_size", "header_offset"):
                setattr(member, key, getattr(kept, key))
            archive.filelist.append(member)


def test_members_that_share_bytes_are_refused_before_one_is_unpacked(tmp_path: Path) -> None:
    quoted_overlap(tmp_path / "bomb.zip", members=300, size=2**20)
    with pytest.raises(
        PipelineError, match=r"bomb\.zip: '0\.png' and '1\.png' share bytes of the zip; pack the images"
    ):
        ImageFiles(tmp_path / "bomb.zip")


def test_a_zip_that_unpacks_to_far_more_than_it_has_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("classifier.pipeline.image_files.FREE_BYTES", 2**20)
    own_zip(tmp_path / "fits.zip", ("a.png", bytes(2**20)), compression=zipfile.ZIP_DEFLATED)
    with pytest.raises(PipelineError, match=r"bomb\.zip: its \d,\d+ bytes unpack to 2,097,152, more than 100 times"):
        own_zip(tmp_path / "bomb.zip", ("a.png", bytes(2**21)), compression=zipfile.ZIP_DEFLATED)


@pytest.mark.parametrize("flag", [0, 0x800])
def test_names_in_utf8_are_read_with_and_without_the_flag_for_it(tmp_path: Path, flag: int) -> None:
    own_zip(tmp_path / "a.zip", ("grün/é.png", b"1"))
    content = bytearray((tmp_path / "a.zip").read_bytes())
    for signature, place in ((b"PK\3\4", 6), (b"PK\1\2", 8)):
        content[content.index(signature) + place + 1] = flag >> 8
    (tmp_path / "a.zip").write_bytes(content)
    images = ImageFiles(tmp_path / "a.zip")
    assert list(images.names()) == ["grün/é.png"]
    assert images.read("grün/é.png") == b"1"


def test_pickled_images_open_the_zip_anew(images: ImageFiles) -> None:
    name = next(iter(FILES))
    images.read(name)
    assert pickle.loads(pickle.dumps(images)).read(name) == FILES[name]  # noqa: S301, our own


class Contents(Dataset[tuple[int, bytes]]):
    def __init__(self, images: ImageFiles) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(FILES)

    def __getitem__(self, index: int) -> tuple[int, bytes]:
        return os.getpid(), self.images.read(list(FILES)[index])


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="this system cannot fork")
def test_workers_do_not_share_a_position(images: ImageFiles) -> None:
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


def test_a_folder_that_may_not_be_entered_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "images/cat").mkdir(parents=True)

    def deny(folder: str) -> object:
        raise PermissionError(errno.EACCES, "Permission denied", folder)

    images = ImageFiles(tmp_path / "images")
    monkeypatch.setattr(os, "scandir", deny)  # permissions do not stop root
    with pytest.raises(PipelineError, match=r"images/: not readable: Permission denied"):
        images.names()
