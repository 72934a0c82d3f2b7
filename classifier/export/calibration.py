"""Temperature scaling: divide logits by one number, so that the confidence matches the accuracy.

The predicted classes stay the same. Source: Guo et al. 2017, arXiv:1706.04599.
"""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from scipy.special import softmax
from torch import nn

from classifier.data.dataset import CustomImageDataset
from classifier.data.loader import Batches
from classifier.evaluation.metrics import expected_calibration_error, negative_log_likelihood
from classifier.export.formats import TemperatureScaled
from classifier.pipeline.errors import PipelineError
from classifier.training.inference import predict_logits

# If every prediction is correct, the likelihood grows as the temperature falls: these bounds keep it finite.
LOWEST, HIGHEST = 0.05, 20.0


def fit_temperature(logits: np.ndarray, labels: np.ndarray) -> float:
    """Return the temperature in [LOWEST, HIGHEST] that maximises the likelihood of labels (N,) int64 for logits (N, C).

    There is one maximum, because the log likelihood is concave in 1 / temperature.
    """
    from scipy.optimize import minimize_scalar

    def loss(log_temperature: float) -> float:
        return negative_log_likelihood(logits / math.exp(log_temperature), labels)

    bounds = math.log(LOWEST), math.log(HIGHEST)
    return math.exp(minimize_scalar(loss, bounds=bounds, method="bounded").x)


def calibrate(
    network: nn.Module,
    val_set: CustomImageDataset,
    test_set: CustomImageDataset,
    to_batches: Callable[[CustomImageDataset], Batches],
) -> tuple[TemperatureScaled, dict[str, Any]]:
    """Fit a temperature on the validation images; return the scaled network and facts for the manifest.

    network: on the CPU. to_batches: returns a dataset in batches on the CPU.
    The facts are the temperature, the number of validation images, and the expected calibration error and negative log
    likelihood of the test images before and after scaling. Raises PipelineError if there are no validation images.
    """
    if not len(val_set):
        raise PipelineError(
            "temperature_scaling: there are no validation images to fit the temperature on; set val_size above 0, or "
            "temperature_scaling to false"
        )
    val_logits, test_logits = (
        predict_logits(to_batches(dataset), network, "float32").double().numpy() for dataset in (val_set, test_set)
    )
    temperature, labels = fit_temperature(val_logits, val_set.labels.numpy()), test_set.labels.numpy()
    print(f"Temperature: {temperature:.4f}")

    def figures(logits: np.ndarray) -> dict[str, float]:
        ece = expected_calibration_error(softmax(logits, axis=1), labels)
        return {"ece": ece, "nll": negative_log_likelihood(logits, labels)}

    return TemperatureScaled(network, temperature), {
        "temperature": temperature,
        "validation_images": len(val_set),
        "test_before": figures(test_logits),
        "test_after": figures(test_logits / temperature),
    }
