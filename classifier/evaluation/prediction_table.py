"""metrics/predictions.csv: what the network says of each validation and test image, by the name that its file had."""

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from scipy.special import softmax

from classifier.pipeline.annotations import csv_cell

DIGITS = 6  # of a probability
ROWS = 1000  # of which there are probabilities in memory at a time


class Predicted(NamedTuple):
    """The N images of a split. files: their names in the user's data; labels: (N,) int64; logits: (N, classes)."""

    split: str
    files: Sequence[str]
    labels: np.ndarray
    logits: np.ndarray


def write_predictions(path: Path, splits: Sequence[Predicted], classes: Sequence[str]) -> None:
    """Write a row an image: file, split, label, predicted, then the probability of each class as P(name).

    What a spreadsheet would take for a formula is quoted, see `csv_cell`.
    """
    cells = [*map(csv_cell, classes)]
    spelt = f"{{:.{DIGITS}g}}".format
    with path.open("w", encoding="utf-8", newline="") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(["file", "split", "label", "predicted", *(f"P({name})" for name in classes)])
        for split, files, labels, logits in splits:
            for start in range(0, len(files), ROWS):
                some = logits[start : start + ROWS].astype(np.float64)
                table.writerows(
                    [csv_cell(files[index]), split, cells[labels[index]], cells[answer], *map(spelt, row)]
                    for index, answer, row in zip(
                        range(start, start + len(some)), some.argmax(1), softmax(some, axis=1).tolist(), strict=True
                    )
                )
