"""Pictures of images and of a model. Every function writes one PNG.

pixels: (N, C, H, W) float in [0, 1] with one or three channels, a NumPy array.
"""

from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

# A user's matplotlibrc must not change the pictures.
_default_style = matplotlib.rc_context(
    {key: value for key, value in matplotlib.rcParamsDefault.items() if not key.startswith("backend")}
)


@_default_style
def save_grid(path: Path, pixels: np.ndarray, titles: list[str], rows: int, columns: int) -> None:
    """Images with their titles, row by row; places without an image stay empty, and too many images are an error."""
    figure, axes = _grid(rows, columns)
    for axis, image, title in zip(axes[: len(pixels)], pixels, titles, strict=True):
        _show(axis, image)
        axis.set_title(title, fontsize=8, parse_math=False)
    _save(figure, path)


@_default_style
def save_saliency(path: Path, pixels: np.ndarray, saliency: np.ndarray, titles: list[str]) -> None:
    """Images and, below each, how much the winning logit changes with each pixel.

    saliency: (N, H, W), 0 or more; each image is scaled to its own largest value.
    """
    count = len(pixels)
    figure, axes = _grid(2, count)
    for column in range(count):
        _show(axes[column], pixels[column])
        axes[column].set_title(titles[column], fontsize=8, parse_math=False)
        axes[count + column].imshow(saliency[column], cmap="inferno")
    _save(figure, path)


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


def _grid(rows: int, columns: int) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(1.6 * columns, 1.8 * rows), dpi=100)
    # Room for two lines of title over each image; a layout that measures them takes longer than the drawing
    figure.subplots_adjust(left=0.02, right=0.98, bottom=0.02, top=1 - 0.2 / rows, wspace=0.1, hspace=0.25)
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axis in axes:
        axis.axis("off")
    return figure, axes


def _show(axis: Axes, image: np.ndarray) -> None:
    axis.imshow(image.transpose(1, 2, 0), cmap="gray", vmin=0, vmax=1)


def _save(figure: Figure, path: Path) -> None:
    figure.savefig(path, metadata={"Software": None})  # without the version that matplotlib writes by default
