"""Image files as users have them: what each becomes, and what is refused in one line."""

import io
import re
import struct
import time
import tracemalloc
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hostile import png
from pictures import encode_png
from PIL import Image, ImageOps
from PIL.PngImagePlugin import PngInfo

from classifier.data.decoding import FORMATS, LARGEST_PIXELS, decode_image, read_header, resize_pixels

GENERATOR = np.random.default_rng(0)
GREY = GENERATOR.integers(0, 256, (6, 5), dtype=np.uint8)
RGB = GENERATOR.integers(0, 256, (6, 5, 3), dtype=np.uint8)
SMOOTH = np.add.outer(np.arange(0, 64, 2), np.arange(0, 96, 2)).astype(np.uint8)  # survives JPEG


def saved(picture: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    picture.save(file, kind, **options)
    return file.getvalue()


def picture(pixels: np.ndarray, mode: str | None = None) -> Image.Image:
    return Image.fromarray(pixels) if mode is None else Image.fromarray(pixels).convert(mode)


def png_of_rows(width: int, height: int, depth: int, colour: int, rows: bytes) -> bytes:
    """A PNG as given; `rows` with the filter bytes."""
    return png(width, height, depth, colour, zlib.compress(rows))


def chw(pixels: np.ndarray) -> np.ndarray:
    return pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)


def refused(content: bytes) -> str:
    """Why an image is not taken."""
    with pytest.raises(ValueError) as caught:  # noqa: PT011, the reason is what is tested
        decode_image(content)
    assert type(caught.value) is ValueError
    assert "\n" not in str(caught.value)
    return str(caught.value)


# What is taken


@pytest.mark.parametrize("kind", ["BMP", "GIF", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP"])
@pytest.mark.parametrize("pixels", [GREY, RGB], ids=["grey", "RGB"])
def test_formats_without_loss_give_the_pixels(kind: str, pixels: np.ndarray) -> None:
    if kind == "GIF" and pixels.ndim == 3:
        pixels = np.asarray(picture(pixels, "P").convert("RGB"))
    decoded = decode_image(saved(picture(pixels), kind, **({"lossless": True} if kind == "WEBP" else {})))
    if kind in ("GIF", "WEBP") and pixels.ndim == 2:  # these have no grey
        pixels = np.stack([pixels] * 3, axis=2)
    assert decoded.dtype == np.uint8
    assert np.array_equal(decoded, chw(pixels))
    assert decoded.flags.c_contiguous
    assert decoded.flags.writeable


@pytest.mark.parametrize(("mode", "channels"), [("L", 1), ("RGB", 3), ("CMYK", 3), ("YCbCr", 3)])
def test_jpeg(mode: str, channels: int) -> None:
    decoded = decode_image(saved(picture(SMOOTH, "RGB").convert(mode), "JPEG", quality=95))
    assert decoded.shape == (channels, *SMOOTH.shape)
    assert abs(decoded.astype(int) - SMOOTH).max() < 8


@pytest.mark.parametrize("mode", ["CMYK", "LAB"])
def test_other_colours_become_rgb_by_pillows_conversion(mode: str) -> None:
    content = saved(Image.frombytes(mode, (5, 6), GENERATOR.bytes(5 * 6 * len(mode))), "TIFF")
    with Image.open(io.BytesIO(content)) as opened:
        assert opened.mode == mode
        assert np.array_equal(decode_image(content), chw(np.asarray(opened.convert("RGB"))))


def test_palettes_become_rgb() -> None:
    paletted = picture(RGB, "P")
    assert np.array_equal(decode_image(saved(paletted)), chw(np.asarray(paletted.convert("RGB"))))


BACKGROUNDS = {(255, 255, 255): 255, (0, 0, 0): 0, (255, 0, 0): 76}  # and their grey by ITU-R BT.601


@pytest.mark.parametrize("background", BACKGROUNDS)
@pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF", "AVIF"])
def test_transparency_is_blended_with_the_background(kind: str, background: tuple[int, int, int]) -> None:
    transparent = picture(RGB)
    transparent.putalpha(picture(np.where(np.arange(5) < 2, 0, 255).astype(np.uint8)[None].repeat(6, 0)))
    options: dict[str, dict[str, Any]] = {"WEBP": {"lossless": True}, "AVIF": {"quality": 100}}
    decoded = decode_image(saved(transparent, kind, **options.get(kind, {})), background=background)
    assert decoded.shape == (3, 6, 5)
    near = 0 if kind != "AVIF" else 6
    assert abs(decoded[:, :, :2].astype(int) - np.array(background)[:, None, None]).max() <= near
    if kind != "AVIF":
        assert np.array_equal(decoded[:, :, 2:], chw(RGB)[:, :, 2:])


@pytest.mark.parametrize("background", BACKGROUNDS)
def test_grey_images_are_blended_with_the_grey_of_the_background(background: tuple[int, int, int]) -> None:
    transparent = picture(GREY)
    transparent.putalpha(0)
    assert (decode_image(saved(transparent), background=background) == BACKGROUNDS[background]).all()
    half = picture(np.full((6, 5), 100, np.uint8))
    half.putalpha(128)
    expected = round(100 * 128 / 255 + BACKGROUNDS[background] * 127 / 255)
    assert abs(decode_image(saved(half), background=background).astype(int) - expected).max() <= 1


def test_a_transparent_colour_of_a_png_or_palette_is_background() -> None:
    for pixels, colour in [(GREY, int(GREY[0, 0])), (RGB, tuple(int(value) for value in RGB[0, 0]))]:
        content = saved(picture(pixels), transparency=colour)
        is_there = chw((pixels == colour) if pixels.ndim == 2 else (pixels == colour).all(axis=2))[0]
        decoded = decode_image(content, background=(0, 0, 0))
        assert np.array_equal(decoded, np.where(is_there, 0, chw(pixels)))
    paletted = picture(RGB, "P")
    everything = saved(paletted, transparency=bytes(256))
    assert (decode_image(everything) == 255).all()


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "BMP", "PPM"])
def test_one_bit_becomes_grey(kind: str) -> None:
    bits = GREY > 100
    assert np.array_equal(decode_image(saved(picture(bits), kind)), chw(bits * np.uint8(255)))


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP"])
def test_the_first_picture_of_an_animation_is_taken(kind: str) -> None:
    first, *others = (Image.new("RGB", (5, 6), colour) for colour in ("#ff0000", "#00ff00", "#0000ff"))
    options: dict[str, Any] = {"lossless": True} if kind == "WEBP" else {}
    content = saved(first, kind, save_all=True, append_images=others, **options)
    with Image.open(io.BytesIO(content)) as opened:
        assert opened.n_frames == 3  # type: ignore[attr-defined]
    assert np.array_equal(decode_image(content), chw(np.asarray(first)))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize(
    ("orientation", "turn"),
    [(1, np.copy), (2, np.fliplr), (3, lambda x: np.rot90(x, 2)), (6, lambda x: np.rot90(x, 3))],
)
def test_pictures_are_turned_upright(kind: str, orientation: int, turn: Callable[[np.ndarray], np.ndarray]) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    decoded = decode_image(saved(picture(SMOOTH, "RGB"), kind, exif=exif))
    expected = turn(SMOOTH)
    assert decoded.shape[1:] == expected.shape
    assert abs(decoded.astype(int) - expected).max() < 8


# A picture of 64 x 48 pixels, red on the left and blue on the right; nothing that the tests install writes HEIC
HEIC = Path(__file__).parent / "files/halves.heic"


def test_heic() -> None:
    content = HEIC.read_bytes()
    assert read_header(content) == (48, 64, 3)
    decoded = decode_image(content).astype(int)
    assert abs(decoded[:, :, :28] - np.array([220, 30, 30])[:, None, None]).max() < 12
    assert abs(decoded[:, :, 36:] - np.array([30, 30, 220])[:, None, None]).max() < 12
    assert decode_image(content, (16, 16), 1, fit="stretch").shape == (1, 16, 16)
    for length in (0, 20, 100, len(content) - 30):
        refused(content[:length])


# More than 8 bits a channel


def deep_tiff(pixels: np.ndarray) -> bytes:
    """A TIFF of 16 bits a channel, RGB, which Pillow reads but does not write."""
    tags = [
        (256, 3, 1, pixels.shape[1]), (257, 3, 1, pixels.shape[0]), (258, 3, 3, 8 + 2 + 12 * 9 + 4), (259, 3, 1, 1),
        (262, 3, 1, 2), (273, 4, 1, 8 + 2 + 12 * 9 + 4 + 6), (277, 3, 1, 3), (278, 3, 1, pixels.shape[0]),
        (279, 4, 1, pixels.nbytes),
    ]  # fmt: skip
    entries = b"".join(struct.pack("<HHII", *tag) for tag in tags)
    return b"II*\0" + struct.pack("<IH", 8, 9) + entries + struct.pack("<I3H", 0, 16, 16, 16) + pixels.tobytes()


COLOURS = [[1, 2, 3], [4, 5, 6]]
DEEP = np.array([[0, 255, 256, 1000], [40_000, 65_279, 65_280, 65_535]], np.uint16)


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM"])
def test_sixteen_bits_of_grey_become_the_highest_eight(kind: str) -> None:
    assert decode_image(saved(picture(DEEP), kind)).tolist() == [(DEEP // 256).tolist()]
    assert read_header(saved(picture(DEEP), kind)) == (2, 4, 1)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (png_of_rows(2, 1, 16, 2, b"\0" + bytes([1, 9, 2, 9, 3, 9, 4, 9, 5, 9, 6, 9])), COLOURS),
        (
            png_of_rows(2, 1, 16, 4, b"\0" + bytes([1, 9, 255, 255, 4, 9, 255, 255])),
            [[1, 1, 1], [4, 4, 4]],
        ),  # which Pillow takes for RGBA
        (deep_tiff(np.array([[[265, 521, 777], [1033, 1289, 1545]]], "<u2")), COLOURS),
        (b"P6 2 1 65535\n" + np.array([257, 514, 771, 1028, 1285, 1542], ">u2").tobytes(), COLOURS),
    ],
    ids=["png-RGB", "png-LA", "tiff-RGB", "ppm-RGB"],
)
def test_sixteen_bits_of_colour_and_alpha_too(content: bytes, expected: list[list[int]]) -> None:
    assert decode_image(content)[:, 0].T.tolist() == expected


def test_the_own_range_of_a_grey_image_becomes_0_to_255() -> None:
    low = (1000 + np.arange(8).reshape(2, 4) * 10).astype(np.uint16)
    expected = np.rint(np.arange(8).reshape(2, 4) * 255 / 7).astype(int).tolist()
    for pixels in (low, low.astype(np.int32), low.astype(np.float32)):
        assert decode_image(saved(picture(pixels), "TIFF"), intensity="image").tolist() == [expected]
    assert not decode_image(saved(picture(np.full_like(low, 7)), "PNG"), intensity="image").any()
    assert np.array_equal(decode_image(saved(picture(GREY)), intensity="image"), chw(GREY))  # it has 8 bits


def test_what_has_no_range_or_no_own_one_is_refused() -> None:
    for values in (DEEP.astype(np.int32), DEEP.astype(np.float32)):
        content = saved(picture(values), "TIFF")
        assert refused(content) == "its values have no fixed range; set intensity: image, or convert it to 8 bits"
    with pytest.raises(ValueError, match="colour of more than 8 bits a channel; set intensity: full"):
        decode_image(deep_tiff(RGB.astype("<u2")), intensity="image")


def test_sixteen_bits_for_all_channels_together_are_taken() -> None:
    header = struct.pack("<IiiHHIIiiII", 40, 2, 1, 1, 16, 3, 4, 0, 0, 0, 0) + struct.pack("<III", 0xF800, 0x7E0, 0x1F)
    content = b"BM" + struct.pack("<IHHI", 14 + len(header) + 4, 0, 0, 14 + len(header)) + header
    assert decode_image(content + struct.pack("<HH", 0xF800, 0x7E0)).reshape(3, 2).T.tolist() == [
        [255, 0, 0],
        [0, 255, 0],
    ]


# What is refused


PNG, JPEG = saved(picture(GREY)), saved(picture(SMOOTH), "JPEG")


@pytest.mark.parametrize(
    "content",
    [
        b"", b"text", b"<html>", bytes(1000), PNG[:8], PNG[:33], PNG[:50], JPEG[:2], JPEG[:100], JPEG[:-100],
        encode_png(GREY)[:60], PNG.replace(b"IDAT", b"IDAU"), png_of_rows(0, 0, 8, 0, b""),
        png_of_rows(5, 6, 8, 9, bytes(36)), png_of_rows(5, 6, 8, 0, bytes(20)),
        b"P6 5 6 255\n", b"II*\0" + b"\xff" * 20, b"GIF89a" + b"\xff" * 20,
        saved(picture(RGB), "GIF")[:20], saved(picture(RGB), "WEBP")[:-20], saved(picture(RGB), "BMP")[:-20],
        saved(picture(RGB), "TIFF")[:-20],
    ],
    ids=lambda content: f"{content[:20]!r}-{len(content)}",
)  # fmt: skip
def test_broken_files_are_one_line(content: bytes) -> None:
    reason = refused(content)
    assert reason
    assert " at 0x" not in reason  # an address in memory: another one at every run


@pytest.mark.parametrize("kind", ["EPS", "ICO", "PDF", "TGA"])
def test_other_formats_are_refused(kind: str) -> None:
    """EPS above all, for which Pillow would start Ghostscript."""
    assert refused(saved(picture(RGB), kind)) == f"it is none of {', '.join(FORMATS)}, or cut off"


def test_several_pages_are_refused_but_reduced_copies_are_none() -> None:
    pages = [Image.new("RGB", (5, 6), colour) for colour in ("#ff0000", "#00ff00", "#0000ff")]
    told = "it has several pages, up to 3; split it, as with `magick pages.tif page-%d.png`"
    assert refused(saved(pages[0], "TIFF", save_all=True, append_images=pages[1:])) == told
    for page in pages[1:]:
        page.encoderinfo = {"tiffinfo": {254: 1}}  # type: ignore[attr-defined]
    content = saved(pages[0], "TIFF", save_all=True, append_images=pages[1:])
    assert np.array_equal(decode_image(content), chw(np.asarray(pages[0])))


def test_dicom_and_heic_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    assert refused(bytes(128) + b"DICM" + bytes(100)) == "it is DICOM; convert it to PNG, as with `dcm2img` of DCMTK"
    monkeypatch.setattr("classifier.data.decoding.reads_heic", False)
    heic = bytes(4) + b"ftypheic" + bytes(100)
    assert refused(heic) == "it is HEIC, which needs the package pi-heif; `pip install pi-heif`"


def progressive(scans: int) -> bytes:
    """A JPEG of 16 x 16 pixels whose last scan is repeated."""
    content = saved(Image.new("L", (16, 16), 90), "JPEG", progressive=True)
    last = content.rindex(b"\xff\xda")
    return content[:last] + content[last:-2] * scans + content[-2:]


def test_a_jpeg_of_very_many_scans_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    assert decode_image(progressive(1)).shape == (1, 16, 16)
    monkeypatch.setattr("classifier.data.decoding.LARGEST_SCANNED", 16 * 16 * 1000)
    assert re.fullmatch(r"it has 1,0\d\d scans; save it anew", refused(progressive(1000)))


def test_one_large_image_is_decoded_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("classifier.data.decoding.LARGE_PIXELS", 29)
    active, most = 0, 0

    def counted(image: Image.Image, *_: Any, **__: Any) -> None:
        nonlocal active, most
        active += 1
        most = max(most, active)
        time.sleep(0.02)
        active -= 1

    monkeypatch.setattr(ImageOps, "exif_transpose", counted)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(decode_image, [PNG] * 8))
    assert most == 1


def test_forty_thousand_pixels_squared_are_not_decoded() -> None:
    """In 16 kilobytes; and sizes just above the limit, at which Pillow only warns."""
    row = zlib.compressobj(9)
    zeros = b"".join(row.compress(bytes(1 << 20)) for _ in range(16)) + row.flush()
    tracemalloc.start()
    try:
        for width, height in [
            (40_000, 40_000),
            (LARGEST_PIXELS + 1, 1),
            (1, LARGEST_PIXELS + 1),
            (2**31 - 1, 2**31 - 1),
        ]:
            for depth, colour in [(8, 0), (1, 0), (8, 2), (8, 3), (16, 2)]:
                content = png(width, height, depth, colour, zeros)
                assert len(content) < 20_000
                assert refused(content) == "it has more than 89,478,485 pixels"
        assert tracemalloc.get_traced_memory()[1] < 10 * 2**20
    finally:
        tracemalloc.stop()


def tiled_tiff(tile: int) -> bytes:
    """An image of 8 x 8 grey pixels in one tile of so many squared, deflated."""
    packer = zlib.compressobj(9)
    packed = b"".join(packer.compress(bytes(tile)) for _ in range(tile)) + packer.flush()
    tags = [(256, 8), (257, 8), (258, 8), (259, 8), (262, 1), (277, 1), (322, tile), (323, tile)]
    tags += [(324, 8 + 2 + 12 * 10 + 4), (325, len(packed))]
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags)
    return b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + bytes(4) + packed


def test_a_small_tiff_of_one_large_tile_is_not_unpacked() -> None:
    assert not decode_image(tiled_tiff(tile=16)).any()
    content = tiled_tiff(tile=9600)
    assert len(content) < 100_000
    assert refused(content) == "it has more than 89,478,485 pixels"


def test_limit_of_pixels_holds_for_stored_pictures_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("classifier.data.decoding.LARGEST_PIXELS", 30)
    decode_image(encode_png(GREY))
    assert refused(encode_png(np.zeros((1, 31), np.uint8))) == "it has more than 30 pixels"


def test_grey_gifs_are_alike_whatever_their_palette() -> None:
    ramp = np.arange(256, dtype=np.uint8).reshape(16, 16)  # Pillow takes its palette for grey
    assert decode_image(saved(picture(ramp), "GIF")).shape == (3, 16, 16)


# Sizes and channels


def test_the_largest_centred_part_is_taken_and_scaled() -> None:
    wide = np.zeros((10, 30, 3), np.uint8)
    wide[:, 10:20] = 200  # the middle third, which alone is to be left
    for pixels in (wide, wide.transpose(1, 0, 2)):
        decoded = decode_image(saved(picture(pixels)), (5, 5), fit="crop")
        assert decoded.shape == (3, 5, 5)
        assert (decoded[:, 1:-1, 1:-1] == 200).all()
        assert (decoded >= 150).all()  # the filter takes a little of what is beyond the edge


def test_padding_keeps_the_whole_image() -> None:
    wide = np.full((10, 30), 40, np.uint8)
    wide[:, 10:20] = 200
    for pixels, turn in ((wide, np.asarray), (wide.T.copy(), np.transpose)):
        decoded = turn(decode_image(saved(picture(pixels)), (15, 15), background=(255, 0, 0))[0])
        assert decoded[7, [1, 7, 13]].tolist() == [40, 200, 40]
        assert (decoded[[0, 4, 10, 14]] == 76).all()  # the grey of red
    colour = decode_image(saved(picture(wide, "RGB")), (15, 15), background=(255, 0, 9))
    assert colour[:, 0, 0].tolist() == [255, 0, 9]


def test_stretching_keeps_the_whole_image_and_fills_the_square() -> None:
    wide = np.full((10, 30), 40, np.uint8)
    wide[:, 10:20] = 200
    decoded = decode_image(saved(picture(wide)), (15, 15), fit="stretch")[0]
    assert (decoded[:, [1, 7, 13]] == [40, 200, 40]).all()


@pytest.mark.parametrize("fit", ["pad", "crop", "stretch"])
def test_images_stored_larger_are_scaled_as_files_are(fit: str) -> None:
    """`evaluate` scales what `annotate` stored; `predict` does both at once."""
    photo = saved(picture(GENERATOR.integers(0, 256, (50, 70, 3), dtype=np.uint8)))
    stored = decode_image(photo, (40, 40), 3, fit=fit)
    assert np.array_equal(
        resize_pixels(stored, (32, 32)), decode_image(photo, (32, 32), 3, fit=fit, stored_size=(40, 40))
    )


def test_scaling_down_takes_the_mean_and_not_single_pixels() -> None:
    stripes = np.tile(np.array([0, 255], np.uint8), (64, 32))
    decoded = decode_image(saved(picture(stripes)), (8, 8))
    assert abs(decoded.astype(int) - 127).max() <= 20


@pytest.mark.parametrize("size", [(6, 5), (3, 5), (12, 20)])
def test_size_and_channels_are_those_asked_for(size: tuple[int, int]) -> None:
    for pixels in (GREY, RGB):
        for channels in (1, 3):
            assert decode_image(saved(picture(pixels)), size, channels).shape == (channels, *size)
    assert np.array_equal(decode_image(saved(picture(RGB)), (6, 5)), chw(RGB))
    assert np.array_equal(decode_image(saved(picture(GREY)), None, 3), np.stack([GREY] * 3))
    assert np.array_equal(decode_image(saved(picture(RGB)), None, 1)[0], np.asarray(picture(RGB, "L")))


def test_a_large_jpeg_is_decoded_at_a_reduced_scale(monkeypatch: pytest.MonkeyPatch) -> None:
    rows, columns = np.mgrid[0:1200, 0:1600]
    smooth = np.stack([rows // 8, columns // 8, (rows + columns) // 16], axis=2).astype(np.uint8)
    content = saved(picture(smooth), "JPEG", quality=95)
    fitted = []
    fit = ImageOps.fit

    def watched(image: Image.Image, *arguments: Any) -> Image.Image:
        fitted.append(image.size)
        return fit(image, *arguments)

    monkeypatch.setattr(ImageOps, "fit", watched)
    reduced = decode_image(content, (64, 64), fit="crop")
    assert fitted == [(200, 150)]  # an eighth, and still twice what is asked for
    monkeypatch.undo()
    whole = np.asarray(ImageOps.fit(picture(smooth), (64, 64), Image.Resampling.BILINEAR))
    assert abs(reduced.astype(int) - chw(whole)).max() <= 3


@pytest.mark.parametrize("kind", ["BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP"])
@pytest.mark.parametrize("pixels", [GREY, RGB], ids=["grey", "colour"])
def test_the_head_of_a_file_tells_what_it_becomes(kind: str, pixels: np.ndarray) -> None:
    content = saved(picture(pixels), kind)
    header = read_header(content)
    assert (header.channels, header.height, header.width) == decode_image(content).shape


def png_chunks(content: bytes) -> list[bytes]:
    """The chunks of a PNG, whole."""
    chunks, place = [], 8
    while place < len(content):
        end = place + 12 + int.from_bytes(content[place : place + 4], "big")
        chunks.append(content[place:end])
        place = end
    return chunks


def png_info(kind: str) -> dict[str, Any]:
    """What makes Pillow write into a PNG, in one of several ways, that it is turned."""
    exif = Image.Exif()
    exif[0x0112] = 6
    if kind == "EXIF":
        return {"exif": exif}
    texts = PngInfo()
    if kind == "raw profile":
        raw = exif.tobytes()
        texts.add_text("Raw profile type exif", f"\nexif\n{len(raw):8}\n{raw.hex()}\n", zip=True)
    else:
        texts.add_itxt("XML:com.adobe.xmp", '<rdf:Description tiff:Orientation="6"/>')
    return {"pnginfo": texts}


@pytest.mark.parametrize("place", ["before", "behind"])
@pytest.mark.parametrize("kind", ["EXIF", "raw profile", "XMP"])
def test_the_head_of_a_png_tells_that_it_is_turned_also_behind_its_pixels(kind: str, place: str) -> None:
    content = saved(picture(GREY), **png_info(kind))
    head, *others, pixels, end = png_chunks(content)
    (told,) = others
    if place == "behind":
        content = content[:8] + head + pixels + told + end
    header = read_header(content)
    assert (header.height, header.width) == (GREY.shape[1], GREY.shape[0])
    assert decode_image(content).shape == (1, GREY.shape[1], GREY.shape[0])


def test_the_head_of_a_png_is_read_without_its_pixels() -> None:
    texts = PngInfo()
    texts.add_text("Software", "exif and xmp are not its keyword")
    content = bytearray(saved(picture(GREY), pnginfo=texts))
    place = content.index(b"IDAT") + 6
    content[place] ^= 0xFF
    assert read_header(bytes(content)) == (*GREY.shape, 1)
    with pytest.raises(ValueError, match=r"."):
        decode_image(bytes(content))


def test_the_head_of_a_broken_file_is_refused() -> None:
    for content in (b"", b"no image", saved(picture(GREY))[:20]):
        with pytest.raises(ValueError, match=r"it is none of AVIF, BMP, .* or cut off|Truncated"):
            read_header(content)
