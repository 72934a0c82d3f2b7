"""How long it takes to train to a test accuracy on Fashion-MNIST: this pipeline's recipe, and three others.

python -m benchmarks.time_to_accuracy [--target A] [--seeds N] [--limit-seconds S] [--only NAME ...] [--epochs N]

Each trains on the 60,000 images, and is tested on the 10,000 after every epoch; seconds are those of training alone.

recipe    `network: cnn` with the parameters in RECIPE, for 16 epochs, by the train stage itself, whole, with N seeds
resnet18  torchvision's ResNet-18 with the first layer usual for small images (3 x 3, no pooling); SGD with momentum
          0.9 and weight decay 5e-4, rate 0.1 falling along a cosine in --epochs epochs, batches of 128, crop and flip
keras     the convolutional network of Keras's example "Simple MNIST convnet" with its settings: Adam, batches of 128,
          the last tenth of the training images held out; on JAX
convnet   the convolutional network in benchmark/convnet.py of the data set's own repository with its settings:
          SGD at 0.001 without momentum, batches of 400; written anew in torch

The other three train until they have reached the target, or the limit, which also ends an epoch of resnet18 and
convnet that is under way. Their figures are a section of results.md of their own. Needs .venv-peers (`make peers`).
"""

import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from benchmarks.measuring import DVC, ROOT, Contender, Report, isolated_environment, parser, raw_data
from classifier.pipeline.errors import PipelineError, run_main
from classifier.sources.fashion_mnist import read

sys.path.insert(0, str(ROOT / "tests"))
from project import Project

# As they are spelt in params.yaml
RECIPE = {
    "network": "cnn", "val_size": "0", "batch_size": "256", "lr": "0.2", "momentum": "0.9",
    "weight_decay": "0.001", "schedule": "onecycle", "label_smoothing": "0.1", "augment": "[flip, erase]",
    "precision": "bfloat16", "test_flip": "true",
}  # fmt: skip
TEST_BATCH = 500


class Epoch(NamedTuple):
    """After an epoch: seconds of training since the start, and the accuracy on test, a fraction."""

    seconds: float
    accuracy: float


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--target", type=float, default=0.94, help="test accuracy, a fraction (default 0.94)")
    arguments.add_argument("--seeds", type=int, default=5, help="runs of the recipe (default 5)")
    arguments.add_argument("--limit-seconds", type=float, default=3600, help="of training of a peer (default 3600)")
    arguments.add_argument("--only", nargs="+", choices=("recipe", *PEERS), default=("recipe", *PEERS))
    arguments.add_argument("--epochs", type=int, default=30, help="in which resnet18's rate falls (default 30)")
    arguments.add_argument("--recipe-epochs", type=int, default=16, help="of the recipe (default 16)")
    given = arguments.parse_args()
    raw = raw_data()
    if "recipe" in given.only:
        recipe = RECIPE | {"epochs": str(given.recipe_epochs)}
        report = Report("Time to accuracy", ("torch", "torchvision"), given.page)
        report_recipe(report, recipe, raw, given.seeds, given.target)
    if peers := [name for name in PEERS if name in given.only]:
        report = Report("Time to accuracy of others", ("torch", "torchvision", "keras", "jax"), given.page)
        for name in peers:
            report_peer(report, name, raw, given.target, given.limit_seconds, given.epochs)
        report.save()


def report_recipe(report: Report, recipe: dict[str, str], raw: Path, seeds: int, target: float) -> None:
    report.line(f"\nrecipe: {', '.join(f'{key} {value}' for key, value in recipe.items())}; seeds 0 to {seeds - 1}")
    with tempfile.TemporaryDirectory() as folder:
        runs = []
        for seed, run in enumerate(train_recipe(Path(folder), recipe, raw, seeds)):
            report.line(f"  seed {seed}: {curve(run)}")
            runs.append(run)
    seconds, accuracies = zip(*(run[-1] for run in runs), strict=True)
    report.line(f"  seconds of a whole run: {mean_and_deviation(seconds, 1)}")
    report.line(f"  accuracy after it: {mean_and_deviation(accuracies, 4)}")
    reached = [found for run in runs if (found := first_at(run, target)) is not None]
    report.line(f"  first epoch at {target}: {len(reached)} of {seeds} runs" + (
        f", {mean_and_deviation(reached, 1)} seconds" if reached else "; no run got there"
    ))  # fmt: skip
    report.save()


def report_peer(report: Report, name: str, raw: Path, target: float, limit: float, epochs: int) -> None:
    report.line(f"\n{name}")
    contender = Contender(PEERS[name], raw, epochs)
    run: list[Epoch] = []
    while not (run and (run[-1].accuracy >= target or run[-1].seconds >= limit)):
        spent = run[-1].seconds if run else 0.0
        seconds, accuracy = contender.turn(limit - spent)
        run.append(Epoch(spent + seconds, accuracy))
        if name == "resnet18" and len(run) == epochs:
            break
    contender.close()
    report.line(f"  {curve(run)}")
    found = first_at(run, target)
    best = max(epoch.accuracy for epoch in run)
    report.line(f"  {target} after {found:.1f} s" if found is not None else (
        f"  never got to {target} in {run[-1].seconds:.0f} s of training; its best was {best:.4f}"
    ))  # fmt: skip


def curve(run: list[Epoch]) -> str:
    return ", ".join(f"{accuracy:.4f} at {seconds:.0f} s" for seconds, accuracy in run)


def first_at(run: list[Epoch], target: float) -> float | None:
    return next((seconds for seconds, accuracy in run if accuracy >= target), None)


def mean_and_deviation(values: Any, digits: int) -> str:
    spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{spread} (n={len(values)})"


def train_recipe(folder: Path, recipe: dict[str, str], raw: Path, seeds: int) -> Iterator[list[Epoch]]:
    """Run the recipe's train stage with each seed. Without validation images, its figures are those of test."""
    project = Project.create(folder / "project")
    project.set_params(**recipe)
    project.commit()
    env = isolated_environment(folder) | {"FASHION_MNIST_DIR": str(raw)}
    images = len(read(raw)["train"].labels)
    for seed in range(seeds):
        project.set_params(seed=str(seed))
        command = [*DVC, "repro", "train"]
        done = subprocess.run(command, cwd=project.root, env=env, capture_output=True, text=True)
        if done.returncode != 0:
            raise PipelineError(f"the train stage failed:\n{done.stdout}{done.stderr}")
        rates = [float(rate.replace(",", "")) for rate in re.findall(r"([\d,]+) images/s", done.stdout)]
        accuracies = pd.read_csv(project.root / "metrics/epochs.csv")["val_accuracy"]
        assert json.loads((project.root / "metrics/train.json").read_text())["epoch"] == len(rates)  # the last is kept
        seconds = np.cumsum([images / rate for rate in rates])
        yield [Epoch(*figures) for figures in zip(seconds.tolist(), accuracies.tolist(), strict=True)]


# Peers: each returns a function that trains one epoch, or as long as it may, and tests


def resnet18(raw: Path, epochs: int) -> Callable[[float], Epoch]:
    import torch
    from torch import nn
    from torchvision import models

    torch.manual_seed(0)
    network = models.resnet18(num_classes=10)
    network.conv1 = nn.Conv2d(1, 64, kernel_size=3, padding=1, bias=False)
    network.maxpool = nn.Identity()
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    return partial(torch_epoch, raw, network, optimizer, 128, ("crop", "flip"), schedule)


def convnet(raw: Path, _: int) -> Callable[[float], Epoch]:
    import torch
    from torch import nn

    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(1, 32, kernel_size=5, padding=2), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(32, 64, kernel_size=5, padding=2), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(7 * 7 * 64, 1024), nn.ReLU(), nn.Dropout(0.4), nn.Linear(1024, 10),
    )  # fmt: skip
    for layer in network:  # TensorFlow's initial weights
        if isinstance(layer, nn.Conv2d | nn.Linear):
            nn.init.xavier_uniform_(layer.weight)
            assert layer.bias is not None
            nn.init.zeros_(layer.bias)
    return partial(torch_epoch, raw, network, torch.optim.SGD(network.parameters(), lr=0.001), 400, (), None)


def torch_epoch(
    raw: Path,
    network: Any,
    optimizer: Any,
    batch_size: int,
    augmentations: tuple[str, ...],
    schedule: Any,
    limit: float,
) -> Epoch:
    """Train an epoch on images in memory, as the pipeline does, or until `limit` seconds have gone; then test."""
    import torch
    from torch import nn

    from classifier.compute.device import set_threads
    from classifier.data.transforms import augment, to_float

    set_threads("auto")
    splits = {
        split: (torch.from_numpy(np.array(data.images))[:, None], torch.from_numpy(data.labels))
        for split, data in read(raw).items()
    }
    pixels, labels = splits["train"]
    network.train()
    started = perf_counter()
    for index in torch.randperm(len(labels)).split(batch_size):
        images = augment(to_float(pixels[index]), augmentations, torch.default_generator)
        nn.functional.cross_entropy(network(images), labels[index]).backward()
        optimizer.step()
        optimizer.zero_grad()
        if perf_counter() - started > limit:
            break
    seconds = perf_counter() - started
    if schedule:
        schedule.step()
    network.eval()
    pixels, labels = splits["test"]
    with torch.inference_mode():
        answers = torch.cat([network(to_float(batch)).argmax(1) for batch in pixels.split(TEST_BATCH)])
    return Epoch(seconds, (answers == labels).double().mean().item())


def keras(raw: Path, _: int) -> Callable[[float], Epoch]:
    os.environ["KERAS_BACKEND"] = "jax"
    import keras as library
    from keras import layers

    library.utils.set_random_seed(0)
    model = library.Sequential(
        [
            library.Input((28, 28, 1)),
            layers.Conv2D(32, kernel_size=(3, 3), activation="relu"),
            layers.MaxPooling2D(pool_size=(2, 2)),
            layers.Conv2D(64, kernel_size=(3, 3), activation="relu"),
            layers.MaxPooling2D(pool_size=(2, 2)),
            layers.Flatten(),
            layers.Dropout(0.5),
            layers.Dense(10, activation="softmax"),
        ]
    )
    model.compile(loss="sparse_categorical_crossentropy", optimizer="adam", metrics=["accuracy"])
    splits = {
        split: (np.asarray(data.images)[..., None].astype(np.float32) / np.float32(255), data.labels)
        for split, data in read(raw).items()
    }
    pixels, labels = (values[: len(values) * 9 // 10] for values in splits["train"])

    def epoch(_: float) -> Epoch:
        started = perf_counter()
        model.fit(pixels, labels, batch_size=128, epochs=1, verbose=0)
        seconds = perf_counter() - started
        _, accuracy = model.evaluate(*splits["test"], batch_size=TEST_BATCH, verbose=0)
        return Epoch(seconds, float(accuracy))

    return epoch


PEERS: dict[str, Callable[[Path, int], Callable[[float], Epoch]]] = {
    "resnet18": resnet18, "keras": keras, "convnet": convnet
}  # fmt: skip


if __name__ == "__main__":
    run_main(main)
