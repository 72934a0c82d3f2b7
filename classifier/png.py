"""PNG files whose bytes are the same on every machine, and a quick way to read them back."""

import struct
import zlib

import numpy as np

SIGNATURE = b"\x89PNG\r\n\x1a\n"
COLOUR_TYPES = {0: 1, 2: 3}  # PNG's number for grey and RGB: channels


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
    for start in range(0, len(pixels), 0xFFFF):  # a stored block holds at most 65,535 bytes
        block = pixels[start : start + 0xFFFF]
        last = start + 0xFFFF >= len(pixels)
        deflated += struct.pack("<BHH", last, len(block), len(block) ^ 0xFFFF) + block
    deflated += struct.pack(">I", zlib.adler32(pixels))

    header = struct.pack(">IIBBBBB", width, height, 8, colour, 0, 0, 0)
    return SIGNATURE + _chunk(b"IHDR", header) + _chunk(b"IDAT", bytes(deflated)) + _chunk(b"IEND", b"")


def decode_stored_png(content: bytes) -> np.ndarray | None:
    """Pixels (C, H, W) uint8 of a PNG that `encode_png` wrote, or None for any other file.

    It spares most of the time that a decoder for every kind of image takes.
    """
    if content[:8] != SIGNATURE or content[12:16] != b"IHDR" or content[37:41] != b"IDAT":
        return None
    width, height, depth, colour, *methods = struct.unpack_from(">IIBBBBB", content, 16)
    if depth != 8 or colour not in COLOUR_TYPES or methods != [0, 0, 0]:
        return None
    (length,) = struct.unpack_from(">I", content, 33)
    if content[41 + length + 8 : 41 + length + 12] != b"IEND":
        return None
    channels = COLOUR_TYPES[colour]
    try:
        pixels = np.frombuffer(zlib.decompress(content[41 : 41 + length]), np.uint8)
    except zlib.error:
        return None
    if pixels.size != height * (1 + width * channels):
        return None
    rows = pixels.reshape(height, 1 + width * channels)
    if rows[:, 0].any():  # a row filter that encode_png does not use
        return None
    return rows[:, 1:].reshape(height, width, channels).transpose(2, 0, 1)


def _chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
