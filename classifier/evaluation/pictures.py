"""Files in metrics/plots/: confusion table and pictures of samples, mistakes, reliability and saliency."""

import math
from pathlib import Path

import numpy as np
import pandas as pd
from scipy.special import softmax
from torch import nn

from classifier.data.dataset import CustomImageDataset
from classifier.evaluation import plots
from classifier.evaluation.metrics import calibration_bins, most_confident_mistakes
from classifier.pipeline.annotations import csv_cell
from classifier.training.inference import saliency

SAMPLES = (3, 3)  # rows and columns, as in the tutorial
MISTAKES = (3, 5)
SALIENCIES = 8  # images


def draw(
    folder: Path,
    network: nn.Module,
    test_set: CustomImageDataset,
    logits: np.ndarray,
    names: list[str],
    seed: int,
) -> None:
    """Write the confusion table, with one row per image as DVC's template requires, and the pictures.

    logits: (N, C) of all test images. names: class names. seed: selects the samples.
    """
    labels, answers = test_set.labels.numpy(), logits.argmax(1)
    cells = np.array([*map(csv_cell, names)])
    pd.DataFrame({"actual": cells[labels], "predicted": cells[answers]}).to_csv(
        folder / "confusion.csv", index=False, lineterminator="\n"
    )

    chosen = np.random.default_rng(seed).permutation(len(labels))
    samples = chosen[: math.prod(SAMPLES)]
    titles = [plots.title(f"true: {names[labels[i]]}", file=test_set.files[i]) for i in samples]
    plots.save_grid(folder / "samples.png", test_set.pixels(samples).numpy(), titles, *SAMPLES)

    probabilities = softmax(logits.astype(np.float64), axis=1)

    def compared(index: int) -> str:
        predicted = f"predicted: {probabilities[index].max():.0%} {names[answers[index]]}"
        return plots.title(f"true: {names[labels[index]]}", predicted, file=test_set.files[index])

    mistakes = most_confident_mistakes(logits, labels, math.prod(MISTAKES))
    titles = [compared(index) for index in mistakes]
    plots.save_grid(folder / "mistakes.png", test_set.pixels(mistakes).numpy(), titles, *MISTAKES)

    plots.save_reliability(folder / "reliability.png", calibration_bins(probabilities, labels))

    explained = chosen[:SALIENCIES]
    pixels = test_set.pixels(explained)
    device = next(network.parameters()).device
    titles = [compared(index) for index in explained]
    plots.save_saliency(folder / "saliency.png", pixels.numpy(), saliency(network, pixels.to(device)).numpy(), titles)
