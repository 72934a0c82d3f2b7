"""Scores: pure functions of (logits, labels), and what they say about two models.

logits: (N, C) float; labels: (N,) int64 in [0, C), both NumPy arrays. All scores are fractions.
"""

import numpy as np
import pandas as pd
from scipy.special import log_softmax


def wilson_interval(correct: int, count: int, confidence: float = 0.95) -> tuple[float, float]:
    """Interval that holds the true accuracy with the given confidence, if the images are independent draws.

    Source: Wilson 1927, doi:10.1080/01621459.1927.10502953; unlike the normal one it stays within [0, 1].
    """
    from scipy.stats import binomtest  # two seconds of import, which only evaluate needs to spend

    interval = binomtest(correct, count).proportion_ci(confidence, method="wilson")
    return float(interval.low), float(interval.high)


def class_scores(logits: np.ndarray, labels: np.ndarray, names: list[str]) -> pd.DataFrame:
    """Precision, recall, F1 and the number of images of each class, one row a class, by label.

    A class that is never predicted has precision 0.
    """
    from sklearn.metrics import precision_recall_fscore_support

    precision, recall, f1, support = precision_recall_fscore_support(
        labels, logits.argmax(1), labels=range(len(names)), zero_division=0.0
    )
    return pd.DataFrame({"class": names, "precision": precision, "recall": recall, "f1": f1, "images": support})


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
