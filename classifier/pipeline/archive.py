"""Images in a folder, in a zip, or in a folder of zips, read alike; and the zips that `annotate` writes.

One zip of stored members instead of 70,000 files: DVC's cost grows with the number of files.
"""

import errno
import os
import re
import stat
from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator
from contextlib import suppress
from itertools import groupby
from pathlib import Path

import numpy as np

from classifier.pipeline.annotations import Names
from classifier.pipeline.errors import PipelineError
from classifier.pipeline.outputs import hash_bytes
from classifier.pipeline.zip_format import Zip, check_size, write_zip

IMAGE_SUFFIXES = frozenset(
    (".bmp", ".gif", ".jfif", ".jpe", ".jpeg", ".jpg", ".pbm", ".pgm", ".png", ".pnm", ".ppm", ".tif", ".tiff", ".webp")
)
# What systems and their archivers put beside a user's files; and names that begin with a dot
CLUTTER = frozenset(("__MACOSX", "Thumbs.db", "desktop.ini"))
# Above it, images are written to several zips of about as much: it is what is sent or hashed anew for one image
SHARD_BYTES = 2**30
OPEN_FILES = 1000  # that a process may have besides the zips
# The end of a file's path in DVC's cache: its MD5. A link to another file cannot look like this and have that MD5.
CACHED = re.compile(r"/([0-9a-f]{2})/([0-9a-f]{30})$")
SHARD = re.compile(r"images-\d{5,}\.zip")


class Images:
    """The files of an image folder, of a zip of one, or of a folder of the zips that `write_images` writes, by name.

    Raises PipelineError if the path is missing, or none of these.
    """

    def __init__(self, path: Path) -> None:
        if not os.path.exists(path):  # noqa: PTH110, pathlib raises an error for folders that may not be entered
            raise PipelineError(f"{path}: no such image folder or zip; `dvc repro` makes data/images.zip")
        self.path = path
        zips = shards(path)
        self._is_folder = path.is_dir() and not zips
        if self._is_folder:
            self._root = os.path.join(os.path.realpath(path), "")  # noqa: PTH118, with the separator at its end
        elif not (zips or path.is_file()):
            raise PipelineError(f"{path}: neither a folder nor a zip")
        else:
            self._members = _Members(zips or [path])

    def read(self, name: str) -> bytes:
        """Return the bytes of one file of at most LARGEST_FILE bytes.

        In a folder it must be a regular file; symbolic links are followed if they stay in the folder, or lead to a file
        that is named by its own MD5, as DVC names the files of its cache. In a zip it must be there once, not
        encrypted, no symbolic link, and stored or deflated, with the right checksum.
        Raises PipelineError, naming the file, if not.
        """
        try:
            return self._read_file(name) if self._is_folder else self._members.read(name)
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
        if not self._is_folder:
            yield from (name for name in self._members.names() if not name.endswith("/"))
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
        check_size(status.st_size)
        content = path.read_bytes()
        if cached and hash_bytes(content) != cached[1] + cached[2]:
            raise ValueError(
                f"it leads to {path}, whose content is not what its name says; remove it, then `dvc fetch`"
            )
        return content

    def _holds(self, path: Path) -> bool:
        """Whether a path without links is the folder or in it."""
        return f"{path}{os.sep}".startswith(self._root)

    def __getstate__(self) -> dict[str, Path]:
        return {"path": self.path}  # open files do not travel to worker processes

    def __setstate__(self, state: dict[str, Path]) -> None:
        self.__init__(state["path"])  # type: ignore[misc]


class _Members:
    """The members of zips, found by name with 20 bytes of memory for each; `zipfile` takes half a KiB.

    These are the hash of its name, its place in its zip, and which zip that is. Raises PipelineError if a zip is none.
    """

    def __init__(self, paths: list[Path]) -> None:
        if len(paths) > 1:
            _allow_open_files()
        self._zips: list[Zip] = []
        hashes, places, owners = array("q"), array("q"), array("I")
        for number, path in enumerate(paths):
            try:
                self._zips.append(Zip(path))
                for place, member in self._zips[-1].members():
                    hashes.append(hash(member.filename))
                    places.append(place)
                    owners.append(number)
            except Exception as error:  # hostile archives make it raise anything
                if isinstance(error, OSError) and error.errno == errno.EMFILE:
                    raise PipelineError(
                        f"{path.parent}: its {len(paths)} zips are more files than this process may have open; "
                        f"allow more: ulimit -Hn {OPEN_FILES + len(paths)}"
                    ) from None
                reason = " ".join(str(error).split()) or type(error).__name__
                raise PipelineError(f"{path}: not readable as a zip: {reason}") from None
        order = np.argsort(np.frombuffer(hashes, np.int64))
        self._hashes, self._places = (np.frombuffer(part, np.int64)[order].data for part in (hashes, places))
        self._owners = np.frombuffer(owners, np.uint32)[order].data

    def names(self) -> Iterator[str]:
        """The names of all members, folders too, in the order of the directories."""
        return (member.filename for archive in self._zips for _, member in archive.members())

    def read(self, name: str) -> bytes:
        """The bytes of a member, as `Images.read` says. Raises KeyError if there is none of that name."""
        found = []
        for index in range(bisect_left(self._hashes, hash(name)), bisect_right(self._hashes, hash(name))):
            archive = self._zips[self._owners[index]]
            if (member := archive.member(self._places[index])).filename == name:
                found.append((archive, member))
        if not found:
            raise KeyError(name)
        if len(found) > 1:
            raise ValueError("it is there more than once")
        ((archive, member),) = found
        return archive.read(member)


def write_images(path: Path, files: Iterable[tuple[str, bytes]], shard_bytes: int = SHARD_BYTES) -> None:
    """Write named files to a zip; of more than `shard_bytes`, to a folder of zips: `images-00000.zip` and so on.

    In a folder, DVC sends, fetches and repeats each zip by itself, several at a time, and keeps what has not changed.
    """
    written = 0

    def shard(file: tuple[str, bytes]) -> int:
        nonlocal written
        number = written // shard_bytes
        written += len(file[1])
        return number

    folder = path.with_name(f"{path.name}.shards")
    folder.mkdir()
    for number, (_, members) in enumerate(groupby(files, shard)):
        write_zip(folder / f"images-{number:05}.zip", members)
    zips = list(folder.iterdir())
    if len(zips) > 1:
        folder.replace(path)
        return
    if zips:
        zips[0].replace(path)
    else:
        write_zip(path, [])
    folder.rmdir()


def shards(path: Path) -> list[Path]:
    """The zips of a folder that `write_images` has written; none if it is another folder, or no folder."""
    zips = []
    with suppress(OSError), os.scandir(path) as entries:  # no folder, or one whose names may not be listed
        for entry in entries:
            if not (SHARD.fullmatch(entry.name) and entry.is_file()):
                return []
            zips.append(path / entry.name)
    return sorted(zips)


def _allow_open_files() -> None:
    """Let this process have as many files open as its user may allow it, instead of the usual 1024."""
    with suppress(ImportError, OSError, ValueError):  # Windows has no such limit; macOS allows less than it says
        import resource

        _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def _is_clutter(name: str) -> bool:
    return any((part.startswith(".") and part not in (".", "..")) or part in CLUTTER for part in name.split("/"))
