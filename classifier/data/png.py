"""PNG files whose bytes are the same on every machine, and a quick way to read them back."""

import struct
import zlib
from collections.abc import Iterable

import numpy as np

SIGNATURE = b"\x89PNG\r\n\x1a\n"
COLOUR_TYPES = {0: 1, 2: 3}  # PNG's number for grey and RGB: channels
END = b"\0\0\0\0IEND\xae\x42\x60\x82"  # the last chunk, of no bytes, with its checksum
LARGEST_BLOCK = 0xFFFF  # bytes that a block of stored data can hold
START = 41 + 2 + 5  # where the first block's data starts: behind the chunks' heads, zlib's header and the block's own


def encode_png(image: np.ndarray) -> bytes:
    """Encode (H, W) grey or (H, W, 3) RGB uint8 pixels as a PNG whose bytes are the same on every machine.

    The pixel data is stored, not compressed: what zlib, and the faster libraries in its place, make of the
    same input differs between versions and processors, and would make the data look changed. PNG and
    deflate: RFC 2083 and RFC 1950/1951.
    """
    height, width = image.shape[:2]
    colour = 0 if image.ndim == 2 else 2
    rows = np.zeros((height, 1 + image[0].size), np.uint8)  # every row starts with its filter type, 0 = none
    rows[:, 1:] = image.reshape(height, -1)
    pixels = rows.tobytes()

    deflated = bytearray(b"\x78\x01")
    for start in range(0, len(pixels), LARGEST_BLOCK):
        block = pixels[start : start + LARGEST_BLOCK]
        last = start + LARGEST_BLOCK >= len(pixels)
        deflated += struct.pack("<BHH", last, len(block), len(block) ^ 0xFFFF) + block
    deflated += struct.pack(">I", zlib.adler32(pixels))

    header = struct.pack(">IIBBBBB", width, height, 8, colour, 0, 0, 0)
    return SIGNATURE + _chunk(b"IHDR", header) + _chunk(b"IDAT", bytes(deflated)) + END


def decode_stored_png(content: bytes) -> np.ndarray | None:
    """Pixels (C, H, W) uint8 of a PNG that `encode_png` wrote, or None for any other file.

    It spares most of the time that a decoder for every kind of image takes. No more memory is taken than the size of
    the file warrants, whatever its header claims.
    """
    if content[:16] != SIGNATURE + b"\0\0\0\x0dIHDR" or content[37:41] != b"IDAT":
        return None
    width, height, depth, colour, *methods = struct.unpack_from(">IIBBBBB", content, 16)
    if depth != 8 or colour not in COLOUR_TYPES or methods != [0, 0, 0]:
        return None
    channels = COLOUR_TYPES[colour]
    size = height * (1 + width * channels)
    length = 2 + size + 5 * -(-size // LARGEST_BLOCK) + 4  # as deflated by encode_png
    if width == 0 or height == 0 or len(content) != 41 + length + 4 + len(END) or not content.endswith(END):
        return None
    if content[33:37] != struct.pack(">I", length):
        return None
    inflater = zlib.decompressobj()
    try:
        pixels = np.frombuffer(inflater.decompress(content[41 : 41 + length], size + 1), np.uint8)
    except zlib.error:
        return None
    if pixels.size != size or not inflater.eof or inflater.unused_data:
        return None
    rows = pixels.reshape(height, 1 + width * channels)
    if rows[:, 0].any():  # a row filter that encode_png does not use
        return None
    return rows[:, 1:].reshape(height, width, channels).transpose(2, 0, 1)


def decode_stored_pngs(contents: Iterable[bytes]) -> np.ndarray | None:
    """Pixels (N, C, H, W) uint8 of N >= 1 PNGs that `encode_png` wrote of small images of one shape, else None.

    All at once: one after another, small images take more of Python's time than of zlib's. Small is what fits into a
    block of stored data, 147 x 147 pixels in colour; where the first is no such file, the others are not asked for.
    """
    remaining = iter(contents)
    content = next(remaining)
    first = decode_stored_png(content) if len(content) <= LARGEST_BLOCK else None
    if first is None:
        return None
    channels, height, width = first.shape
    size = height * (1 + width * channels)
    together = [content, *remaining]
    if any(len(each) != len(content) for each in together):
        return None
    files = np.frombuffer(b"".join(together), np.uint8).reshape(len(together), -1)
    before, data, checksums, after = np.split(files, [START, START + size, START + size + 4], axis=1)
    after = after[:, 4:]  # PNG's own checksum of the data is for those who do not check zlib's
    if (before != before[0]).any() or (after != after[0]).any():
        return None
    expected = np.ascontiguousarray(checksums).view(">u4").ravel().tolist()
    if list(map(zlib.adler32, data)) != expected:
        return None
    rows = data.reshape(len(files), height, 1 + width * channels)
    if rows[:, :, 0].any():  # a row filter that encode_png does not use
        return None
    return rows[:, :, 1:].reshape(len(files), height, width, channels).transpose(0, 3, 1, 2)


def _chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
