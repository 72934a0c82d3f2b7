"""The pictures: their size, and that the same input gives the same bytes."""

from collections.abc import Callable
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
import pytest
from PIL import Image

from classifier.evaluation.plots import LETTERS, save_grid, save_reliability, save_saliency, title

Draw = Callable[[Path, int, int], None]  # a path, the number of images and of channels


def images(count: int, channels: int) -> np.ndarray:
    return np.random.default_rng(0).random((count, channels, 6, 8), np.float32)


def names(count: int) -> list[str]:
    return [f"class {index}" for index in range(count)]


def draw_samples(path: Path, count: int, channels: int) -> None:
    save_grid(path, images(count, channels), names(count), 3, 3)


def draw_mistakes(path: Path, count: int, channels: int) -> None:
    save_grid(
        path,
        images(count, channels),
        [title(f"true: {name}", "predicted: 50% bag", file=f"{name}.png") for name in names(count)],
        3,
        5,
    )


def draw_saliency(path: Path, count: int, channels: int) -> None:
    save_saliency(path, images(count, channels), images(count, 1)[:, 0], names(count))


def draw_reliability(path: Path, count: int, _: int) -> None:
    """`count` images in the lowest of three bins, one in the highest, none between."""
    bins = {"images": [count, 0, 1], "confidence": [0.25, np.nan, 1], "accuracy": [0.5, np.nan, 1]}
    save_reliability(path, pd.DataFrame(bins))


PICTURES = [
    (draw_samples, 9, (480, 582)),
    (draw_mistakes, 15, (800, 582)),
    (draw_saliency, 8, (1280, 388)),
    (draw_reliability, 8, (480, 540)),
]


@pytest.mark.parametrize(("draw", "count", "size"), PICTURES)
def test_a_png_of_known_size_and_bytes(tmp_path: Path, draw: Draw, count: int, size: tuple[int, int]) -> None:
    draw(tmp_path / "first.png", count, 1)
    with Image.open(tmp_path / "first.png") as picture:
        assert picture.format == "PNG"
        assert picture.size == size
        assert not picture.info.keys() - {"dpi"}  # no version, no date
        assert np.asarray(picture.convert("L")).std() > 10  # something is drawn
    draw(tmp_path / "second.png", count, 1)
    assert (tmp_path / "second.png").read_bytes() == (tmp_path / "first.png").read_bytes()


def test_a_users_matplotlib_settings_change_nothing(tmp_path: Path) -> None:
    draw_samples(tmp_path / "first.png", 9, 1)
    with matplotlib.rc_context({"font.family": "DejaVu Serif", "savefig.dpi": 50, "figure.facecolor": "red"}):
        draw_samples(tmp_path / "second.png", 9, 1)
    assert (tmp_path / "second.png").read_bytes() == (tmp_path / "first.png").read_bytes()


def test_colours_are_those_of_the_pixels(tmp_path: Path) -> None:
    red = np.zeros((1, 3, 4, 4), np.float32)
    red[:, 0] = 1
    save_grid(tmp_path / "red.png", red, ["red"], 3, 3)
    save_grid(tmp_path / "black.png", np.zeros((1, 1, 4, 4), np.float32), ["black"], 3, 3)
    with Image.open(tmp_path / "red.png") as picture:
        assert (255, 0, 0) in {colour for _, colour in picture.convert("RGB").getcolors(1 << 20) or []}
    with Image.open(tmp_path / "black.png") as picture:
        darkest = sum(picture.convert("L").histogram()[:5])
    assert darkest > 1000  # scaled from 0 to 1, not from the image's own smallest to its own largest value


@pytest.mark.parametrize(
    ("draw", "count", "channels", "size"),
    [
        (draw_samples, 2, 1, (480, 582)),
        (draw_samples, 2, 3, (480, 582)),
        (draw_mistakes, 0, 1, (800, 582)),
        (draw_mistakes, 1, 3, (800, 582)),
        (draw_saliency, 1, 1, (160, 388)),
        (draw_saliency, 2, 3, (320, 388)),
    ],
)
def test_fewer_images_than_places(tmp_path: Path, draw: Draw, count: int, channels: int, size: tuple[int, int]) -> None:
    draw(tmp_path / "picture.png", count, channels)
    with Image.open(tmp_path / "picture.png") as picture:
        assert picture.size == size


def test_lines_that_are_too_long_lose_their_end_and_names_of_files_their_beginning() -> None:
    assert title("true: hat", file="hats/1.jpg") == "true: hat\nhats/1.jpg"
    of_class, file = title(f"true: {'x' * 50}", file=f"{'x' * 50}/1.jpg").split("\n")
    assert (len(of_class), len(file)) == (LETTERS, LETTERS)
    assert of_class.startswith("true: xxx")
    assert of_class.endswith("x…")
    assert file.startswith("…x")
    assert file.endswith("x/1.jpg")


def test_letters_that_the_font_has_not_are_no_complaint(tmp_path: Path) -> None:
    save_grid(tmp_path / "samples.png", images(1, 1), [title("true: 猫", file="猫.jpg")], 3, 3)


def test_class_names_are_not_formulas(tmp_path: Path) -> None:
    titles = ["$x^$", "_", "50 %", "a\\b", "$"]
    save_grid(tmp_path / "samples.png", images(5, 1), titles, 3, 3)
    save_saliency(tmp_path / "saliency.png", images(1, 1), images(1, 1)[:, 0], titles)


def test_the_bars_of_a_reliability_picture_are_as_high_as_the_accuracies(tmp_path: Path) -> None:
    draw_reliability(tmp_path / "picture.png", 8, 1)
    with Image.open(tmp_path / "picture.png") as picture:
        upper = np.asarray(picture.convert("RGB"))[:350]
    heights = (upper == (31, 119, 180)).all(axis=2).sum(axis=0)  # of matplotlib's first colour, by column
    low, empty, high = (heights[column] for column in (110, 270, 400))
    assert empty == 0
    assert 0.45 < low / high < 0.55


def test_saliency_without_any_gradient(tmp_path: Path) -> None:
    save_saliency(tmp_path / "saliency.png", images(2, 1), np.zeros((2, 6, 8), np.float32), names(2))
    assert (tmp_path / "saliency.png").exists()
