"""How long an epoch of the tutorial's recipe takes here, in other frameworks, and at the least.

python -m benchmarks.train_step [--rounds N]

60,000 images of Fashion-MNIST in file order, batches of 64, the 784-512-512-10 network, SGD at 1e-3. Each contender is
a process of its own that stays alive, and trains one epoch in each of N rounds, after one that does not count:

pipeline   this pipeline's TrainStep and Batches, as the train stage uses them
tutorial   the loop of PyTorch's tutorial: DataLoader, ToTensor
lightning  PyTorch Lightning, a DataLoader with two workers
keras      model.fit of Keras, on JAX
jax        the whole epoch as one lax.scan in one jit
products   the eight matrix products of a step alone, in torch: three forward, five backward

Before that, the losses of the first epoch of pipeline, tutorial and jax, from the same weights, are held against each
other. Needs .venv-peers (`make peers`).
"""

import os
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np

from benchmarks.measuring import ROOT, Contender, Report, in_turns, median_ratio, parser, raw_data, summary
from classifier.pipeline.errors import PipelineError, run_main
from classifier.sources.fashion_mnist import read

sys.path.insert(0, str(ROOT / "tests"))
from pictures import write_annotations, write_arrays

BATCH, LR, SEED = 64, 1e-3, 42
REPORTED = 100  # the loss of every such batch, as in the tutorial
LOSS_TOLERANCE = 1e-4  # float32 sums in another order, 938 updates long

# Seconds of an epoch, and the losses of every batch that is reported
Epoch = tuple[float, list[float]]


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--rounds", type=int, default=5, help="epochs of each contender (default 5)")
    given = arguments.parse_args()
    raw = raw_data()
    report = Report("Train step", ("torch", "torchvision", "pytorch-lightning", "keras", "jax"), given.page)
    with tempfile.TemporaryDirectory() as folder:
        prepare_files(Path(folder), raw)
        contenders = {name: Contender(prepare, Path(folder)) for name, prepare in CONTENDERS.items()}
        compare_losses(report, contenders)
        epochs: dict[str, list[Epoch]] = in_turns(contenders, given.rounds)
        for contender in contenders.values():
            contender.close()

    seconds = {name: [took for took, _ in answers] for name, answers in epochs.items()}
    report.line(f"\nseconds an epoch of 60,000 images, batch {BATCH}, {given.rounds} interleaved rounds")
    for name, took in seconds.items():
        ratio = median_ratio(took, seconds["pipeline"])
        report.line(f"  {name:9} {summary(took, 's')}; median ratio to pipeline {ratio:.2f}")
    report.line(f"pipeline to products: median ratio {median_ratio(seconds['pipeline'], seconds['products']):.2f}")
    report.save()


def compare_losses(report: Report, contenders: dict[str, Contender]) -> None:
    """Raise PipelineError if the three that start from the same weights do not compute the same losses."""
    losses = {name: contenders[name].turn()[1] for name in ("pipeline", "tutorial", "jax")}
    report.line(f"losses of the first epoch, of each {REPORTED}th batch:")
    for name, values in losses.items():
        shown = " ".join(f"{value:.4f}" for value in values)
        differences = [abs(one - other) for one, other in zip(values, losses["tutorial"], strict=True)]
        report.line(f"  {name:9} {shown}; at most {max(differences):.1e} from the tutorial's")
        if not max(differences) <= LOSS_TOLERANCE:
            raise PipelineError(f"{name}: its losses are not the tutorial's, within {LOSS_TOLERANCE}")


def prepare_files(folder: Path, raw: Path) -> None:
    """The data as annotate writes it, all 60,000 in file order; and as torchvision looks for it."""
    data = read(raw)["train"]
    write_arrays(folder / "images", np.asarray(data.images)[:, None])
    write_annotations(folder / "train.csv", data.labels)
    (folder / "FashionMNIST").mkdir()
    (folder / "FashionMNIST/raw").symlink_to(raw.resolve())


def torch_network() -> Any:
    """The tutorial's network, the same weights in every process."""
    import torch

    from classifier.compute.device import set_threads
    from classifier.networks.mlp import build

    set_threads("auto")
    torch.manual_seed(SEED)
    return build((1, 28, 28), 10)


def pixels_and_labels(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """(N, 784) float32 in [0, 1], (N,) int32."""
    data = read(folder / "FashionMNIST/raw")["train"]
    return np.asarray(data.images).reshape(-1, 784).astype(np.float32) / np.float32(255), data.labels.astype(np.int32)


def tutorial_data(folder: Path) -> Any:
    from torchvision import datasets, transforms

    return datasets.FashionMNIST(root=folder, train=True, download=False, transform=transforms.ToTensor())


def pipeline(folder: Path) -> Callable[[], Epoch]:
    import torch

    from classifier.data.dataset import CustomImageDataset
    from classifier.data.loader import Batches
    from classifier.training.loop import TrainStep
    from classifier.training.optimization import build_loss, build_optimizer, build_scheduler
    from classifier.training.state import TrainState

    network = torch_network()
    dataset = CustomImageDataset(folder / "train.csv", folder / "images", classes=10)
    batches = Batches(dataset, BATCH, torch.device("cpu"), memory_limit_gib=8, workers=2)
    optimizer = build_optimizer("sgd", list(network.parameters()), LR, momentum=0.0, weight_decay=0.0)
    state = TrainState(network, optimizer, build_scheduler("constant", optimizer, len(batches)))
    step = TrainStep(state, batches, build_loss(label_smoothing=0.0, class_weights=None), 1, "float32")

    def epoch() -> Epoch:
        losses: list[float] = []
        started = perf_counter()
        for batch in step.rest_of_epoch():
            step(*batch)
            losses.append(state.last_loss)
        seconds = perf_counter() - started
        state.end_epoch({}, keep=False)
        return seconds, losses[::REPORTED]

    return epoch


def tutorial(folder: Path) -> Callable[[], Epoch]:
    import torch
    from torch import nn
    from torch.utils.data import DataLoader

    model = torch_network()
    loader = DataLoader(tutorial_data(folder), batch_size=BATCH)
    loss_fn = nn.CrossEntropyLoss()
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)

    def epoch() -> Epoch:
        losses = []
        started = perf_counter()
        model.train()
        for number, (pixels, labels) in enumerate(loader):
            loss = loss_fn(model(pixels), labels)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            if number % REPORTED == 0:
                losses.append(loss.item())
        return perf_counter() - started, losses

    return epoch


def lightning(folder: Path) -> Callable[[], Epoch]:
    import logging
    import warnings

    import pytorch_lightning
    import torch
    from torch import nn
    from torch.utils.data import DataLoader

    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")

    class Module(pytorch_lightning.LightningModule):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.model = torch_network()

        def training_step(self, batch: Any, _: int) -> Any:
            pixels, labels = batch
            return nn.functional.cross_entropy(self.model(pixels), labels)

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=LR)

    class Clock(pytorch_lightning.Callback):  # type: ignore[misc]
        """From before the workers start to the end of the epoch: what `fit` does once is not counted."""

        def on_train_start(self, *_: Any) -> None:
            self.started = perf_counter()

        def on_train_epoch_end(self, *_: Any) -> None:
            self.seconds = perf_counter() - self.started

    module, clock = Module(), Clock()
    loader = DataLoader(tutorial_data(folder), batch_size=BATCH, num_workers=2)

    def epoch() -> Epoch:
        trainer = pytorch_lightning.Trainer(
            accelerator="cpu", max_epochs=1, callbacks=[clock], logger=False, enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False,
        )  # fmt: skip
        trainer.fit(module, loader)
        return clock.seconds, []

    return epoch


def keras(folder: Path) -> Callable[[], Epoch]:
    os.environ["KERAS_BACKEND"] = "jax"
    import keras as library

    pixels, labels = pixels_and_labels(folder)
    model = library.Sequential(
        [
            library.Input((784,)),
            library.layers.Dense(512, activation="relu"),
            library.layers.Dense(512, activation="relu"),
            library.layers.Dense(10),
        ]
    )
    loss = library.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(optimizer=library.optimizers.SGD(LR), loss=loss)

    def epoch() -> Epoch:
        started = perf_counter()
        model.fit(pixels, labels, batch_size=BATCH, epochs=1, shuffle=False, verbose=0)
        return perf_counter() - started, []

    return epoch


def jax(folder: Path) -> Callable[[], Epoch]:
    import jax as library
    from jax import numpy as jnp

    pixels, labels = pixels_and_labels(folder)
    # Of torch's weights (out, in) the transposed: x @ weights
    weights = [jnp.asarray(parameter.detach().numpy().T) for parameter in torch_network().parameters()]
    whole = len(labels) // BATCH * BATCH

    def batch_loss(weights: list[Any], pixels: Any, labels: Any) -> Any:
        maps = pixels
        for number in (0, 2):
            maps = library.nn.relu(maps @ weights[number] + weights[number + 1])
        logits = maps @ weights[4] + weights[5]
        return -jnp.take_along_axis(library.nn.log_softmax(logits), labels[:, None], axis=1).mean()

    def step(weights: list[Any], batch: Any) -> tuple[list[Any], Any]:
        loss, gradients = library.value_and_grad(batch_loss)(weights, *batch)
        return [one - LR * gradient for one, gradient in zip(weights, gradients, strict=True)], loss

    @partial(library.jit, donate_argnums=0)
    def train(weights: list[Any], batches: Any, rest: Any) -> tuple[list[Any], Any]:
        weights, losses = library.lax.scan(step, weights, batches)
        weights, last = step(weights, rest)  # the last batch is smaller
        return weights, jnp.append(losses, last)

    batches = (jnp.asarray(pixels[:whole].reshape(-1, BATCH, 784)), jnp.asarray(labels[:whole].reshape(-1, BATCH)))
    rest = (jnp.asarray(pixels[whole:]), jnp.asarray(labels[whole:]))

    def epoch() -> Epoch:
        nonlocal weights
        started = perf_counter()
        weights, losses = train(weights, batches, rest)
        losses.block_until_ready()
        return perf_counter() - started, [float(loss) for loss in losses[::REPORTED]]

    return epoch


def products(folder: Path) -> Callable[[], Epoch]:
    import torch

    with torch.inference_mode():
        first, second, third = (parameter for parameter in torch_network().parameters() if parameter.ndim == 2)
        pixels = torch.from_numpy(pixels_and_labels(folder)[0])
        hidden, gradient = torch.rand(BATCH, 512), torch.rand(BATCH, 10)  # in the place of what lies between the layers

    @torch.inference_mode()
    def epoch() -> Epoch:
        started = perf_counter()
        for batch in pixels.split(BATCH):
            size = len(batch)
            torch.mm(batch, first.T)
            torch.mm(hidden[:size], second.T)
            torch.mm(hidden[:size], third.T)
            torch.mm(gradient[:size].T, hidden[:size])  # of the third layer's weights
            torch.mm(gradient[:size], third)
            torch.mm(hidden[:size].T, hidden[:size])  # of the second's
            torch.mm(hidden[:size], second)
            torch.mm(hidden[:size].T, batch)  # of the first's; the pixels need no gradient
        return perf_counter() - started, []

    return epoch


CONTENDERS: dict[str, Callable[[Path], Callable[[], Epoch]]] = {
    "pipeline": pipeline, "tutorial": tutorial, "lightning": lightning, "keras": keras, "jax": jax, "products": products
}  # fmt: skip


if __name__ == "__main__":
    run_main(main)
