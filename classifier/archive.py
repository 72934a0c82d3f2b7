"""Images in a folder or in a zip of one, read alike; and the zip that `annotate` writes.

One zip of stored members instead of 70,000 files: DVC's cost grows with the number of files.
"""

import os
import zipfile
import zlib
from collections.abc import Iterable
from pathlib import Path

from classifier.errors import PipelineError

# The earliest date that a zip can hold; a real one would make the bytes differ from run to run.
ZIP_EPOCH = (1980, 1, 1, 0, 0, 0)


class Images:
    """The files of an image folder, or of a zip of one, by name.

    A zip is opened once in each process, because processes that share an open file share its position.
    """

    def __init__(self, path: Path) -> None:
        if not path.exists():
            raise PipelineError(f"{path}: no such image folder or zip; `dvc repro` makes data/images.zip")
        self.path = path
        self._is_folder = path.is_dir()
        self._zips: dict[int, zipfile.ZipFile] = {}

    def read(self, name: str) -> bytes:
        """The bytes of one file. Raises PipelineError if it is missing or its checksum is wrong."""
        try:
            if self._is_folder:
                return (self.path / name).read_bytes()
            return self._zip().read(name)
        except (KeyError, FileNotFoundError):
            raise PipelineError(f"{self.path}: has no file {name}, which the annotations name") from None
        except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError, OSError) as error:  # RuntimeError: encrypted
            raise PipelineError(f"{self.path}: {name} is not readable: {error}") from None

    def _zip(self) -> zipfile.ZipFile:
        process = os.getpid()
        if process not in self._zips:
            self._zips[process] = zipfile.ZipFile(self.path)
        return self._zips[process]

    def __getstate__(self) -> dict[str, Path]:
        return {"path": self.path}  # open files do not travel to worker processes

    def __setstate__(self, state: dict[str, Path]) -> None:
        self.__init__(state["path"])  # type: ignore[misc]


def write_zip(path: Path, files: Iterable[tuple[str, bytes]]) -> None:
    """Write named files to a zip whose bytes depend on the names, contents and order alone."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for name, content in files:
            member = zipfile.ZipInfo(name, date_time=ZIP_EPOCH)
            member.create_system = 3  # Unix, on every system
            member.external_attr = 0o644 << 16
            archive.writestr(member, content)
