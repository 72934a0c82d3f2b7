"""From the bytes of one image file to its pixels: which files are taken, what becomes of them, and the limits.

MLflow keeps a copy of this file with every registered model, so it imports nothing of the project.
"""

import io
import math
import re
import struct
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageFile, ImageOps, UnidentifiedImageError
from PIL.TiffImagePlugin import TiffImageFile

FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")  # others may start programs, as EPS does
GREY_MODES = ("1", "L", "LA", "La")
LARGEST_PIXELS = 89_478_485  # Pillow's own limit: 256 MiB of RGB
TILE_TAGS = (322, 323)  # TIFF 6.0: width and length of a tile
TURNED = range(5, 9)  # EXIF orientations that swap width and height
EXIF_ORIENTATION = 274
# https://www.w3.org/TR/png-3: a chunk begins with the length of its data and its type, a text with its keyword
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
PNG_CHUNK = struct.Struct(">I4s")
PNG_TEXTS = (b"tEXt", b"zTXt", b"iTXt")
LONGEST_KEYWORD = 80  # with the zero behind it


class Header(NamedTuple):
    """What a file says of its image, without its pixels being decoded."""

    height: int
    width: int
    channels: int  # 1 for grey, 3 for colour


def decode_image(content: bytes, size: tuple[int, int] | None = None, channels: int | None = None) -> np.ndarray:
    """Pixels (C, H, W) uint8 of an image file, C = 1 for grey and 3 for colour.

    Grey, with or without alpha, and black-and-white become grey; palettes, CMYK, YCbCr and LAB become RGB by Pillow's
    conversion, and so do all pictures in GIF and WebP, which have no grey. Alpha is dropped: the colour below it
    counts, whatever shone through. Of an animation the first picture is taken. A picture that its EXIF data says is
    turned is turned upright.
    size: (H, W) to bring the picture to, as `fit` does; a JPEG far larger is decoded at a reduced scale.
    channels: 1 or 3, whatever the file has.
    Raises ValueError, with the reason, for another format, broken data, more than 8 bits a channel, or more than
    LARGEST_PIXELS in the image or a tile of it, which are not decoded.
    """
    with _opened(content) as image:
        is_grey = _is_grey(image)  # before `draft`, which tells other modes
        if size and image.format == "JPEG":
            image.draft(image.mode, (2 * max(size), 2 * max(size)))  # each side at least so long, if it is longer
        ImageOps.exif_transpose(image, in_place=True)
        mode = "L" if channels == 1 or (is_grey and channels is None) else "RGB"
        return _array(fit(image.convert(mode), size) if size else image.convert(mode))


def read_header(content: bytes) -> Header:
    """Size and channels that `decode_image` would give, from the head of the file alone; raises ValueError likewise."""
    with _opened(content) as image:
        width, height = image.size
        # Of a PNG, Pillow unpacks all pixels to look behind them
        if (image.format != "PNG" or _may_be_turned(content)) and image.getexif().get(EXIF_ORIENTATION) in TURNED:
            width, height = height, width
        return Header(height, width, 1 if _is_grey(image) else 3)


def fit(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """Bring an image to (H, W): the largest centred part of that shape, scaled with an antialiasing linear filter.

    An image that has the size stays as it is.
    """
    height, width = size
    if image.size == (width, height):
        return image
    return ImageOps.fit(image, (width, height), Image.Resampling.BILINEAR)


def fit_pixels(pixels: np.ndarray, size: tuple[int, int], channels: int) -> np.ndarray:
    """Pixels (H, W) or (H, W, 3) uint8 as (C, H, W), by the rules of `decode_image`."""
    return _array(fit(Image.fromarray(pixels).convert("L" if channels == 1 else "RGB"), size))


def _array(image: Image.Image) -> np.ndarray:
    pixels = np.array(image)
    return pixels[None] if pixels.ndim == 2 else np.ascontiguousarray(pixels.transpose(2, 0, 1))


@contextmanager
def _opened(content: bytes) -> Iterator[ImageFile.ImageFile]:
    """A file as an image whose pixels are not decoded yet; what goes wrong with it in the block is a ValueError."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what is taken is decided here, not by Pillow's remarks
            with Image.open(io.BytesIO(content), formats=FORMATS) as image:
                if max(image.width * image.height, _tile_pixels(image)) > LARGEST_PIXELS:
                    raise Image.DecompressionBombError
                if image.mode.startswith(("I", "F")) or _is_deep(image):  # Pillow would cut them off, or drop bits
                    raise ValueError("its channels have more than 8 bits; convert it to 8 bits")
                yield image
    except UnidentifiedImageError:
        reason = f"it is none of {', '.join(FORMATS)}, or cut off"
    except Image.DecompressionBombError:
        reason = f"it has more than {LARGEST_PIXELS:,} pixels"
    except Exception as error:  # hostile data makes decoders raise anything
        reason = " ".join(str(error).split()) or type(error).__name__
    else:
        return
    raise ValueError(reason)


def _may_be_turned(png: bytes) -> bool:
    """Whether a PNG has a chunk, before or behind its pixels, that may hold an orientation: of EXIF, or of XMP."""
    place = len(PNG_SIGNATURE)
    while place + PNG_CHUNK.size <= len(png):
        length, kind = PNG_CHUNK.unpack_from(png, place)
        start = place + PNG_CHUNK.size
        keyword = png[start : start + min(length, LONGEST_KEYWORD)].partition(b"\0")[0]
        if kind == b"eXIf" or (kind in PNG_TEXTS and (b"exif" in keyword or b"xmp" in keyword)):
            return True
        place = start + length + 4  # behind the checksum
    return False


def _is_grey(image: ImageFile.ImageFile) -> bool:
    return image.mode in GREY_MODES and image.format != "GIF"  # Pillow takes some of its palettes for grey


def _tile_pixels(image: ImageFile.ImageFile) -> int:
    """The pixels of one tile of a TIFF, which is unpacked whole, however small the image is; 0 if it has none."""
    return math.prod(image.tag_v2.get(tag, 0) for tag in TILE_TAGS) if isinstance(image, TiffImageFile) else 0


def _is_deep(image: ImageFile.ImageFile) -> bool:
    """Whether the file has more than 8 bits a channel although Pillow's mode does not tell."""
    for *_, arguments in image.tile:  # the decoder's: the layout of the file's pixels such as RGB;16B, and more
        if re.search(r"(?<!BGR);16", str(arguments)):  # BGR;16 has 5 or 6 bits a channel
            return True
        if image.format == "PPM" and isinstance(arguments, tuple) and arguments[-1] > 255:  # the highest value
            return True
    return False
