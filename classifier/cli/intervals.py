"""95 % intervals of the figures of an evaluation, for the report: how much of a figure is the luck of its images."""

import numpy as np

from classifier.evaluation.metrics import wilson_interval

RESAMPLES = 1000
TOP = 3  # of top3_accuracy
Interval = tuple[float, float]


def intervals(labels: np.ndarray, predicted: np.ndarray, probabilities: np.ndarray) -> dict[str, Interval]:
    """Intervals of the scores of N >= 1 images by their names in metrics/test.json, but for the calibration error.

    labels, predicted: (N,) int64; probabilities: (N, C). Shares of images have Wilson's interval; the mean loss and
    the means over classes that of the percentiles of RESAMPLES resamples of the images, the same ones each time
    (Efron 1979, doi:10.1214/aos/1176344552). Resampling makes a calibration error larger, so it has none.
    """
    count, classes = probabilities.shape
    losses = -np.log(np.maximum(probabilities[np.arange(count), labels], np.finfo(float).tiny))
    cells = labels * classes + predicted
    figures: dict[str, list[float]] = {"loss": [], "balanced_accuracy": [], "macro_f1": []}
    chance = np.random.default_rng(0)
    for _ in range(RESAMPLES):
        weights = np.bincount(chance.integers(0, count, count), minlength=count)
        confusion = np.bincount(cells, weights, classes * classes).reshape(classes, classes)
        right, of_class, of_answer = confusion.diagonal(), confusion.sum(axis=1), confusion.sum(axis=0)
        are_there, are_used = of_class > 0, of_class + of_answer > 0
        figures["loss"].append(losses @ weights / count)
        figures["balanced_accuracy"].append((right[are_there] / of_class[are_there]).mean())
        figures["macro_f1"].append((2 * right[are_used] / (of_class + of_answer)[are_used]).mean())
    found = {name: (float(low), float(high)) for name, values in figures.items() for low, high in [_middle(values)]}
    found["accuracy"] = wilson_interval(int((labels == predicted).sum()), count)
    if classes > TOP:
        top = np.argpartition(-probabilities, TOP - 1, axis=1)[:, :TOP]
        found["top3_accuracy"] = wilson_interval(int((top == labels[:, None]).sum()), count)
    return found


def _middle(values: list[float]) -> np.ndarray:
    """The range of the middle 95 %."""
    return np.percentile(values, [2.5, 97.5])
