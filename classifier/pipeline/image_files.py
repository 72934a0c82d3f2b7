"""A user's image files, in a folder or in a zip, read alike by name."""

import os
import re
import stat
import zipfile
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

import numpy as np

from classifier.pipeline.annotations import Names
from classifier.pipeline.errors import PipelineError
from classifier.pipeline.outputs import hash_bytes

IMAGE_SUFFIXES = frozenset(
    [
        ".avif",
        ".bmp",
        ".gif",
        ".heic",
        ".heif",
        ".hif",
        ".j2k",
        ".jfif",
        ".jp2",
        ".jpe",
        ".jpeg",
        ".jpg",
        ".jpx",
        ".pbm",
        ".pgm",
        ".png",
        ".pnm",
        ".ppm",
        ".tif",
        ".tiff",
        ".webp",
    ]
)
# What systems and archivers put beside a user's files; so are names that begin with a dot
CLUTTER = frozenset(("__MACOSX", "Thumbs.db", "desktop.ini"))
# The end of a file's path in DVC's cache: its MD5. A link to another file cannot look like this and have that MD5.
CACHED = re.compile(r"/([0-9a-f]{2})/([0-9a-f]{30})$")
LARGEST_FILE = 256 * 2**20  # bytes of one unpacked file; checked before it is read
COMPRESSIONS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)  # Python unpacks the others without a limit
UTF8_FLAG, ENCRYPTED_FLAG = 0x800, 0x1
LOCAL_HEADER_BYTES = 30  # APPNOTE.TXT of PKWARE, 6.3.10, section 4.3.7
# A zip of images unpacks to little more than its size. Deflate alone reaches 1,032 times; a bomb has members that
# share their packed bytes, or many members that unpack to far more.
LARGEST_RATIO, FREE_BYTES = 100, 2**30


class ImageFiles:
    """The files of an image folder, or of a zip of one, by name.

    Raises PipelineError if the path is missing, or neither of these.
    """

    def __init__(self, path: Path) -> None:
        if not os.path.exists(path):  # noqa: PTH110, pathlib raises an error for folders that may not be entered
            raise PipelineError(f"{path}: no such image folder or zip")
        self.path = path
        self._root = os.path.join(os.path.realpath(path), "")  # noqa: PTH118, with the separator at its end
        if not (path.is_dir() or path.is_file()):
            raise PipelineError(f"{path}: neither a folder nor a zip")
        self._zip = None if path.is_dir() else _Zip(path)

    def read(self, name: str) -> bytes:
        """Return the bytes of one file of at most LARGEST_FILE bytes.

        In a folder it must be a regular file; symbolic links are followed if they stay in the folder, or lead to a file
        that is named by its own MD5, as DVC names the files of its cache. In a zip it must be there once, not
        encrypted, no symbolic link, and stored or deflated, with the right checksum.
        Raises PipelineError, naming the file, if not.
        """
        try:
            return self._zip.read(name) if self._zip else self._read_file(name)
        except (KeyError, FileNotFoundError):
            raise PipelineError(f"{name} is missing in {self.path}") from None
        except Exception as error:  # hostile archives make zipfile raise anything
            reason = getattr(error, "strerror", None) or " ".join(str(error).split()) or type(error).__name__
            raise PipelineError(f"{name} in {self.path} is not readable: {reason}") from None

    def names(self) -> Names:
        """The names of all files, sorted, without hidden ones and CLUTTER.

        Raises PipelineError for a symbolic link to a folder, which is not followed.
        """
        return Names(name for name in self._all_names() if not _is_clutter(name)).sorted()

    def _all_names(self) -> Iterator[str]:
        if self._zip:
            yield from (name for name in self._zip.names() if not name.endswith("/"))
            return

        def refuse(error: OSError) -> None:  # or such a folder would be passed over
            raise PipelineError(f"{error.filename}: not readable: {error.strerror}")

        for folder, subfolders, files in os.walk(self._root, onerror=refuse):
            if links := [name for name in subfolders if os.path.islink(os.path.join(folder, name))]:  # noqa: PTH114, PTH118
                path = Path(folder, links[0])
                raise PipelineError(f"{path}: a symbolic link to a folder; put the folder itself there")
            inner = folder[len(self._root) :]
            # os.path: there may be a million of them
            yield from (os.path.join(inner, name).replace(os.sep, "/") for name in files)  # noqa: PTH118

    def _read_file(self, name: str) -> bytes:
        given = self.path / name
        path = Path(os.path.realpath(given))
        cached = None if self._holds(path) else CACHED.search(path.as_posix())
        if not (self._holds(path) or (cached and self._holds(Path(os.path.realpath(given.parent))))):
            raise ValueError("it leads out of the image folder")
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):  # reading a pipe would wait for ever
            raise ValueError("it is not a regular file")
        _check_size(status.st_size)
        content = path.read_bytes()
        if cached and hash_bytes(content) != cached[1] + cached[2]:
            raise ValueError(
                f"it leads to {path}, whose content is not what its name says; remove it, then `dvc fetch`"
            )
        return content

    def _holds(self, path: Path) -> bool:
        """Whether a path without links is the folder or in it."""
        return f"{path}{os.sep}".startswith(self._root)

    def __reduce__(self) -> tuple[object, ...]:
        return _opened, (self.path.absolute(), self.path.stat().st_mtime_ns)


@lru_cache(maxsize=1)
def _opened(path: Path, modified: int) -> ImageFiles:
    """In a worker process: a zip is opened once for all tasks."""
    return ImageFiles(path)


class _Zip:
    """The members of a zip by name. Raises PipelineError if it is no zip, or a bomb (see `_refuse_bombs`)."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._zip, self._process = zipfile.ZipFile(path), os.getpid()  # open as long as this object is
            members = self._zip.infolist()
        except Exception as error:  # hostile archives make it raise anything
            reason = " ".join(str(error).split()) or type(error).__name__
            raise PipelineError(f"{path}: not readable as a zip: {reason}") from None
        _refuse_bombs(path, members)
        self._members: dict[str, zipfile.ZipInfo | None] = {}  # None: there is more than one
        for member in members:
            name = _name(member)
            self._members[name] = None if name in self._members else member

    def names(self) -> Iterator[str]:
        return iter(self._members)

    def read(self, name: str) -> bytes:
        """The bytes of a member, as `ImageFiles.read` says. Raises KeyError if there is none of that name."""
        member = self._members[name]
        if member is None:
            raise ValueError("it is there more than once")
        if member.is_dir() or stat.S_ISLNK(member.external_attr >> 16):
            raise ValueError("it is a folder or a symbolic link")
        if member.compress_type not in COMPRESSIONS:
            raise ValueError("it is neither stored nor deflated; zip it anew")
        if member.flag_bits & ENCRYPTED_FLAG:
            raise ValueError("it is encrypted; zip it anew without a password")
        _check_size(member.file_size)
        if self._process != os.getpid():  # forked processes share one position in the file
            self._zip, self._process = zipfile.ZipFile(self.path), os.getpid()
        with self._zip.open(member) as file:  # which checks the checksum
            content = file.read(member.file_size)  # with a limit: it may unpack to more than it declares
        if len(content) != member.file_size:
            raise ValueError(f"cut off after {len(content)} of {member.file_size} bytes")
        return content


def _refuse_bombs(path: Path, members: list[zipfile.ZipInfo]) -> None:
    starts = np.array([member.header_offset for member in members], np.int64)
    packed = np.array([member.compress_size for member in members], np.int64)
    order = starts.argsort(kind="stable")
    ends = (starts + LOCAL_HEADER_BYTES + packed)[order]
    if overlapping := np.flatnonzero(ends[:-1] > starts[order][1:]).tolist():
        first, second = (members[order[place]].filename for place in (overlapping[0], overlapping[0] + 1))
        raise PipelineError(f"{path}: {first!r} and {second!r} share bytes of the zip; pack the images anew")
    unpacked, size = sum(member.file_size for member in members), path.stat().st_size
    if unpacked > FREE_BYTES + LARGEST_RATIO * size:
        raise PipelineError(
            f"{path}: its {size:,} bytes unpack to {unpacked:,}, more than {LARGEST_RATIO} times as many; unpack it "
            "yourself, and set data_path to the folder"
        )


def _name(member: zipfile.ZipInfo) -> str:
    """A name in UTF-8, also where no flag says so, as in zips of macOS and Info-ZIP; else in code page 437."""
    if member.flag_bits & UTF8_FLAG or member.filename.isascii():
        return member.filename
    try:
        return member.filename.encode("cp437").decode("utf-8")
    except UnicodeError:
        return member.filename


def _check_size(size: int) -> None:
    """Raise ValueError for a file that is larger than any image is."""
    if size > LARGEST_FILE:
        raise ValueError(f"its {size:,} bytes are more than {LARGEST_FILE:,}")


def _is_clutter(name: str) -> bool:
    return any((part.startswith(".") and part not in (".", "..")) or part in CLUTTER for part in name.split("/"))
