"""PNG files: the same bytes everywhere, readable by everyone, and quick to read back."""

import hashlib
import io
import tracemalloc
import zlib

import numpy as np
import pytest
from hostile import png
from PIL import Image

from classifier.data.png import decode_stored_png, decode_stored_pngs, encode_png

# MD5 of the PNG of `ramp()`. If it changes, data/images.zip changes for everyone.
RAMP_MD5 = "628ca7b2872ee25b2c704fffec1e480a"

SHAPES = [(28, 28), (1, 1), (5, 300), (28, 28, 3), (7, 1, 3), (300, 300), (255, 257), (200, 333, 3)]


def noise(shape: tuple[int, ...]) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def ramp() -> np.ndarray:
    return (np.arange(28 * 28) % 256).astype(np.uint8).reshape(28, 28)


def saved(image: np.ndarray, kind: str, mode: str | None = None) -> bytes:
    """The file that Pillow makes of an image."""
    file = io.BytesIO()
    picture = Image.fromarray(image)
    (picture.convert(mode) if mode else picture).save(file, kind)
    return file.getvalue()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_round_trip_and_pillow_agree(shape: tuple[int, ...]) -> None:
    image = noise(shape)
    content = encode_png(image)
    decoded = decode_stored_png(content)
    assert decoded is not None
    assert decoded.dtype == np.uint8
    assert np.array_equal(decoded, image[None] if image.ndim == 2 else image.transpose(2, 0, 1))
    with Image.open(io.BytesIO(content)) as picture:
        assert picture.mode == ("L" if image.ndim == 2 else "RGB")
        assert np.array_equal(np.asarray(picture), image)


@pytest.mark.parametrize("width", [65_533, 65_534, 65_535, 2 * 65_535 - 1, 2 * 65_535])
def test_block_limits_of_deflate(width: int) -> None:
    """A row of `width` pixels and its filter byte end just before, at and after a stored block's 65,535 bytes."""
    image = noise((1, width))
    content = encode_png(image)
    decoded = decode_stored_png(content)
    assert decoded is not None
    assert np.array_equal(decoded[0], image)
    with Image.open(io.BytesIO(content)) as picture:
        assert np.array_equal(np.asarray(picture), image)


def test_bytes_are_pinned() -> None:
    assert hashlib.md5(encode_png(ramp()), usedforsecurity=False).hexdigest() == RAMP_MD5
    columns = np.asfortranarray(ramp())  # the same pixels in another memory order
    assert encode_png(columns) == encode_png(ramp())


@pytest.mark.parametrize(
    "content",
    [
        saved(ramp(), "PNG"),
        saved(noise((28, 28, 3)), "PNG"),
        saved(ramp(), "PNG", "P"),
        saved(ramp(), "PNG", "1"),
        saved(noise((8, 8, 4)), "PNG"),
        saved(ramp().astype(np.uint16), "PNG"),
        saved(ramp(), "JPEG"),
        b"",
        b"\x89PNG\r\n\x1a\n",
        bytes(1000),
        noise((5000,)).tobytes(),
    ],
    ids=["png", "png-rgb", "png-palette", "png-1bit", "png-rgba", "png-16bit", "jpeg", "empty", "signature", "0", "?"],
)
def test_other_files_are_left_to_pillow(content: bytes) -> None:
    assert decode_stored_png(content) is None


def test_truncated_at_any_byte() -> None:
    content = encode_png(noise((9, 9)))
    for length in range(len(content)):
        assert decode_stored_png(content[:length]) is None, length


def test_changed_pixels_are_noticed() -> None:
    """The checksum of the pixel data is checked: a flipped bit in it never gives other pixels."""
    content = encode_png(noise((9, 9)))
    start, end = content.index(b"IDAT") + 4, content.index(b"IEND") - 8
    for position in range(start + 2, end):
        flipped = bytearray(content)
        flipped[position] ^= 1
        assert decode_stored_png(bytes(flipped)) is None, position


def one_by_one(contents: list[bytes]) -> np.ndarray:
    decoded = [pixels for content in contents if (pixels := decode_stored_png(content)) is not None]
    assert len(decoded) == len(contents)
    return np.stack(decoded)


@pytest.mark.parametrize("shape", [(1, 1), (28, 28), (9, 5, 3), (147, 147, 3)])
def test_many_at_once_are_as_one_by_one(shape: tuple[int, ...]) -> None:
    contents = [encode_png(noise((2, *shape))[number]) for number in (0, 1, 0)]
    pixels = decode_stored_pngs(contents)
    assert pixels is not None
    assert np.array_equal(pixels, one_by_one(contents))


@pytest.mark.parametrize("position", range(len(encode_png(noise((3, 3))))))
def test_a_flipped_bit_in_one_of_many_is_noticed(position: int) -> None:
    content = encode_png(noise((3, 3)))
    flipped = bytearray(content)
    flipped[position] ^= 1
    pixels = decode_stored_pngs([content, bytes(flipped), content])
    if content.index(b"IEND") - 8 <= position < content.index(b"IEND") - 4:  # zlib has a checksum of the data too
        assert pixels is not None
        assert np.array_equal(pixels, one_by_one([content] * 3))
    else:
        assert pixels is None


@pytest.mark.parametrize(
    "other", [encode_png(noise((4, 4))), saved(ramp(), "PNG"), b""], ids=["shape", "kind", "empty"]
)
def test_many_of_which_one_is_another_are_left_to_one_by_one(other: bytes) -> None:
    content = encode_png(noise((3, 3)))
    assert decode_stored_pngs([content, other]) is None
    assert decode_stored_pngs([other, content]) is None


def test_of_large_images_no_more_than_one_is_read() -> None:
    contents = iter([encode_png(noise((148, 148, 3))), b"another"])
    assert decode_stored_pngs(contents) is None
    assert next(contents) == b"another"


def crafted(width: int, height: int, deflated: bytes) -> bytes:
    """A grey PNG of the size and pixel data as given."""
    return png(width, height, 8, 0, deflated)


def test_no_memory_is_taken_on_the_word_of_a_header() -> None:
    """40,000 x 40,000 pixels in a few kilobytes; and data of the right length that unpacks to a hundred times that."""
    few = zlib.compress(bytes(10**6), 9)
    stored = len(encode_png(np.zeros((500, 500), np.uint8))) - len(crafted(0, 0, b""))
    bomb = zlib.compress(bytes(100 * stored), 9).ljust(stored, b"\0")
    assert len(bomb) == stored
    tracemalloc.start()
    try:
        assert decode_stored_png(crafted(500, 500, bomb)) is None
        assert decode_stored_png(crafted(40_000, 40_000, few)) is None
        assert decode_stored_png(crafted(2**32 - 1, 2**32 - 1, few)) is None
        assert tracemalloc.get_traced_memory()[1] < 5 * 10**6
    finally:
        tracemalloc.stop()


def test_many_of_which_one_has_a_row_filter_are_left_to_one_by_one() -> None:
    plain, filtered = (crafted(2, 1, zlib.compress(bytes([filter_type, 7, 7]), 0)) for filter_type in (0, 1))
    assert len(plain) == len(filtered)
    pixels = decode_stored_pngs([plain, plain])
    assert pixels is not None
    assert pixels.tolist() == [[[[7, 7]]]] * 2
    assert decode_stored_pngs([plain, filtered]) is None


@pytest.mark.parametrize(("width", "height"), [(0, 0), (0, 5), (5, 0)])
def test_no_pixels_are_left_to_pillow(width: int, height: int) -> None:
    assert decode_stored_png(crafted(width, height, zlib.compress(bytes(height), 0))) is None
