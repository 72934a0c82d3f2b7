"""Images in a folder or in a zip of one, read alike; and the zip that `annotate` writes.

One zip of stored members instead of 70,000 files: DVC's cost grows with the number of files.
"""

import os
import stat
import zipfile
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from classifier.errors import PipelineError

# The earliest date that a zip can hold; a real one would make the bytes differ from run to run.
ZIP_EPOCH = (1980, 1, 1, 0, 0, 0)
LARGEST_FILE = 256 * 2**20  # bytes of one unpacked file; checked before it is read
IMAGE_SUFFIXES = frozenset(
    (".bmp", ".gif", ".jfif", ".jpe", ".jpeg", ".jpg", ".pbm", ".pgm", ".png", ".pnm", ".ppm", ".tif", ".tiff", ".webp")
)
# What systems and their archivers put beside a user's files; and names that begin with a dot
CLUTTER = frozenset(("__MACOSX", "Thumbs.db", "desktop.ini"))
COMPRESSIONS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)  # Python unpacks the others without a limit


class Images:
    """The files of an image folder, or of a zip of one, by name.

    A zip is opened once in each process, because processes that share an open file share its position.
    Raises PipelineError if the path is missing, or neither a folder nor a zip.
    """

    def __init__(self, path: Path) -> None:
        if not os.path.exists(path):  # noqa: PTH110, pathlib raises an error for folders that may not be entered
            raise PipelineError(f"{path}: no such image folder or zip; `dvc repro` makes data/images.zip")
        self.path = path
        self._is_folder = path.is_dir()
        self._zips: dict[int, zipfile.ZipFile] = {}
        if self._is_folder:
            self._root = os.path.join(os.path.realpath(path), "")  # noqa: PTH118, with the separator at its end
        elif not path.is_file():
            raise PipelineError(f"{path}: neither a folder nor a zip")
        else:
            names = Counter(self._zip().namelist())
            self._repeated = {name for name, count in names.items() if count > 1}

    def read(self, name: str) -> bytes:
        """The bytes of one file of at most LARGEST_FILE bytes.

        In a folder it must be a regular file; symbolic links are followed as long as they do not lead out of it. In a
        zip it must be there once, not encrypted, no symbolic link, and stored or deflated, with the right checksum.
        Raises PipelineError, naming the file, if not.
        """
        try:
            return self._read_file(name) if self._is_folder else self._read_member(name)
        except (KeyError, FileNotFoundError):
            raise PipelineError(f"{name} is missing in {self.path}") from None
        except Exception as error:  # hostile archives make zipfile raise anything
            reason = getattr(error, "strerror", None) or " ".join(str(error).split()) or type(error).__name__
            raise PipelineError(f"{name} in {self.path} is not readable: {reason}") from None

    def names(self) -> list[str]:
        """The names of all files, sorted, without hidden ones and CLUTTER.

        Raises PipelineError for a symbolic link to a folder, which is not followed.
        """
        return sorted(name for name in self._all_names() if not _is_clutter(name))

    def _all_names(self) -> list[str]:
        if not self._is_folder:
            return [name for name in self._zip().namelist() if not name.endswith("/")]
        found = []

        def refuse(error: OSError) -> None:  # or such a folder would be passed over
            raise PipelineError(f"{error.filename}: not readable: {error.strerror}")

        for folder, subfolders, files in os.walk(self._root, onerror=refuse):
            if links := [name for name in subfolders if os.path.islink(os.path.join(folder, name))]:  # noqa: PTH114, PTH118
                path = Path(folder, links[0])
                raise PipelineError(f"{path}: a symbolic link to a folder; put the folder itself there")
            inner = folder[len(self._root) :]
            found += [os.path.join(inner, name) for name in files]  # noqa: PTH118, a million of them
        return [name.replace(os.sep, "/") for name in found]

    def _read_file(self, name: str) -> bytes:
        path = Path(os.path.realpath(self.path / name, strict=True))
        if not f"{path}".startswith(self._root):
            raise ValueError("it leads out of the image folder")
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):  # reading a pipe would wait for ever
            raise ValueError("it is not a regular file")
        _check_size(status.st_size)
        return path.read_bytes()

    def _read_member(self, name: str) -> bytes:
        archive = self._zip()
        member = archive.getinfo(name)
        if name in self._repeated:
            raise ValueError("it is there more than once")
        if member.is_dir() or stat.S_ISLNK(member.external_attr >> 16):
            raise ValueError("it is a folder or a symbolic link")
        if member.compress_type not in COMPRESSIONS:
            raise ValueError("it is neither stored nor deflated; zip it anew")
        _check_size(member.file_size)
        with archive.open(member) as file:
            content = file.read(member.file_size)  # with a limit: it may unpack to more than it declares
        if len(content) != member.file_size:
            raise ValueError(f"cut off after {len(content)} of {member.file_size} bytes")
        return content

    def _zip(self) -> zipfile.ZipFile:
        process = os.getpid()
        if process not in self._zips:
            try:
                self._zips[process] = zipfile.ZipFile(self.path)
            except Exception as error:  # hostile archives make zipfile raise anything
                reason = " ".join(str(error).split()) or type(error).__name__
                raise PipelineError(f"{self.path}: not readable as a zip: {reason}") from None
        return self._zips[process]

    def __getstate__(self) -> dict[str, Path]:
        return {"path": self.path}  # open files do not travel to worker processes

    def __setstate__(self, state: dict[str, Path]) -> None:
        self.__init__(state["path"])  # type: ignore[misc]


def _is_clutter(name: str) -> bool:
    return any((part.startswith(".") and part not in (".", "..")) or part in CLUTTER for part in name.split("/"))


def _check_size(size: int) -> None:
    if size > LARGEST_FILE:
        raise ValueError(f"its {size:,} bytes are more than {LARGEST_FILE:,}")


def write_zip(path: Path, files: Iterable[tuple[str, bytes]]) -> None:
    """Write named files to a zip whose bytes depend on the names, contents and order alone."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for name, content in files:
            member = zipfile.ZipInfo(name, date_time=ZIP_EPOCH)
            member.create_system = 3  # Unix, on every system
            member.external_attr = 0o644 << 16
            archive.writestr(member, content)
