"""Evaluate stage: how well the trained network does on the test images, in numbers and pictures.

Reads   data/images.zip, data/annotations/, models/model_weights.pth
Writes  metrics/test.json, metrics/classes.csv, metrics/plots/
"""

from pathlib import Path

import numpy as np
import pandas as pd
import torch
from scipy.special import softmax
from torch import Tensor, nn

from classifier import plots, tracking
from classifier.dataset import Batches, CustomImageDataset, class_names
from classifier.device import environment, seed_everything, select_device, set_threads
from classifier.errors import run
from classifier.files import ANNOTATIONS, CLASS_METRICS, IMAGES, PLOTS, TEST_METRICS, WEIGHTS, atomic, write_json
from classifier.metrics import class_scores, most_confident_mistakes, wilson_interval
from classifier.networks import build_network
from classifier.params import load_params
from classifier.training import load_weights, predict, saliency, score
from classifier.transforms import to_float

SAMPLES, MISTAKES, SALIENCIES = 9, 15, 8


def main() -> None:
    params = load_params()
    device = select_device(params.device)
    set_threads(params.threads)
    seed_everything(params.seed)

    names = class_names(ANNOTATIONS)
    test_set = CustomImageDataset(ANNOTATIONS / "test.csv", IMAGES)
    batches = Batches(test_set, params.batch_size, device, memory_limit_gib=params.memory_limit_gib, workers=params.workers)
    network = build_network(params.network, test_set.image_shape(), len(names)).to(device)
    load_weights(network, WEIGHTS, device)

    predicted = predict(batches, network, params.precision)
    loss, accuracy = score(predicted, test_set.labels, params.batch_size)
    logits, labels = predicted.numpy(), test_set.labels.numpy()
    low, high = wilson_interval(int((logits.argmax(1) == labels).sum()), len(labels))
    scores = class_scores(logits, labels, names)
    print(f"Accuracy: {accuracy:.1%} (95 % interval {low:.1%} to {high:.1%}), Avg loss: {loss:.6f}")
    print(scores.to_string(index=False, float_format="%.3f"))

    with atomic(CLASS_METRICS) as path:
        scores.to_csv(path, index=False, lineterminator="\n")
    with atomic(PLOTS) as folder:
        folder.mkdir()
        _write_confusion(folder / "confusion.csv", logits, labels, names)
        _draw(folder, network, test_set, device, logits, labels, names, params.seed)
    write_json(TEST_METRICS, {"accuracy": accuracy, "loss": loss, "accuracy_ci95": [low, high]})

    with tracking.run_of_weights(params, environment(device)):
        tracking.log_metrics({"test_loss": loss, "test_accuracy": accuracy})
        tracking.log_metrics({"test_accuracy_ci95_low": low, "test_accuracy_ci95_high": high})
        tracking.log_files(CLASS_METRICS)
        tracking.log_files(PLOTS, "plots")


def _write_confusion(path: Path, logits: np.ndarray, labels: np.ndarray, names: list[str]) -> None:
    """One row an image, as DVC's confusion template wants it."""
    named = np.array(names)
    table = pd.DataFrame({"actual": named[labels], "predicted": named[logits.argmax(1)]})
    table.to_csv(path, index=False, lineterminator="\n")


def _draw(
    folder: Path, network: nn.Module, test_set: CustomImageDataset, device: torch.device,
    logits: np.ndarray, labels: np.ndarray, names: list[str], seed: int,
) -> None:
    def pixels(indices: np.ndarray) -> Tensor:
        return torch.stack([to_float(test_set.decode(int(index))) for index in indices])

    probabilities = softmax(logits.astype(np.float64), axis=1)
    answers = logits.argmax(1)
    chosen = np.random.default_rng(seed).permutation(len(labels))
    samples = chosen[:SAMPLES]
    plots.save_samples(folder / "samples.png", pixels(samples).numpy(), [names[labels[index]] for index in samples])

    mistakes = most_confident_mistakes(logits, labels, MISTAKES)
    plots.save_mistakes(
        folder / "mistakes.png",
        pixels(mistakes).numpy() if len(mistakes) else np.empty((0, 1, 1, 1)),
        truths=[names[labels[index]] for index in mistakes],
        answers=[names[answers[index]] for index in mistakes],
        shares=[float(probabilities[index].max()) for index in mistakes],
    )

    explained = chosen[:SALIENCIES]
    images = pixels(explained)
    titles = [f"is {names[labels[index]]}\nsaid {names[answers[index]]}" for index in explained]
    plots.save_saliency(folder / "saliency.png", images.numpy(), saliency(network, images.to(device)).numpy(), titles)


if __name__ == "__main__":
    run(main)
