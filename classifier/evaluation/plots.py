"""Pictures of images and of a model's behaviour. Each function writes one PNG.

pixels: (N, C, H, W) float NumPy array in [0, 1] with one or three channels.
"""

import warnings
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

WIDTH, HEIGHT = 160, 194  # pixels of a cell, an image with its title
SIDE = 142  # pixels of the image's longer side
LETTERS = 26  # maximum per line of a title

# A user's matplotlibrc must not change the pictures.
_default_style = matplotlib.rc_context(
    {key: value for key, value in matplotlib.rcParamsDefault.items() if not key.startswith("backend")}
)


def title(*lines: str, file: str) -> str:
    """Return the title of an image. Long lines are cut at the end, a long file name at the beginning."""
    short = [line if len(line) <= LETTERS else f"{line[: LETTERS - 1]}…" for line in lines]
    return "\n".join([*short, file if len(file) <= LETTERS else f"…{file[1 - LETTERS :]}"])


@_default_style
def save_grid(path: Path, pixels: np.ndarray, titles: list[str], rows: int, columns: int) -> None:
    """Write images with their titles, row by row. Raises ValueError if there are more images than cells."""
    grid = _Grid(rows, columns)
    for place, image, title in zip(range(rows * columns)[: len(pixels)], pixels, titles, strict=True):
        grid.show_pixels(place, image, title)
    _save(grid.figure, path)


@_default_style
def save_saliency(path: Path, pixels: np.ndarray, saliency: np.ndarray, titles: list[str]) -> None:
    """Write images with their saliency below.

    saliency: (N, H, W), at least 0; each image is scaled by its maximum.
    """
    count = len(pixels)
    grid = _Grid(2, count)
    for column in range(count):
        grid.show_pixels(column, pixels[column], titles[column])
        grid.show(count + column, saliency[column], cmap="inferno")
    _save(grid.figure, path)


@_default_style
def save_reliability(path: Path, bins: pd.DataFrame) -> None:
    """Write a reliability diagram: accuracy by confidence, and below it the number of images in each bin.

    bins: the table that metrics.calibration_bins returns.
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
    """A grid of images on a single axis. An axis per image takes several times as long to draw."""

    def __init__(self, rows: int, columns: int) -> None:
        self.figure = Figure(figsize=(WIDTH * columns / 100, HEIGHT * rows / 100), dpi=100)
        self.columns = columns
        self.axis = self.figure.add_axes((0, 0, 1, 1))
        self.axis.set(xlim=(0, WIDTH * columns), ylim=(HEIGHT * rows, 0))  # from the top left
        self.axis.axis("off")

    def show(self, place: int, image: np.ndarray, title: str = "", **style: Any) -> None:
        """Draw an image, (H, W) or (H, W, C), scaled to SIDE, with up to three lines of title above."""
        row, column = divmod(place, self.columns)
        scale = SIDE / max(image.shape[:2])
        height, width = scale * image.shape[0], scale * image.shape[1]
        middle, bottom = WIDTH * (column + 0.5), HEIGHT * (row + 1) - 4
        extent = (middle - width / 2, middle + width / 2, bottom, bottom - height)
        self.axis.imshow(image, extent=extent, aspect="auto", **style)
        self.axis.text(middle, bottom - height - 5, title, ha="center", va="bottom", fontsize=8, parse_math=False)

    def show_pixels(self, place: int, image: np.ndarray, title: str) -> None:
        """Draw an image, (C, H, W) in [0, 1]."""
        self.show(place, image.transpose(1, 2, 0), title, cmap="gray", vmin=0, vmax=1)


def _save(figure: Figure, path: Path) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from font")  # in the name of a file or class
        figure.savefig(path, metadata={"Software": None})  # omit matplotlib's version
