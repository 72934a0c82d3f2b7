"""95 % intervals of the metrics in the report: the uncertainty that comes from the choice of the images."""

import numpy as np

from classifier.evaluation.metrics import metrics_for, wilson_interval

RESAMPLES = 1000
Interval = tuple[float, float]


def intervals(labels: np.ndarray, predicted: np.ndarray, probabilities: np.ndarray) -> dict[str, Interval]:
    """Return the interval of each registered metric that has one, by its key, for N >= 1 images.

    labels, predicted: (N,) int64; probabilities: (N, C), which may be rounded. Shares of images have Wilson's interval.
    Other means over images and functions of the confusion matrix have the percentile bootstrap with RESAMPLES
    resamples of the images, the same in each call. Source: Efron 1979, doi:10.1214/aos/1176344552.
    """
    count, classes = probabilities.shape
    logits = _logits(probabilities, predicted)
    found: dict[str, Interval] = {}
    means = {}  # key: values (N,) whose mean is resampled
    functions = {}  # key: function of the confusion matrix
    for metric in metrics_for(classes):
        if metric.of == "confusion":
            functions[metric.key] = metric.function
        elif metric.of == "image":
            values = metric.function(logits, labels)
            if values.dtype == bool:
                found[metric.key] = wilson_interval(int(values.sum()), count)
            else:
                means[metric.key] = values

    cells = labels * classes + predicted
    resampled: dict[str, list[float]] = {key: [] for key in (*means, *functions)}
    generator = np.random.default_rng(0)
    for _ in range(RESAMPLES):
        weights = np.bincount(generator.integers(0, count, count), minlength=count)
        confusion = np.bincount(cells, weights, classes**2).reshape(classes, classes)
        for key, values in means.items():
            resampled[key].append(values @ weights / count)
        for key, function in functions.items():
            resampled[key].append(function(confusion))
    for key, figures in resampled.items():
        low, high = np.percentile(figures, [2.5, 97.5])
        found[key] = float(low), float(high)
    return found


def _logits(probabilities: np.ndarray, predicted: np.ndarray) -> np.ndarray:
    """Return logits (N, C) with these probabilities. The predicted class has the largest, also where rounding ties."""
    logits: np.ndarray = np.log(np.maximum(probabilities, np.finfo(float).tiny))
    logits[np.arange(len(logits)), predicted] = np.nextafter(logits.max(axis=1), np.inf)
    return logits
