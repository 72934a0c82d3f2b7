"""Temperature scaling: recover a known temperature, and leave predictions unchanged."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.special import softmax
from small_images import make_images
from torch import nn

from classifier.data.dataset import CustomImageDataset
from classifier.data.loader import Batches
from classifier.evaluation.metrics import expected_calibration_error, negative_log_likelihood
from classifier.export.calibration import HIGHEST, LOWEST, calibrate, fit_temperature
from classifier.export.formats import TemperatureScaled
from classifier.training.inference import predict_logits


def drawn(count: int) -> tuple[np.ndarray, np.ndarray]:
    """Return logits (count, 4), and labels drawn from their softmax probabilities."""
    generator = np.random.default_rng(0)
    logits = generator.normal(scale=2, size=(count, 4))
    labels = (softmax(logits, axis=1).cumsum(axis=1) > generator.random((count, 1))).argmax(axis=1)
    return logits, labels


@pytest.mark.parametrize("temperature", [0.25, 1.0, 3.0])
def test_the_temperature_that_was_put_in_is_found(temperature: float) -> None:
    logits, labels = drawn(20_000)
    assert fit_temperature(logits * temperature, labels) == pytest.approx(temperature, rel=0.05)


def test_it_is_the_most_likely_temperature() -> None:
    logits, labels = drawn(300)
    found = fit_temperature(5 * logits, labels)
    best = negative_log_likelihood(5 * logits / found, labels)
    for other in np.geomspace(LOWEST, HIGHEST, 200):
        assert best <= negative_log_likelihood(5 * logits / other, labels) + 1e-9


def test_without_a_best_temperature_it_stays_within_the_bounds() -> None:
    labels = np.arange(4)
    right = np.eye(4) / 10
    assert fit_temperature(right, labels) == pytest.approx(LOWEST, rel=1e-3)
    assert fit_temperature(10 * right, (labels + 1) % 4) == pytest.approx(HIGHEST, rel=1e-3)
    assert LOWEST < fit_temperature(np.zeros((4, 4)), labels) < HIGHEST
    assert math.isfinite(fit_temperature(1000 * np.eye(4), labels))


def test_a_scaled_network_divides_its_logits() -> None:
    network = nn.Sequential(nn.Flatten(), nn.Linear(6, 3))
    pixels = torch.rand(5, 1, 2, 3)
    assert torch.equal(TemperatureScaled(network, 2.5)(pixels), network(pixels) / 2.5)


def test_the_network_is_calibrated_on_the_validation_images_and_measured_on_the_test_images(tmp_path: Path) -> None:
    splits = {}
    for split, count in (("val", 40), ("test", 24)):
        (tmp_path / split).mkdir()
        splits[split] = CustomImageDataset(*make_images(tmp_path / split, count, size=6))

    def to_batches(dataset: CustomImageDataset) -> Batches:
        return Batches(dataset, 7, torch.device("cpu"), memory_limit_gib=1, workers=0)

    torch.manual_seed(0)
    network = nn.Sequential(nn.Flatten(), nn.Linear(36, 4))

    def answers(split: str, network: nn.Module) -> np.ndarray:
        return predict_logits(to_batches(splits[split]), network, "float32").double().numpy()

    logits = {split: answers(split, network) for split in splits}
    labels = {split: dataset.labels.numpy() for split, dataset in splits.items()}
    scaled, facts = calibrate(network, splits["val"], splits["test"], to_batches)
    temperature = fit_temperature(logits["val"], labels["val"])
    assert scaled.temperature == facts["temperature"] == temperature
    assert facts["validation_images"] == 40
    for key, of_test in (("test_before", logits["test"]), ("test_after", logits["test"] / temperature)):
        assert facts[key] == {
            "ece": expected_calibration_error(softmax(of_test, axis=1), labels["test"]),
            "nll": negative_log_likelihood(of_test, labels["test"]),
        }
    assert answers("test", scaled).argmax(1).tolist() == logits["test"].argmax(1).tolist()
