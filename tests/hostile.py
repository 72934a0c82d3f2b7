"""A pickle that runs code, as strangers' files may be."""

import os
from collections.abc import Callable
from pathlib import Path


class RunsCodeWhenUnpickled:
    """Makes the folder `path` when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[[str, int], object], tuple[str, int]]:
        return os.mkdir, (str(self.path), 0o777)
