"""Charts of finished runs: curves over epochs as SVG for the report, the spread over seeds as PNG.

They are not in evaluation/plots.py, a dependency of the evaluate stage: editing a chart must not rerun it.
"""

import io
import re
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import MaxNLocator

INK, BLUE, ORANGE, GREY = "#22262b", "#2b5f92", "#b8531b", "#626a73"
# The page defines the colours of the SVG for light and dark mode.
CSS_COLOURS = {INK: "currentColor", BLUE: "var(--blue)", ORANGE: "var(--orange)", GREY: "var(--quiet)"}
LINES = {"training": (ORANGE, "--"), "validation": (BLUE, "-")}

# A user's matplotlibrc must not change the charts. SVG text stays text, and the salt makes its ids reproducible.
_own_style = style.context(["default", {"svg.fonttype": "none", "svg.hashsalt": "charts", "text.color": INK}])


@_own_style
def curves(epochs: pd.DataFrame, lines: dict[str, str], kept: int, title: str, percent: bool = False) -> str:
    """Return an SVG element with curves over epochs, in the colours of the surrounding page.

    epochs: one row per epoch. lines: the column to draw for each of the keys of LINES; values that are not finite leave
    a gap. kept: epoch to mark. title: for screen readers. percent: the values are fractions, displayed as percentages.
    """
    figure = Figure(figsize=(480 / 72, 270 / 72))  # SVG has 72 units per inch: 480 x 270
    axes = figure.add_axes((0.1, 0.15, 0.89, 0.76))
    for name, column in lines.items():
        colour, dashes = LINES[name]
        values = epochs[column].replace([np.inf, -np.inf], np.nan)
        size = 4 if len(epochs) <= 40 else 0
        axes.plot(epochs["epoch"], values, dashes, color=colour, linewidth=2, marker="o", markersize=size)
    axes.axvline(kept, color=GREY, linestyle=":")
    first, last = epochs["epoch"].min(), epochs["epoch"].max()
    beside = "right" if kept > (first + last) / 2 else "left"
    above = axes.get_xaxis_transform()  # x in epochs, y as a fraction of the chart's height
    axes.text(kept, 1.03, f"kept: epoch {kept}", transform=above, ha=beside, fontsize=12)
    margin = (last - first) / 20 or 0.5
    axes.set_xlim(first - margin, last + margin)
    axes.xaxis.set_major_locator(MaxNLocator(11, steps=[1, 2, 5, 10], integer=True, min_n_ticks=1))
    axes.yaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
    if percent:
        axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.6g}%")
    axes.set_xlabel("epoch", color=GREY, fontsize=12)
    _plain(axes, fontsize=12)
    drawn = io.StringIO()
    nothing = dict.fromkeys(["Creator", "Date", "Format", "Type"])
    figure.savefig(drawn, format="svg", transparent=True, metadata=nothing)
    svg = drawn.getvalue()
    # Remove ids, which would repeat on the page, and fonts, so that the page's font applies
    svg = re.sub(r'(?<=<g) id="[^"]*"| font-family: [^;]*;', "", svg[svg.index("<svg") :])
    for colour, css in CSS_COLOURS.items():
        svg = svg.replace(colour, css)
    return svg.replace("<svg", f'<svg role="img" aria-label="{title} by epoch, kept: epoch {kept}"', 1)


@_own_style
def save_spread(path: Path, values: dict[str, list[float]]) -> None:
    """Write a PNG with a panel per metric: a dot per seed, the mean, and a band of one standard deviation.

    values: one value per seed, at least two, by the name of the metric. The standard deviation divides by n - 1.
    """
    layout = ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.1)
    figure = Figure(figsize=(2.1 * len(values), 3.2), dpi=150, layout=layout)
    for axes, (metric, numbers) in zip(
        figure.subplots(1, len(values), squeeze=False).flat, values.items(), strict=True
    ):
        mean, deviation = float(np.mean(numbers)), float(np.std(numbers, ddof=1))
        axes.axhspan(mean - deviation, mean + deviation, color=BLUE, alpha=0.13, linewidth=0)
        axes.axhline(mean, color=BLUE)
        aside = np.arange(1, len(numbers) + 1) * 0.618034 % 1 - 0.5  # multiples of the golden ratio are evenly spread
        axes.plot(aside, numbers, "o", color=ORANGE, alpha=0.75, markersize=6, markeredgecolor="white")
        axes.set(xlim=(-1, 1), xticks=[], title=metric)
        axes.set_xlabel(f"{mean:.4f} ± {deviation:.4f}", color=INK, fontsize=9)
        axes.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
        axes.title.set_fontsize(9)
        _plain(axes, fontsize=8)
    figure.savefig(path, metadata={"Software": None})  # omit matplotlib's version


def _plain(axes: Axes, fontsize: int) -> None:
    """Remove the frame and draw faint horizontal lines."""
    axes.spines[:].set_visible(False)
    axes.grid(axis="y", color=GREY, alpha=0.25)
    axes.set_axisbelow(True)
    axes.tick_params(length=0, labelsize=fontsize, labelcolor=GREY)
