"""Pictures of images and of a model. Every function writes one PNG.

pixels: (N, C, H, W) float in [0, 1] with one or three channels, a NumPy array.
"""

import warnings
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

# Pixels: a place with its title, and the longer side of the image in it
WIDTH, HEIGHT = 160, 194
SIDE = 142
LETTERS = 26  # that fit above an image

# A user's matplotlibrc must not change the pictures.
_default_style = matplotlib.rc_context(
    {key: value for key, value in matplotlib.rcParamsDefault.items() if not key.startswith("backend")}
)


def title(*lines: str, file: str) -> str:
    """The title of an image. Lines that are too long lose their end, the name of a file its beginning."""
    short = [line if len(line) <= LETTERS else f"{line[: LETTERS - 1]}…" for line in lines]
    return "\n".join([*short, file if len(file) <= LETTERS else f"…{file[1 - LETTERS :]}"])


@_default_style
def save_grid(path: Path, pixels: np.ndarray, titles: list[str], rows: int, columns: int) -> None:
    """Images with their titles, row by row; places without an image stay empty, and too many images are an error."""
    grid = _Grid(rows, columns)
    for place, image, title in zip(range(rows * columns)[: len(pixels)], pixels, titles, strict=True):
        grid.show_pixels(place, image, title)
    _save(grid.figure, path)


@_default_style
def save_saliency(path: Path, pixels: np.ndarray, saliency: np.ndarray, titles: list[str]) -> None:
    """Images and, below each, how much the winning logit changes with each pixel.

    saliency: (N, H, W), 0 or more; each image is scaled to its own largest value.
    """
    count = len(pixels)
    grid = _Grid(2, count)
    for column in range(count):
        grid.show_pixels(column, pixels[column], titles[column])
        grid.show(count + column, saliency[column], cmap="inferno")
    _save(grid.figure, path)


@_default_style
def save_reliability(path: Path, bins: pd.DataFrame) -> None:
    """Accuracy by confidence, with the diagonal on which both are the same, and below it the images of each bin.

    bins: `images`, `confidence` and `accuracy` of bins of equal width, as metrics.calibration_bins gives them.
    """
    figure = Figure(figsize=(4.8, 5.4), dpi=100, layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
    edges = np.linspace(0, 1, len(bins) + 1)
    upper.bar(edges[:-1], bins["accuracy"].fillna(0), np.diff(edges), align="edge", edgecolor="white")
    upper.plot([0, 1], [0, 1], color="grey", linestyle="--")
    upper.plot(bins["confidence"], bins["accuracy"], "k.", label="mean confidence of the bin")
    upper.set(xlim=(0, 1), ylim=(0, 1), ylabel="accuracy")
    upper.legend(loc="upper left", fontsize=8)
    lower.bar(edges[:-1], bins["images"], np.diff(edges), align="edge", edgecolor="white")
    lower.set(xlabel="confidence", ylabel="images")
    _save(figure, path)


class _Grid:
    """Places for images, row by row, on one axis: an axis for each of them takes several times as long."""

    def __init__(self, rows: int, columns: int) -> None:
        self.figure = Figure(figsize=(WIDTH * columns / 100, HEIGHT * rows / 100), dpi=100)
        self.columns = columns
        self.axis = self.figure.add_axes((0, 0, 1, 1))
        self.axis.set(xlim=(0, WIDTH * columns), ylim=(HEIGHT * rows, 0))  # from the top left
        self.axis.axis("off")

    def show(self, place: int, image: np.ndarray, title: str = "", **style: Any) -> None:
        """image: (H, W) or (H, W, channels), drawn as large as there is room below three lines of title."""
        row, column = divmod(place, self.columns)
        scale = SIDE / max(image.shape[:2])
        height, width = scale * image.shape[0], scale * image.shape[1]
        middle, bottom = WIDTH * (column + 0.5), HEIGHT * (row + 1) - 4
        extent = (middle - width / 2, middle + width / 2, bottom, bottom - height)
        self.axis.imshow(image, extent=extent, aspect="auto", **style)
        self.axis.text(middle, bottom - height - 5, title, ha="center", va="bottom", fontsize=8, parse_math=False)

    def show_pixels(self, place: int, image: np.ndarray, title: str) -> None:
        """image: (C, H, W) in [0, 1]."""
        self.show(place, image.transpose(1, 2, 0), title, cmap="gray", vmin=0, vmax=1)


def _save(figure: Figure, path: Path) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from font")  # of a file or class; metrics/ has their names
        figure.savefig(path, metadata={"Software": None})  # without the version that matplotlib writes by default
