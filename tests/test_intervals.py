"""Intervals of an evaluation's figures: against scikit-learn's scores, and against Wilson's where both are right."""

import numpy as np
import pytest
from sklearn.metrics import balanced_accuracy_score, f1_score

from classifier.cli.intervals import intervals
from classifier.evaluation.metrics import wilson_interval


def answers(count: int, classes: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Labels, predictions and probabilities of a network that is right four times in five."""
    chance = np.random.default_rng(1)
    labels = np.arange(count) % classes
    predicted = np.where(chance.random(count) < 0.8, labels, chance.integers(0, classes, count))
    probabilities = np.full((count, classes), 0.3 / (classes - 1))
    probabilities[np.arange(count), predicted] = 0.7
    return labels, predicted, probabilities


def test_each_interval_is_round_its_score() -> None:
    labels, predicted, probabilities = answers(500, 5)
    found = intervals(labels, predicted, probabilities)
    scores = {
        "accuracy": (labels == predicted).mean(),
        "balanced_accuracy": balanced_accuracy_score(labels, predicted),
        "macro_f1": f1_score(labels, predicted, average="macro"),
        "loss": -np.log(probabilities[np.arange(500), labels]).mean(),
    }
    assert found.keys() == {*scores, "top3_accuracy"}
    for name, score in scores.items():
        low, high = found[name]
        assert low < score < high, name
        assert high - low < 0.2, name


def test_resampling_gives_shares_wilsons_interval() -> None:
    labels, predicted, probabilities = answers(4000, 4)
    found = intervals(labels, predicted, probabilities)
    assert found["accuracy"] == wilson_interval(int((labels == predicted).sum()), 4000)
    assert found["balanced_accuracy"] == pytest.approx(found["accuracy"], abs=0.002)


def test_they_are_the_same_each_time() -> None:
    assert intervals(*answers(50, 4)) == intervals(*answers(50, 4))


def test_of_three_classes_there_is_no_top_3_and_of_one_image_there_are_intervals() -> None:
    assert "top3_accuracy" not in intervals(*answers(60, 3))
    assert intervals(*answers(1, 3))["balanced_accuracy"] == (1, 1)


def test_a_probability_that_was_rounded_to_0_has_a_finite_loss() -> None:
    low, high = intervals(np.array([0, 1]), np.array([0, 0]), np.array([[1.0, 0.0], [1.0, 0.0]]))["loss"]
    assert 0 <= low < high < np.inf
