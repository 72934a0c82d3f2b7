"""Evaluate stage: how well the trained network does on the test images, in numbers and pictures.

Reads   data/images.zip, data/annotations/, models/model_weights.pth
Writes  metrics/test.json, metrics/classes.csv, metrics/plots/
"""

import math
from pathlib import Path

import numpy as np
import pandas as pd
from scipy.special import softmax
from torch import nn

from classifier import files, plots
from classifier.annotations import class_names
from classifier.dataset import Batches, CustomImageDataset
from classifier.device import environment, seed_everything, select_device, set_threads
from classifier.errors import run_main
from classifier.metrics import (
    calibration_bins,
    class_scores,
    most_confident_mistakes,
    overall_scores,
    wilson_interval,
)
from classifier.networks import Mirrored, build_network
from classifier.params import load_params
from classifier.tracking import Tracker
from classifier.training import load_weights, predict, saliency, score

SAMPLES = (3, 3)  # rows and columns of the picture; the tutorial's grid
MISTAKES = (3, 5)
SALIENCIES = 8  # images


def main() -> None:
    params = load_params()
    tracker = Tracker()
    device = select_device(params.device)
    set_threads(params.threads)
    seed_everything(params.seed)

    names = class_names(files.verified(files.ANNOTATIONS))
    images = files.verified(files.IMAGES)
    test_set = CustomImageDataset(files.ANNOTATIONS / "test.csv", images, classes=len(names))
    network = build_network(params.network, test_set.image_shape(), len(names)).to(device)
    load_weights(network, files.verified(files.WEIGHTS), device)
    network = Mirrored(network) if params.test_flip else network
    batches = Batches(
        test_set, params.batch_size, device, memory_limit_gib=params.memory_limit_gib, workers=params.workers
    )
    logits = predict(batches, network, params.precision)

    loss, accuracy = score(logits, test_set.labels, params.batch_size)
    low, high = wilson_interval(round(accuracy * len(test_set)), len(test_set))
    scores = class_scores(logits.numpy(), test_set.labels.numpy(), names)
    overall = overall_scores(logits.numpy(), test_set.labels.numpy())
    print(f"Accuracy: {accuracy:.1%} (95 % interval {low:.1%} to {high:.1%}), Avg loss: {loss:.6f}")
    print(", ".join(f"{name}: {value:.3f}" for name, value in overall.items()))
    print(scores.to_string(index=False, float_format="%.3f"))

    with files.atomic(files.CLASS_METRICS) as path:
        scores.to_csv(path, index=False, lineterminator="\n")
    with files.atomic(files.PLOTS) as folder:
        folder.mkdir()
        draw(folder, network, test_set, logits.numpy(), names, params.seed)
    figures = {"accuracy": accuracy, "loss": loss, "accuracy_ci95": [low, high]} | overall
    files.write_json(files.TEST_METRICS, figures)

    with tracker.weights(params, environment(device)):
        tracker.log_evaluation(test_set.md5())


def draw(
    folder: Path, network: nn.Module, test_set: CustomImageDataset, logits: np.ndarray, names: list[str], seed: int
) -> None:
    """Write the confusion table (a row an image, as DVC's template wants it) and the pictures."""
    probabilities = softmax(logits.astype(np.float64), axis=1)
    labels, answers = test_set.labels.numpy(), logits.argmax(1)
    truth, said = np.array(names)[labels], np.array(names)[answers]
    pd.DataFrame({"actual": truth, "predicted": said}).to_csv(
        folder / "confusion.csv", index=False, lineterminator="\n"
    )

    chosen = np.random.default_rng(seed).permutation(len(labels))
    samples = chosen[: math.prod(SAMPLES)]
    plots.save_grid(folder / "samples.png", test_set.pixels(samples).numpy(), list(truth[samples]), *SAMPLES)

    mistakes = most_confident_mistakes(logits, labels, math.prod(MISTAKES))
    titles = [f"is {truth[i]}\nsaid {said[i]} {probabilities[i].max():.0%}" for i in mistakes]
    plots.save_grid(folder / "mistakes.png", test_set.pixels(mistakes).numpy(), titles, *MISTAKES)

    plots.save_reliability(folder / "reliability.png", calibration_bins(probabilities, labels))

    explained = chosen[:SALIENCIES]
    pixels = test_set.pixels(explained)
    device = next(network.parameters()).device
    titles = [f"is {truth[i]}\nsaid {said[i]}" for i in explained]
    plots.save_saliency(folder / "saliency.png", pixels.numpy(), saliency(network, pixels.to(device)).numpy(), titles)


if __name__ == "__main__":
    run_main(main)
