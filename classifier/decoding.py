"""From the bytes of one image file to its pixels: which files are taken, what becomes of them, and the limits."""

import io
import math
import re
import warnings

import numpy as np
from PIL import Image, ImageFile, ImageOps, UnidentifiedImageError
from PIL.TiffImagePlugin import TiffImageFile

from classifier.errors import PipelineError
from classifier.png import decode_stored_png

FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")  # others may start programs, as EPS does
GREY_MODES = ("1", "L", "LA", "La")
LARGEST_PIXELS = 89_478_485  # Pillow's own limit: 256 MiB of RGB
TILE_TAGS = (322, 323)  # TIFF 6.0: width and length of a tile


def decode_image(content: bytes, name: str) -> np.ndarray:
    """Pixels (C, H, W) uint8 of an image file, C = 1 for grey and 3 for colour.

    Grey, with or without alpha, and black-and-white become grey; palettes, CMYK, YCbCr and LAB become RGB by Pillow's
    conversion, and so do all pictures in GIF and WebP, which have no grey. Alpha is dropped: the colour below it
    counts, whatever shone through. Of an animation the first picture is taken. A picture that its EXIF data says is
    turned is turned upright.
    Raises PipelineError, naming the file by `name`, for another format, broken data, more than 8 bits a channel, or
    more than LARGEST_PIXELS in the image or a tile of it, which are not decoded.
    """
    if len(content) <= LARGEST_PIXELS:  # a stored picture of more pixels has more bytes
        pixels = decode_stored_png(content)
        if pixels is not None:
            return np.require(pixels, requirements=["C", "W"])
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what is taken is decided here, not by Pillow's remarks
            return _decode(content)
    except UnidentifiedImageError:
        reason = f"it is none of {', '.join(FORMATS)}, or cut off"
    except Image.DecompressionBombError:
        reason = f"it has more than {LARGEST_PIXELS:,} pixels"
    except Exception as error:  # hostile data makes decoders raise anything
        reason = " ".join(str(error).split()) or type(error).__name__
    raise PipelineError(f"{name} is not a usable image: {reason}")


def _decode(content: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(content), formats=FORMATS) as image:
        if max(image.width * image.height, _tile_pixels(image)) > LARGEST_PIXELS:
            raise Image.DecompressionBombError
        if image.mode.startswith(("I", "F")) or _is_deep(image):  # Pillow would cut them off, or drop bits
            raise ValueError("its channels have more than 8 bits; convert it to 8 bits")
        ImageOps.exif_transpose(image, in_place=True)
        is_grey = image.mode in GREY_MODES and image.format != "GIF"  # Pillow takes some of its palettes for grey
        pixels = np.array(image.convert("L" if is_grey else "RGB"))
    return pixels[None] if pixels.ndim == 2 else np.ascontiguousarray(pixels.transpose(2, 0, 1))


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
