"""Metrics: pure functions of logits and labels. `@metric` registers those that describe a whole split.

Shapes, unless stated otherwise: logits (N, C) float, labels (N,) int64 in [0, C), both NumPy arrays.
A registered metric appears in metrics/test.json, in MLflow, in the report and in the model card.
"""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple, TypeVar

import numpy as np
import pandas as pd
from scipy.special import log_softmax, softmax

CALIBRATION_BINS = 15  # as in Guo et al. 2017
Basis = Literal["image", "confusion", "split"]
Function = TypeVar("Function", bound=Callable[..., Any])


class Metric(NamedTuple):
    """A registered metric. key: its name in metrics/test.json. `metric` describes the other fields."""

    key: str
    title: str
    better: Literal["higher", "lower"]
    percent: bool
    of: Basis
    min_classes: int
    function: Callable[..., Any]

    def value(self, logits: np.ndarray, labels: np.ndarray) -> float:
        """Return the value for N >= 1 images."""
        if self.of == "confusion":
            return float(self.function(confusion_matrix(logits.argmax(1), labels, logits.shape[1])))
        return float(np.mean(self.function(logits, labels)))


METRICS: dict[str, Metric] = {}  # by key, in the order of metrics/test.json


def metric(
    title: str, *, of: Basis, better: Literal["higher", "lower"], percent: bool = True, min_classes: int = 1
) -> Callable[[Function], Function]:
    """Register the decorated function as a metric. Its name becomes the key in metrics/test.json.

    title: name in the report and the model card.
    of: what the function computes, which also selects the 95 % interval in the report.
        "image": (logits, labels) -> (N,), one value per image; the metric is their mean. The interval is Wilson's
        for booleans, a bootstrap of the mean for floats.
        "confusion": (C, C) confusion matrix -> float, see `confusion_matrix`. The interval is a bootstrap.
        "split": (logits, labels) -> float. No interval.
    better: direction of an improvement.
    percent: the value is a fraction, displayed as a percentage; otherwise it is displayed with five decimals.
    min_classes: with fewer classes the metric is omitted.
    """

    def register(function: Function) -> Function:
        key = function.__name__
        METRICS[key] = Metric(key, title, better, percent, of, min_classes, function)
        return function

    return register


def metrics_for(classes: int) -> list[Metric]:
    """Return the registered metrics that are defined for this number of classes."""
    return [metric for metric in METRICS.values() if classes >= metric.min_classes]


def overall_scores(logits: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Return the value of each registered metric by its key."""
    return {metric.key: metric.value(logits, labels) for metric in metrics_for(logits.shape[1])}


def confusion_matrix(predicted: np.ndarray, labels: np.ndarray, classes: int) -> np.ndarray:
    """Return the number of images by label (row) and predicted class (column), (C, C) int64."""
    return np.bincount(labels * classes + predicted, minlength=classes**2).reshape(classes, classes)


# ---- registered metrics


@metric("Accuracy", of="image", better="higher")
def accuracy(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Return whether each image is classified correctly, (N,) bool. Ties go to the lower label."""
    return np.asarray(logits.argmax(1) == labels)


@metric("Loss", of="image", better="lower", percent=False)
def loss(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Return the cross entropy of each image in nats, (N,) float64.

    metrics/test.json has the mean of batch means under this key, which the tutorial prints as `Avg loss`.
    """
    log_probabilities = log_softmax(logits.astype(np.float64), axis=1)
    losses: np.ndarray = -log_probabilities[np.arange(len(labels)), labels]
    return losses


@metric("Balanced accuracy", of="confusion", better="higher")
def balanced_accuracy(confusion: np.ndarray) -> float:
    """Return the mean recall of the classes that have images."""
    images = confusion.sum(axis=1)
    present = images > 0
    return float((confusion.diagonal()[present] / images[present]).mean())


@metric("Macro F1", of="confusion", better="higher")
def macro_f1(confusion: np.ndarray) -> float:
    """Return the mean F1 of the classes that have images or are predicted."""
    total = confusion.sum(axis=1) + confusion.sum(axis=0)
    used = total > 0
    return float((2 * confusion.diagonal()[used] / total[used]).mean())


@metric("Top-3 accuracy", of="image", better="higher", min_classes=4)
def top3_accuracy(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Return whether each label is among the three largest logits, (N,) bool. Ties go to the lower label."""
    of_label = np.take_along_axis(logits, labels[:, None], axis=1)
    wins_tie = np.arange(logits.shape[1]) < labels[:, None]
    larger = (logits > of_label) | ((logits == of_label) & wins_tie)
    return np.asarray(larger.sum(axis=1) < 3)


@metric("Calibration error", of="split", better="lower")  # a bootstrap would be biased: resampling increases the error
def ece(logits: np.ndarray, labels: np.ndarray) -> float:
    """Return the expected calibration error of the softmax, see `expected_calibration_error`."""
    return expected_calibration_error(softmax(logits.astype(np.float64), axis=1), labels)


# ---- other functions


def wilson_interval(correct: int, count: int) -> tuple[float, float]:
    """Return the 95 % confidence interval of a share of `count` independent images.

    Unlike the normal approximation it stays within [0, 1]. Source: Wilson 1927, doi:10.1080/01621459.1927.10502953.
    """
    from scipy.stats import binomtest  # takes two seconds to import

    interval = binomtest(correct, count).proportion_ci(0.95, method="wilson")
    return float(interval.low), float(interval.high)


def largest_class(labels: np.ndarray) -> tuple[int, float]:
    """Return the most frequent label and its share, which is the accuracy of always predicting it. N >= 1."""
    counts = np.bincount(labels)
    return int(counts.argmax()), float(counts.max() / len(labels))


def class_scores(logits: np.ndarray, labels: np.ndarray, names: list[str]) -> pd.DataFrame:
    """Return a table with one row per class, in the order of the labels: class, precision, recall, f1, images.

    The precision of a class that is never predicted is 0.
    """
    from sklearn.metrics import precision_recall_fscore_support

    precision, recall, f1, support = precision_recall_fscore_support(
        labels, logits.argmax(1), labels=range(len(names)), zero_division=0.0
    )
    return pd.DataFrame({"class": names, "precision": precision, "recall": recall, "f1": f1, "images": support})


def calibration_bins(probabilities: np.ndarray, labels: np.ndarray) -> pd.DataFrame:
    """Group images by confidence, the probability of the predicted class, in CALIBRATION_BINS bins of equal width.

    probabilities: (N, C) float; rows sum to 1.
    Returns one row per bin: number of `images`, mean `confidence`, `accuracy`. The latter two are NaN in empty bins.
    A bin includes its upper end and excludes its lower end: 1.0 is in the last bin.
    Raises ValueError if N == 0 or a row does not sum to 1 within 1e-3.
    """
    if len(probabilities) == 0:
        raise ValueError("there are no images")
    sums = probabilities.sum(axis=1)
    if wrong := np.flatnonzero(~(np.abs(sums - 1) <= 1e-3)).tolist():  # negated so that NaN is rejected
        raise ValueError(f"the probabilities of image {wrong[0]} sum to {sums[wrong[0]]:g}, not to 1")
    confidence = probabilities.max(axis=1)
    numbers = np.minimum(np.ceil(confidence * CALIBRATION_BINS).astype(int), CALIBRATION_BINS) - 1
    images = np.bincount(numbers, minlength=CALIBRATION_BINS)
    right = np.bincount(numbers, probabilities.argmax(axis=1) == labels, CALIBRATION_BINS)
    with np.errstate(invalid="ignore"):  # 0 / 0 is NaN
        confidence = np.bincount(numbers, confidence, CALIBRATION_BINS) / images
        return pd.DataFrame({"images": images, "confidence": confidence, "accuracy": right / images})


def expected_calibration_error(probabilities: np.ndarray, labels: np.ndarray) -> float:
    """Return the mean gap between confidence and accuracy over the bins of `calibration_bins`, weighted by bin size.

    probabilities: (N, C) float; rows sum to 1. Raises ValueError as `calibration_bins` does.
    Returns a fraction: 0.03 means three percentage points. Source: Guo et al. 2017, arXiv:1706.04599.
    """
    bins = calibration_bins(probabilities, labels)
    gaps = (bins["accuracy"] - bins["confidence"]).abs()
    return float((gaps * bins["images"]).sum() / len(labels))  # the sum skips the NaN of empty bins


def negative_log_likelihood(logits: np.ndarray, labels: np.ndarray) -> float:
    """Return the mean cross entropy in nats. All images have the same weight."""
    return float(loss(logits, labels).mean())


def most_confident_mistakes(logits: np.ndarray, labels: np.ndarray, count: int) -> np.ndarray:
    """Return the indices of up to `count` misclassified images, highest confidence first."""
    log_probabilities = log_softmax(logits.astype(np.float64), axis=1)
    predicted = logits.argmax(1)
    wrong = np.flatnonzero(predicted != labels)
    order = np.argsort(-log_probabilities[wrong, predicted[wrong]], kind="stable")
    return wrong[order][:count]


def mcnemar(only_first: int, only_second: int) -> float:
    """Return the p-value of the exact two-sided McNemar test that two models are equally accurate.

    only_first, only_second: number of images of the same test set that only this model classifies correctly.
    Source: McNemar 1947, doi:10.1007/BF02295996.
    """
    from scipy.stats import binomtest

    count = only_first + only_second
    return float(binomtest(only_first, count).pvalue) if count else 1.0
