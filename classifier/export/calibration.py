"""Temperature scaling: logits divided by one number, so that probabilities are as high as the answers are right.

The answers stay the same. Source: Guo et al. 2017, arXiv:1706.04599.
"""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from scipy.special import softmax
from torch import nn

from classifier.data.dataset import CustomImageDataset
from classifier.data.loader import batches_of
from classifier.evaluation.metrics import expected_calibration_error, negative_log_likelihood
from classifier.export.formats import TemperatureScaled
from classifier.pipeline.errors import PipelineError
from classifier.pipeline.params import Params
from classifier.training.inference import predict

# Where all answers are right, no temperature is too low: then it is the lowest, or one at which all are certain.
LOWEST, HIGHEST = 0.05, 20.0


def fit_temperature(logits: np.ndarray, labels: np.ndarray) -> float:
    """The temperature from LOWEST to HIGHEST that makes the labels (N,) int64 of logits (N, C) most likely.

    The likelihood has one maximum over it, for its logarithm is concave in 1 / temperature.
    """
    from scipy.optimize import minimize_scalar

    def loss(log_temperature: float) -> float:
        return negative_log_likelihood(logits / math.exp(log_temperature), labels)

    bounds = math.log(LOWEST), math.log(HIGHEST)
    return math.exp(minimize_scalar(loss, bounds=bounds, method="bounded").x)


def calibrated(
    network: nn.Module, splits: Mapping[str, CustomImageDataset], params: Params
) -> tuple[TemperatureScaled, dict[str, Any]]:
    """The network with the temperature that fits the validation images, and what it does on the test images.

    network: on the CPU; splits: `val` and `test`.
    The latter is for the manifest: the temperature, the number of validation images, and the expected calibration
    error and negative log likelihood before and after, on the test images.
    Raises PipelineError if there are no validation images.
    """
    if not len(splits["val"]):
        raise PipelineError(
            "temperature_scaling: there are no validation images to fit the temperature on; set val_size above 0, or "
            "temperature_scaling to false"
        )
    fitted_on, logits = (
        predict(batches_of(splits[name], params, torch.device("cpu")), network, "float32").double().numpy()
        for name in ("val", "test")
    )
    temperature, labels = fit_temperature(fitted_on, splits["val"].labels.numpy()), splits["test"].labels.numpy()
    print(f"Temperature: {temperature:.4f}")

    def figures(logits: np.ndarray) -> dict[str, float]:
        ece = expected_calibration_error(softmax(logits, axis=1), labels)
        return {"ece": ece, "nll": negative_log_likelihood(logits, labels)}

    return TemperatureScaled(network, temperature), {
        "temperature": temperature,
        "validation_images": len(fitted_on),
        "test_before": figures(logits),
        "test_after": figures(logits / temperature),
    }
