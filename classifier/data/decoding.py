"""From the bytes of one image file to its pixels: which files are taken, what becomes of them, and the limits.

MLflow keeps a copy of this file with every registered model, so it imports nothing of the project.
"""

import io
import math
import re
import struct
import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageFile, ImageOps, UnidentifiedImageError
from PIL.TiffImagePlugin import TiffImageFile

try:
    from pi_heif import register_heif_opener
except ImportError:
    reads_heic = False
else:
    register_heif_opener(thumbnails=False)
    reads_heic = True

# Other formats may start programs, as EPS does
FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP") + ("HEIF",) * reads_heic
GREY_MODES = ("1", "L", "LA", "La", "I;16", "I;16L", "I;16B", "I;16N", "I", "F")
LARGEST_PIXELS = 89_478_485  # Pillow's own limit: 256 MiB of RGB
# Pixels times scans of a progressive JPEG, which is decoded anew for each: 24 million pixels in 80 scans
LARGEST_SCANNED = 2_000_000_000
# An image with more pixels is decoded by one thread at a time: a few in parallel would take gigabytes
LARGE_PIXELS = 16_000_000
TILE_TAGS = (322, 323)  # TIFF 6.0: width and length of a tile
SUBFILE_TAG = 254  # TIFF 6.0: bit 0 is set for a reduced copy of another page
TURNED = range(5, 9)  # EXIF orientations that swap width and height
EXIF_ORIENTATION = 274
START_OF_SCAN = b"\xff\xda"  # of a JPEG; within its data, each 0xff is followed by 0x00
# https://www.w3.org/TR/png-3: a chunk begins with the length of its data and its type, a text with its keyword
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
PNG_CHUNK = struct.Struct(">I4s")
PNG_TEXTS = (b"tEXt", b"zTXt", b"iTXt")
LONGEST_KEYWORD = 80  # with the zero behind it
WHITE = (255, 255, 255)

_one_large_image = threading.Lock()


class Header(NamedTuple):
    """What a file says of its image, without its pixels being decoded."""

    height: int
    width: int
    channels: int  # 1 for grey, 3 for colour


def decode_image(
    content: bytes,
    size: Sequence[int] | None = None,
    channels: int | None = None,
    *,
    fit: str = "pad",
    background: Sequence[int] = WHITE,
    intensity: str = "full",
    stored_size: Sequence[int] | None = None,
) -> np.ndarray:
    """Return the pixels (C, H, W) uint8 of an image file, C = 1 for grey and 3 for colour.

    Grey, with or without alpha, and black-and-white become grey; palettes, CMYK, YCbCr and LAB become RGB by Pillow's
    conversion, and so do all images in GIF and WebP, which have no grey. Transparent images are blended with the
    background. The first image of an animation is taken. An image that its EXIF data says is turned is turned upright.

    size: (H, W) to bring the image to, by `fit_image`; a JPEG far larger is decoded at a reduced scale.
    channels: 1 or 3, whatever the file has.
    fit: crop, pad or stretch. background: (red, green, blue), for padding and transparency.
    intensity: how more than 8 bits a channel become 8. `full` takes the 8 highest of 16 bits; `image` maps the lowest
    to the highest value of a grey image to 0 to 255.
    stored_size: (H, W) that the image is brought to first, with the shape of `size`: as images are stored for training.
    Raises ValueError, with the reason, for another format, several pages, broken data, or more than LARGEST_PIXELS in
    the image or a tile of it, which are not decoded.
    """
    with _opened(content, intensity) as image:
        is_grey = _is_grey(image)  # before `draft`, which tells other modes
        if (longest := max(*(stored_size or size), 0) if size else 0) and image.format == "JPEG":
            image.draft(image.mode, (2 * longest, 2 * longest))  # each side at least so long, if it is longer
        with _one_large_image if image.width * image.height > LARGE_PIXELS else nullcontext():
            ImageOps.exif_transpose(image, in_place=True)
            mode = "L" if channels == 1 or (is_grey and channels is None) else "RGB"
            upright = _blended(_with_eight_bits(image, intensity), background).convert(mode)
            if size:
                upright = resize_image(fit_image(upright, stored_size or size, fit, background), size)
            return _array(upright)


def read_header(content: bytes, intensity: str = "full") -> Header:
    """Return size and channels that `decode_image` gives, from the head of the file; raises ValueError likewise."""
    with _opened(content, intensity) as image:
        width, height = image.size
        # Of a PNG, Pillow unpacks all pixels to look behind them
        if (image.format != "PNG" or _may_be_turned(content)) and image.getexif().get(EXIF_ORIENTATION) in TURNED:
            width, height = height, width
        return Header(height, width, 1 if _is_grey(image) else 3)


def fit_image(image: Image.Image, size: Sequence[int], how: str, background: Sequence[int]) -> Image.Image:
    """Bring an L or RGB image to (H, W), with an antialiasing linear filter. An image of that size stays as it is.

    crop: the largest centred part of that shape. pad: the whole image, centred on the background. stretch: the whole
    image, each side by its own factor.
    """
    height, width = size
    if image.size == (width, height):
        return image
    if how == "crop":
        return ImageOps.fit(image, (width, height), Image.Resampling.BILINEAR)
    if how == "pad":
        colour = padding_colour(background, len(image.getbands()))
        return ImageOps.pad(image, (width, height), Image.Resampling.BILINEAR, color=colour)
    return resize_image(image, size)


def resize_image(image: Image.Image, size: Sequence[int]) -> Image.Image:
    """Scale an image to (H, W), with an antialiasing linear filter."""
    height, width = size
    return image if image.size == (width, height) else image.resize((width, height), Image.Resampling.BILINEAR)


def fit_pixels(
    pixels: np.ndarray, size: Sequence[int], channels: int, fit: str = "pad", background: Sequence[int] = WHITE
) -> np.ndarray:
    """Bring pixels (H, W) or (H, W, 3) uint8 to (C, H, W), by the rules of `decode_image`."""
    return _array(fit_image(Image.fromarray(pixels).convert("L" if channels == 1 else "RGB"), size, fit, background))


def resize_pixels(pixels: np.ndarray, size: Sequence[int]) -> np.ndarray:
    """Scale pixels (C, H, W) uint8 to (C, *size), as `decode_image` scales from `stored_size` to `size`."""
    image = Image.fromarray(pixels[0] if len(pixels) == 1 else np.ascontiguousarray(pixels.transpose(1, 2, 0)))
    return _array(resize_image(image, size))


def _array(image: Image.Image) -> np.ndarray:
    pixels = np.array(image)
    return pixels[None] if pixels.ndim == 2 else np.ascontiguousarray(pixels.transpose(2, 0, 1))


def padding_colour(background: Sequence[int], channels: int) -> tuple[int, ...]:
    """Return a (red, green, blue) in so many channels: of one, its grey, as Pillow converts RGB to L (ITU-R BT.601)."""
    if channels == 3:
        return tuple(background)
    return (int(np.array(Image.new("RGB", (1, 1), tuple(background)).convert("L"))[0, 0]),)


def _blended(image: Image.Image, background: Sequence[int]) -> Image.Image:
    """The image on the background, where it is transparent."""
    if not image.has_transparency_data:
        return image
    canvas = Image.new("RGBA", image.size, (*background, 255))
    canvas.alpha_composite(image.convert("RGBA"))
    return canvas


def _with_eight_bits(image: Image.Image, intensity: str) -> Image.Image:
    """The image in 8 bits a channel; Pillow would cut values off at 255."""
    if image.mode not in GREY_MODES[4:]:
        return image
    values = np.asarray(image).astype(np.float64)
    if intensity == "image":
        low, high = values.min(), values.max()
        values = np.rint((values - low) * (255 / (high - low))) if high > low else np.zeros_like(values)
    else:
        values //= 256
    return Image.fromarray(values.astype(np.uint8))


@contextmanager
def _opened(content: bytes, intensity: str) -> Iterator[ImageFile.ImageFile]:
    """A file as an image whose pixels are not decoded yet; what goes wrong with it in the block is a ValueError."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what is taken is decided here, not by Pillow's remarks
            with Image.open(io.BytesIO(content), formats=FORMATS) as image:
                pixels = max(image.width * image.height, _tile_pixels(image))
                if pixels > LARGEST_PIXELS:
                    raise Image.DecompressionBombError
                if image.format in ("JPEG", "MPO") and pixels * content.count(START_OF_SCAN) > LARGEST_SCANNED:
                    raise ValueError(f"it has {content.count(START_OF_SCAN):,} scans; save it anew")
                if reason := _too_deep(image, intensity) or _has_pages(image):
                    raise ValueError(reason)
                yield image
    except UnidentifiedImageError:
        reason = _unknown_format(content)
    except Image.DecompressionBombError:
        reason = f"it has more than {LARGEST_PIXELS:,} pixels"
    except Exception as error:  # hostile data makes decoders raise anything
        reason = " ".join(str(error).split()) or type(error).__name__
    else:
        return
    raise ValueError(reason)


def _unknown_format(content: bytes) -> str:
    if content[128:132] == b"DICM":
        return "it is DICOM; convert it to PNG, as with `dcm2img` of DCMTK"
    if content[4:12] in (b"ftypheic", b"ftypheix", b"ftypmif1") and not reads_heic:
        return "it is HEIC, which needs the package pi-heif; `pip install pi-heif`"
    return f"it is none of {', '.join(FORMATS)}, or cut off"


def _has_pages(image: ImageFile.ImageFile) -> str | None:
    """Why a TIFF of several pages is not taken; reduced copies of the first page are no pages."""
    if not isinstance(image, TiffImageFile) or not getattr(image, "is_animated", False):
        return None
    pages = 0
    for number in range(image.n_frames):
        image.seek(number)
        pages += not image.tag_v2.get(SUBFILE_TAG, 0) & 1
        if pages > 1:
            return f"it has several pages, up to {image.n_frames}; split it, as with `magick pages.tif page-%d.png`"
    image.seek(0)
    return None


def _too_deep(image: ImageFile.ImageFile, intensity: str) -> str | None:
    """Why an image of more than 8 bits a channel is not taken, if it is not."""
    if image.mode in ("I", "F") and image.format != "PPM" and intensity == "full":
        return "its values have no fixed range; set intensity: image, or convert it to 8 bits"
    if intensity == "image" and image.mode not in GREY_MODES and _is_deep(image):
        return "it has colour of more than 8 bits a channel; set intensity: full, or convert it to 8 bits"
    return None


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
