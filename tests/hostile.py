"""Files as strangers' may be: a pickle that runs code, PNGs made by hand, and what is no file of weights."""

import os
import struct
import zlib
from collections.abc import Callable
from pathlib import Path


class RunsCodeWhenUnpickled:
    """Makes the folder `path` when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[[str, int], object], tuple[str, int]]:
        return os.mkdir, (str(self.path), 0o777)


def png_chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(width: int, height: int, depth: int, colour: int, deflated: bytes) -> bytes:
    """A PNG of the size and pixel data as given; `deflated` with the filter bytes."""
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    parts = png_chunk(b"IHDR", header), png_chunk(b"IDAT", deflated), png_chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def write_text(path: Path) -> None:
    path.write_text("these are not weights")


def write_nothing(path: Path) -> None:
    path.write_bytes(b"")


def halve(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
