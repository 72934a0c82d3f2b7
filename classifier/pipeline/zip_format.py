"""The zip format: members read with little memory, and zips written whose bytes can be reproduced."""

import io
import os
import shutil
import stat
import struct
import tempfile
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path

# The earliest date that a zip can hold, 1 January 1980; a real one would make the bytes differ from run to run.
ZIP_EPOCH = 1 << 5 | 1
ZIP_VERSION, ZIP64_VERSION = 20, 45  # of the format, times ten, that a reader needs
UNIX = 3  # where a file is from, on every system
LARGEST_FILE = 256 * 2**20  # bytes of one unpacked file; checked before it is read
COMPRESSIONS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)  # Python unpacks the others without a limit
LARGEST_PACKED = LARGEST_FILE + LARGEST_FILE // 1024  # deflate adds 5 bytes to a block of 65,535 that it cannot shrink

# The records of a zip: APPNOTE.TXT of PKWARE, 6.3.10, sections 4.3.7, 4.3.12 and 4.3.14 to 4.3.16
LOCAL = struct.Struct("<4s5H3I2H")
MEMBER = struct.Struct("<4s6H3I5H2I")
END = struct.Struct("<4s4H2IH")
END64_LOCATOR = struct.Struct("<4sIQI")
END64 = struct.Struct("<4sQ2H2I4Q")
LONGEST_COMMENT = 0xFFFF
NEWEST_VERSION = 63  # times ten, of the format
ENCRYPTED, PATCHED, STRONGLY_ENCRYPTED, IS_UTF8 = 0x1, 0x20, 0x40, 0x800
LONGEST_RECORD = MEMBER.size + 3 * 0xFFFF  # bytes: with name, extra field and comment
USUAL_RECORD = 256
READ_AHEAD = 1 << 20  # bytes of a directory that are read at a time
LARGEST_IN_MEMORY = 1 << 24  # bytes of a directory; a longer one is kept in a file until it can be written


class Zip:
    """A zip of which nothing is kept in memory: members are known by the place of their record in its directory.

    The directory is at the file's end. Reading moves no position in the file, so threads and forked processes share it.
    Raises zipfile.BadZipFile, or whatever else a hostile directory leads to.
    """

    def __init__(self, path: Path) -> None:
        self._file = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
        self._start, self._end, self._shift = self._find_directory(os.fstat(self._file).st_size)

    def __del__(self) -> None:
        if hasattr(self, "_file"):
            os.close(self._file)

    def members(self) -> Iterator[tuple[int, zipfile.ZipInfo]]:
        """Each member with the place of its record; the directory is read piece by piece."""
        place, piece, piece_start = self._start, b"", self._start
        while place < self._end:
            if place + LONGEST_RECORD > piece_start + len(piece) < self._end:
                piece_start = place
                piece = os.pread(self._file, min(READ_AHEAD, self._end - place), place)
                if not piece:
                    raise zipfile.BadZipFile("Truncated central directory")
            member, length = self._parsed(piece, place - piece_start)
            yield place, member
            place += length

    def member(self, place: int) -> zipfile.ZipInfo:
        """The member whose record is at this place."""
        content = os.pread(self._file, min(USUAL_RECORD, self._end - place), place)
        if len(content) == USUAL_RECORD and MEMBER.size + sum(MEMBER.unpack_from(content)[10:12]) > USUAL_RECORD:
            content = os.pread(self._file, min(LONGEST_RECORD, self._end - place), place)
        return self._parsed(content, 0)[0]

    def read(self, member: zipfile.ZipInfo) -> bytes:
        """The bytes of a member: no folder or link, not encrypted, stored or deflated, with the right checksum.

        Raises an error that says what is wrong with it, if something is.
        """
        if member.is_dir() or stat.S_ISLNK(member.external_attr >> 16):
            raise ValueError("it is a folder or a symbolic link")
        if member.compress_type not in COMPRESSIONS:
            raise ValueError("it is neither stored nor deflated; zip it anew")
        check_size(member.file_size)
        if member.compress_size > LARGEST_PACKED:
            raise ValueError(f"its {member.compress_size:,} packed bytes are more than {LARGEST_PACKED:,}")
        packed = os.pread(self._file, member.compress_size, self._start_of(member))
        if member.compress_type == zipfile.ZIP_STORED and len(packed) == member.file_size == member.compress_size:
            if zlib.crc32(packed) != member.CRC:
                raise zipfile.BadZipFile(f"Bad CRC-32 for file {member.orig_filename!r}")
            return packed
        with zipfile.ZipExtFile(io.BytesIO(packed), "r", member) as file:  # which checks the checksum
            content = file.read(member.file_size)  # with a limit: it may unpack to more than it declares
        if len(content) != member.file_size:
            raise ValueError(f"cut off after {len(content)} of {member.file_size} bytes")
        return content

    def _start_of(self, member: zipfile.ZipInfo) -> int:
        """Where a member's bytes start: behind a record of its own, which must be of the same name."""
        header = os.pread(self._file, USUAL_RECORD, member.header_offset) if member.header_offset >= 0 else b""
        if len(header) < LOCAL.size:
            raise zipfile.BadZipFile("Truncated file header")
        signature, _, flags, *_, name_length, extra_length = LOCAL.unpack_from(header)
        if signature != b"PK\3\4":
            raise zipfile.BadZipFile("Bad magic number for file header")
        if member.flag_bits & PATCHED:
            raise NotImplementedError("compressed patched data (flag bit 5)")
        if member.flag_bits & STRONGLY_ENCRYPTED:
            raise NotImplementedError("strong encryption (flag bit 6)")
        name = header[LOCAL.size : LOCAL.size + name_length]
        if len(name) < name_length:
            name = os.pread(self._file, name_length, member.header_offset + LOCAL.size)
        if _decoded(name, flags) != member.orig_filename:
            raise zipfile.BadZipFile(f"File name in directory {member.orig_filename!r} and header {name!r} differ.")
        if member.flag_bits & ENCRYPTED:
            raise RuntimeError("it is encrypted; zip it anew without a password")
        start: int = member.header_offset + LOCAL.size + name_length + extra_length
        return start

    def _find_directory(self, size: int) -> tuple[int, int, int]:
        """Where the directory starts and ends, and by how much the file is longer than its places say.

        As bytes in front of a zip do; places are counted from its own first byte.
        """
        tail_start = max(size - END.size - LONGEST_COMMENT, 0)
        tail = os.pread(self._file, size - tail_start, tail_start)
        # A comment may hold the signature, but none is there mostly
        place = len(tail) - END.size
        if place < 0 or tail[place : place + 4] != b"PK\5\6" or tail[-2:] != b"\0\0":
            place = tail.rfind(b"PK\5\6")
        if place < 0 or len(tail) - place < END.size:
            raise zipfile.BadZipFile("File is not a zip file")
        *_, length, start, _ = END.unpack_from(tail, place)
        end = tail_start + place
        locator_start = end - END64_LOCATOR.size
        locator = os.pread(self._file, END64_LOCATOR.size, locator_start) if locator_start >= 0 else b""
        if locator[:4] == b"PK\6\7":
            _, disk, _, disks = END64_LOCATOR.unpack(locator)
            if disk != 0 or disks > 1:
                raise zipfile.BadZipFile("zipfiles that span multiple disks are not supported")
            record_start = locator_start - END64.size
            record = os.pread(self._file, END64.size, record_start) if record_start >= 0 else b""
            if record[:4] == b"PK\6\6":
                *_, length, start = END64.unpack(record)
                end = record_start
        if end < length:
            raise zipfile.BadZipFile("Bad offset for central directory")
        return end - length, end, end - length - start

    def _parsed(self, content: bytes, start: int) -> tuple[zipfile.ZipInfo, int]:
        """The member whose record starts there, and the record's length."""
        if len(content) - start < MEMBER.size:
            raise zipfile.BadZipFile("Truncated central directory")
        (signature, _, version, flags, compression, _, _, checksum, packed, size, name_length, extra_length,
         comment_length, _, _, attributes, offset) = MEMBER.unpack_from(content, start)  # fmt: skip
        if signature != b"PK\1\2":
            raise zipfile.BadZipFile("Bad magic number for central directory")
        if version > NEWEST_VERSION:
            raise NotImplementedError(f"zip file version {version / 10:.1f}")
        start += MEMBER.size
        member = zipfile.ZipInfo(_decoded(content[start : start + name_length], flags))
        member.flag_bits, member.compress_type, member.CRC, member.external_attr = (
            flags, compression, checksum, attributes
        )  # fmt: skip
        extra = content[start + name_length : start + name_length + extra_length]
        member.file_size, member.compress_size, offset = _long_sizes(extra, size, packed, offset)
        member.header_offset = offset + self._shift
        return member, MEMBER.size + name_length + extra_length + comment_length


def _decoded(name: bytes, flags: int) -> str:
    """A name in UTF-8, also where no flag says so, as in the zips of macOS and of Info-ZIP; else as zip began."""
    try:
        return name.decode("utf-8")
    except UnicodeDecodeError:
        if flags & IS_UTF8:
            raise
        return name.decode("cp437")


def _long_sizes(extra: bytes, size: int, packed: int, offset: int) -> tuple[int, int, int]:
    """Sizes and offset as the extra field has them where they need 64 bits, section 4.5.3."""
    numbers = [size, packed, offset]
    while len(extra) >= 4:
        kind, length = struct.unpack_from("<2H", extra)
        if 4 + length > len(extra):
            raise zipfile.BadZipFile(f"Corrupt extra field {kind:04x} (size={length})")
        if kind == 1:
            data = extra[4 : 4 + length]
            for place, number in enumerate(numbers):
                if number == 0xFFFFFFFF:
                    if len(data) < 8:
                        raise zipfile.BadZipFile("Corrupt zip64 extra field.")
                    numbers[place] = int.from_bytes(data[:8], "little")
                    data = data[8:]
        extra = extra[4 + length :]
    size, packed, offset = numbers
    return size, packed, offset


def check_size(size: int) -> None:
    """Raise ValueError for a file that is larger than any image is."""
    if size > LARGEST_FILE:
        raise ValueError(f"its {size:,} bytes are more than {LARGEST_FILE:,}")


def write_zip(path: Path, files: Iterable[tuple[str, bytes]]) -> None:
    """Write named files, of 2 GB at most each, to a zip whose bytes depend on the names, contents and order alone.

    The same bytes as Python's `zipfile` writes, which keeps half a KiB of memory for each member.
    """
    with (
        path.open("wb") as archive,
        tempfile.SpooledTemporaryFile(max_size=LARGEST_IN_MEMORY, dir=str(path.parent)) as directory,
    ):
        count = start = 0
        for name, content in files:
            encoded, flags = (name.encode(), 0) if name.isascii() else (name.encode(), IS_UTF8)
            about = (
                flags,
                zipfile.ZIP_STORED,
                0,
                ZIP_EPOCH,
                zlib.crc32(content),
                len(content),
                len(content),
                len(encoded),
            )
            archive.write(LOCAL.pack(b"PK\3\4", ZIP_VERSION, *about, 0) + encoded)
            archive.write(content)
            extra = struct.pack("<2HQ", 1, 8, start) if start > zipfile.ZIP64_LIMIT else b""
            version = ZIP64_VERSION if extra else ZIP_VERSION
            made_by, offset = UNIX << 8 | version, 0xFFFFFFFF if extra else start
            directory.write(
                MEMBER.pack(b"PK\1\2", made_by, version, *about, len(extra), 0, 0, 0, 0o644 << 16, offset)
                + encoded + extra
            )  # fmt: skip
            count, start = count + 1, start + LOCAL.size + len(encoded) + len(content)
        length = directory.tell()
        directory.seek(0)
        shutil.copyfileobj(directory, archive)
        if count > 0xFFFF or max(start, length) > zipfile.ZIP64_LIMIT:
            archive.write(
                END64.pack(b"PK\6\6", END64.size - 12, ZIP64_VERSION, ZIP64_VERSION, 0, 0, count, count, length, start)
            )
            archive.write(END64_LOCATOR.pack(b"PK\6\7", 0, start + length, 1))
        count, length, start = min(count, 0xFFFF), min(length, 0xFFFFFFFF), min(start, 0xFFFFFFFF)
        archive.write(END.pack(b"PK\5\6", 0, 0, count, count, length, start, 0))
