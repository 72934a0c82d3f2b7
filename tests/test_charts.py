"""The charts: what they show of the figures, and that neither a user's settings nor odd values change or break them."""

import re
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
import pytest
from PIL import Image

from classifier.cli.charts import curves, save_spread

NAN, INF = float("nan"), float("inf")


def losses(*values: float) -> pd.DataFrame:
    return pd.DataFrame({"epoch": range(1, len(values) + 1), "loss": values})


def draw(epochs: pd.DataFrame, kept: int = 1, percent: bool = False) -> str:
    return curves(epochs, {"validation": "loss"}, kept, "Loss", percent)


def texts(svg: str) -> list[str]:
    """The texts of a chart: ticks, name of the axis, note."""
    return re.findall(r"<text [^>]*>([^<]*)</text>", svg)


@pytest.mark.parametrize(
    ("count", "epochs"),
    [(1, ["1"]), (10, [str(epoch) for epoch in range(1, 11)]), (100, [*map(str, range(0, 101, 10))])],
)
def test_epochs_are_whole_numbers_and_not_too_many(count: int, epochs: list[str]) -> None:
    shown = texts(draw(losses(*np.linspace(2, 0.5, count))))
    assert shown[: shown.index("epoch")] == epochs
    assert shown[-1] == "kept: epoch 1"


@pytest.mark.parametrize("values", [(1.0, NAN, 3.0, INF), (NAN,), (1e-9, 4e29)])
def test_odd_values_do_not_break_the_chart(values: tuple[float, ...]) -> None:
    svg = draw(losses(*values), kept=len(values))
    assert f"kept: epoch {len(values)}" in texts(svg)
    assert not re.search(r"\b(nan|inf)\b", svg)


def test_accuracies_are_shown_as_percentages() -> None:
    assert {"60%", "70%", "80%"} <= set(texts(draw(losses(0.6, 0.7, 0.8), percent=True)))


def test_the_page_chooses_colours_and_font() -> None:
    svg = curves(losses(2, 1), {"training": "loss", "validation": "loss"}, 2, "Loss")
    assert {"currentColor", "var(--orange)", "var(--blue)"} <= set(re.findall(r"(?:stroke|fill): ([^;\"]+)", svg))
    assert "font-family" not in svg
    assert 'role="img" aria-label="Loss by epoch, kept: epoch 2"' in svg
    assert not re.search(r"<metadata|<!DOCTYPE|<g id", svg)


def draw_spread(path: Path, count: int) -> None:
    accuracies = np.random.default_rng(0).normal(0.7, 0.01, count)
    save_spread(path, {"test accuracy": list(accuracies), "train epoch": [10] * count})


@pytest.mark.parametrize("count", [2, 50])
def test_a_spread_is_drawn_for_few_and_for_many_seeds(tmp_path: Path, count: int) -> None:
    draw_spread(tmp_path / "seeds.png", count)
    with Image.open(tmp_path / "seeds.png") as picture:
        assert picture.size == (630, 480)  # a panel for each metric
        assert not picture.info.keys() - {"dpi"}  # no version, no date
        assert np.asarray(picture.convert("L")).std() > 5  # something is drawn


def test_a_users_matplotlib_settings_change_nothing(tmp_path: Path) -> None:
    svg = draw(losses(2, 1))
    draw_spread(tmp_path / "first.png", 5)
    with matplotlib.rc_context({"font.size": 30, "savefig.dpi": 50, "svg.fonttype": "path", "axes.grid.axis": "x"}):
        assert draw(losses(2, 1)) == svg
        draw_spread(tmp_path / "second.png", 5)
    assert (tmp_path / "second.png").read_bytes() == (tmp_path / "first.png").read_bytes()
