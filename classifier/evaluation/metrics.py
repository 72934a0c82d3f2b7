"""Scores: pure functions of (logits, labels), and what they say about two models.

logits: (N, C) float; labels: (N,) int64 in [0, C), both NumPy arrays. All scores but the likelihood are fractions.
"""

import warnings

import numpy as np
import pandas as pd
from scipy.special import log_softmax, softmax

CALIBRATION_BINS = 15  # of equal width; the number that Guo et al. 2017 use


def wilson_interval(correct: int, count: int) -> tuple[float, float]:
    """Interval that holds the true accuracy with a confidence of 95 %, if the images are independent draws.

    Source: Wilson 1927, doi:10.1080/01621459.1927.10502953; unlike the normal one it stays within [0, 1].
    """
    from scipy.stats import binomtest  # two seconds of import, which only evaluate needs to spend

    interval = binomtest(correct, count).proportion_ci(0.95, method="wilson")
    return float(interval.low), float(interval.high)


def largest_class(labels: np.ndarray) -> tuple[int, float]:
    """The label that (N,) labels have most often, and its share of them: the accuracy of always giving it. N >= 1."""
    counts = np.bincount(labels)
    return int(counts.argmax()), float(counts.max() / len(labels))


def class_scores(logits: np.ndarray, labels: np.ndarray, names: list[str]) -> pd.DataFrame:
    """Precision, recall, F1 and the number of images of each class, one row a class, by label.

    A class that is never predicted has precision 0.
    """
    from sklearn.metrics import precision_recall_fscore_support

    precision, recall, f1, support = precision_recall_fscore_support(
        labels, logits.argmax(1), labels=range(len(names)), zero_division=0.0
    )
    return pd.DataFrame({"class": names, "precision": precision, "recall": recall, "f1": f1, "images": support})


def overall_scores(logits: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Scores of all classes together, besides the accuracy.

    balanced_accuracy: mean recall of the classes that have images.
    macro_f1: mean F1 of the classes that have images or are predicted.
    top3_accuracy: how often the class is among the three largest logits; only where there are more than three classes.
    ece: the expected calibration error of the softmax.
    """
    from sklearn.metrics import balanced_accuracy_score, f1_score, top_k_accuracy_score

    classes = logits.shape[1]
    predicted = logits.argmax(1)
    with warnings.catch_warnings(action="ignore"):  # of classes that have no images
        scores = {
            "balanced_accuracy": float(balanced_accuracy_score(labels, predicted)),
            "macro_f1": float(f1_score(labels, predicted, average="macro")),
        }
    if classes > 3:
        # Backwards, for scikit-learn gives a tie to the higher label, argmax to the lower
        backwards = classes - 1 - labels, logits[:, ::-1]
        scores["top3_accuracy"] = float(top_k_accuracy_score(*backwards, k=3, labels=range(classes)))
    return scores | {"ece": expected_calibration_error(softmax(logits.astype(np.float64), axis=1), labels)}


def calibration_bins(probabilities: np.ndarray, labels: np.ndarray) -> pd.DataFrame:
    """By confidence, the probability of the answer, in bins of equal width: how many images, and how many are right.

    probabilities: (N, C) float; rows sum to 1.
    Returns CALIBRATION_BINS rows with `images`, their mean `confidence` and their `accuracy`, NaN where there are none.
    A bin holds its upper end, not its lower: 1.0 is in the last.
    Raises ValueError if N = 0 or a row does not sum to 1 within 1e-3.
    """
    if len(probabilities) == 0:
        raise ValueError("there are no images")
    sums = probabilities.sum(axis=1)
    if wrong := np.flatnonzero(~(np.abs(sums - 1) <= 1e-3)).tolist():  # also where one is not a number
        raise ValueError(f"the probabilities of image {wrong[0]} sum to {sums[wrong[0]]:g}, not to 1")
    confidence = probabilities.max(axis=1)
    numbers = np.minimum(np.ceil(confidence * CALIBRATION_BINS).astype(int), CALIBRATION_BINS) - 1
    images = np.bincount(numbers, minlength=CALIBRATION_BINS)
    right = np.bincount(numbers, probabilities.argmax(axis=1) == labels, CALIBRATION_BINS)
    with np.errstate(invalid="ignore"):  # 0 / 0 is NaN
        confidence = np.bincount(numbers, confidence, CALIBRATION_BINS) / images
        return pd.DataFrame({"images": images, "confidence": confidence, "accuracy": right / images})


def expected_calibration_error(probabilities: np.ndarray, labels: np.ndarray) -> float:
    """Mean gap between confidence and accuracy over `calibration_bins`, weighted by the number of images.

    probabilities, and the ValueErrors, as there. 0.03 means three percentage points.
    Source: Guo et al. 2017, arXiv:1706.04599.
    """
    bins = calibration_bins(probabilities, labels)
    gaps = (bins["accuracy"] - bins["confidence"]).abs()
    return float((gaps * bins["images"]).sum() / len(labels))  # the sum passes over NaN


def negative_log_likelihood(logits: np.ndarray, labels: np.ndarray) -> float:
    """Mean of -log(probability of the right class), in nats: the cross entropy, every image counting the same."""
    log_probabilities = log_softmax(logits.astype(np.float64), axis=1)
    return float(-log_probabilities[np.arange(len(labels)), labels].mean())


def most_confident_mistakes(logits: np.ndarray, labels: np.ndarray, count: int) -> np.ndarray:
    """Indices of up to `count` wrongly classified images, the most probable wrong answer first."""
    log_probabilities = log_softmax(logits.astype(np.float64), axis=1)
    predicted = logits.argmax(1)
    wrong = np.flatnonzero(predicted != labels)
    order = np.argsort(-log_probabilities[wrong, predicted[wrong]], kind="stable")
    return wrong[order][:count]


def mcnemar(only_first: int, only_second: int) -> float:
    """How probable a difference as large as this one is between two models that are equally good, in [0, 1].

    only_first, only_second: counts of the images, of one test set, that only this model classifies rightly.
    Exact and two-sided. Source: McNemar 1947, doi:10.1007/BF02295996.
    """
    from scipy.stats import binomtest

    count = only_first + only_second
    return float(binomtest(only_first, count).pvalue) if count else 1.0
