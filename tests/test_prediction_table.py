"""metrics/predictions.csv: the row of each image, by the name that its file had."""

import csv
from pathlib import Path
from time import process_time

import numpy as np
import pytest
from scipy.special import softmax

from classifier.evaluation.prediction_table import Predicted, write_predictions

LOGITS = np.array([[0, 2, 1], [3, 0, 0]], np.float32)


def written(path: Path, *splits: Predicted, classes: list[str]) -> list[list[str]]:
    write_predictions(path / "predictions.csv", splits, classes)
    with (path / "predictions.csv").open(encoding="utf-8", newline="") as file:
        return [*csv.reader(file)]


def test_a_row_has_file_split_label_prediction_and_the_probability_of_each_class(tmp_path: Path) -> None:
    val, test = (Predicted(split, [f"{split}/0", f"{split}/1"], np.array([1, 2]), LOGITS) for split in ("val", "test"))
    header, *rows = written(tmp_path, val, test, classes=["hat", "bag", "coat"])
    assert header == ["file", "split", "label", "predicted", "P(hat)", "P(bag)", "P(coat)"]
    assert [row[:4] for row in rows] == [
        ["val/0", "val", "bag", "bag"],
        ["val/1", "val", "coat", "hat"],
        ["test/0", "test", "bag", "bag"],
        ["test/1", "test", "coat", "hat"],
    ]
    probabilities = np.array([row[4:] for row in rows[2:]], float)
    assert probabilities == pytest.approx(softmax(LOGITS.astype(float), axis=1), rel=1e-5)


def test_files_have_the_names_that_they_had_in_the_users_data(tmp_path: Path) -> None:
    predicted = Predicted("test", ["été, 1/a.JPG", "test/00000.png"], np.array([0, 0]), LOGITS)
    _, *rows = written(tmp_path, predicted, classes=["a", "b", "c"])
    assert [row[0] for row in rows] == ["été, 1/a.JPG", "test/00000.png"]


def test_a_spreadsheet_takes_no_name_for_a_formula(tmp_path: Path) -> None:
    predicted = Predicted("test", ["=cmd.png", "@a.png"], np.array([0, 1]), LOGITS)
    header, *rows = written(tmp_path, predicted, classes=["=1+1", "-2", "+x"])
    assert [row[:4] for row in rows] == [["'=cmd.png", "test", "'=1+1", "-2"], ["'@a.png", "test", "-2", "'=1+1"]]
    assert header[4:] == ["P(=1+1)", "P(-2)", "P(+x)"]


def test_fifteen_thousand_images_of_ten_classes_take_a_moment(tmp_path: Path) -> None:
    files = [f"test/{index:05}.png" for index in range(15_000)]
    logits = np.random.default_rng(0).normal(size=(15_000, 10)).astype(np.float32)
    predicted = Predicted("test", files, np.zeros(15_000, np.int64), logits)
    started = process_time()
    write_predictions(tmp_path / "predictions.csv", [predicted], ["class"] * 10)
    assert process_time() - started < 5  # 0.2 seconds of a quiet core
