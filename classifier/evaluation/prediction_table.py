"""metrics/predictions.csv: predictions for each validation and test image, by the user's file name."""

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from scipy.special import softmax

from classifier.pipeline.annotations import csv_cell

DIGITS = 6  # significant digits of a probability
ROWS = 1000  # probabilities in memory at a time


class Predicted(NamedTuple):
    """The N images of a split. files: their names in the user's data; labels: (N,) int64; logits: (N, classes)."""

    split: str
    files: Sequence[str]
    labels: np.ndarray
    logits: np.ndarray


def write_predictions(path: Path, splits: Sequence[Predicted], classes: Sequence[str]) -> None:
    """Write one row per image: file, split, label, predicted, and the probability of each class as P(name).

    Text that a spreadsheet would read as a formula is quoted, see `csv_cell`.
    """
    cells = [*map(csv_cell, classes)]
    as_text = f"{{:.{DIGITS}g}}".format
    with path.open("w", encoding="utf-8", newline="") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(["file", "split", "label", "predicted", *(f"P({name})" for name in classes)])
        for split, files, labels, logits in splits:
            for start in range(0, len(files), ROWS):
                some = logits[start : start + ROWS].astype(np.float64)
                table.writerows(
                    [csv_cell(files[index]), split, cells[labels[index]], cells[answer], *map(as_text, row)]
                    for index, answer, row in zip(
                        range(start, start + len(some)), some.argmax(1), softmax(some, axis=1).tolist(), strict=True
                    )
                )
