"""Intervals of the metrics, against scikit-learn's scores and Wilson's intervals."""

import numpy as np
import pytest
from sklearn.metrics import balanced_accuracy_score, f1_score

from classifier.cli.intervals import intervals
from classifier.evaluation.metrics import METRICS, wilson_interval


def answers(count: int, classes: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return labels, predictions and probabilities of a network with an accuracy of about 0.8."""
    generator = np.random.default_rng(1)
    labels = np.arange(count) % classes
    predicted = np.where(generator.random(count) < 0.8, labels, generator.integers(0, classes, count))
    probabilities = np.full((count, classes), 0.3 / (classes - 1))
    probabilities[np.arange(count), predicted] = 0.7
    return labels, predicted, probabilities


def test_each_interval_contains_its_score() -> None:
    labels, predicted, probabilities = answers(500, 5)
    found = intervals(labels, predicted, probabilities)
    scores = {
        "accuracy": (labels == predicted).mean(),
        "balanced_accuracy": balanced_accuracy_score(labels, predicted),
        "macro_f1": f1_score(labels, predicted, average="macro"),
        "loss": -np.log(probabilities[np.arange(500), labels]).mean(),
    }
    assert found.keys() == {*scores, "top3_accuracy"} == {*METRICS} - {"ece"}
    for name, score in scores.items():
        low, high = found[name]
        assert low < score < high, name
        assert high - low < 0.2, name


def test_the_bootstrap_agrees_with_wilsons_interval() -> None:
    labels, predicted, probabilities = answers(4000, 4)
    found = intervals(labels, predicted, probabilities)
    assert found["accuracy"] == wilson_interval(int((labels == predicted).sum()), 4000)
    assert found["balanced_accuracy"] == pytest.approx(found["accuracy"], abs=0.002)


def test_intervals_are_deterministic() -> None:
    assert intervals(*answers(50, 4)) == intervals(*answers(50, 4))


def test_three_classes_and_one_image() -> None:
    assert "top3_accuracy" not in intervals(*answers(60, 3))
    assert intervals(*answers(1, 3))["balanced_accuracy"] == (1, 1)


def test_a_probability_rounded_to_0_has_a_finite_loss() -> None:
    low, high = intervals(np.array([0, 1]), np.array([0, 0]), np.array([[1.0, 0.0], [1.0, 0.0]]))["loss"]
    assert 0 <= low < high < np.inf


def test_the_predicted_class_counts_where_rounded_probabilities_tie() -> None:
    labels, tied = np.array([1, 1, 0]), np.full((3, 2), 0.5)
    assert intervals(labels, labels, tied)["balanced_accuracy"] == (1, 1)
    assert intervals(labels, 1 - labels, tied)["balanced_accuracy"] == (0, 0)
    assert intervals(labels, labels, tied)["accuracy"] == wilson_interval(3, 3)
