"""A training that diverges raises an error that names the epoch, the batch, the lr and the last finite loss."""

import copy
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from small_images import CLASSES, make_images
from torch import Tensor, nn
from train_loop import train_loop

from classifier.data.dataset import CustomImageDataset
from classifier.data.loader import Batches
from classifier.pipeline.errors import PipelineError
from classifier.training.optimization import build_optimizer, build_scheduler
from classifier.training.state import TrainState

EPOCHS = 3


@pytest.fixture(scope="module")
def batches(tmp_path_factory: pytest.TempPathFactory) -> Batches:
    csv, images = make_images(tmp_path_factory.mktemp("images"), count=160, size=8)
    dataset = CustomImageDataset(csv, images)
    return Batches(dataset, 16, torch.device("cpu"), seed=5, shuffle=True, memory_limit_gib=1, workers=0)


class SpoiltGradient(torch.autograd.Function):
    """The identity, with one entry of its gradient replaced by a given number."""

    @staticmethod
    def forward(context: Any, values: Tensor, number: float) -> Tensor:
        context.number = number
        return values.clone()

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        is_spoilt = torch.arange(gradients[0].numel()).view_as(gradients[0]) == 3
        return torch.where(is_spoilt, context.number, gradients[0]), None


class Spoiling(nn.Module):
    """A linear classifier with a gradient that is not finite in one forward pass in training."""

    def __init__(self, spoilt_pass: int | None) -> None:
        super().__init__()
        self.linear = nn.Linear(64, CLASSES)
        self.spoilt_pass, self.passes = spoilt_pass, 0

    def forward(self, pixels: Tensor) -> Tensor:
        logits: Tensor = self.linear(pixels.flatten(1))
        if self.passes == self.spoilt_pass:
            logits = SpoiltGradient.apply(logits, math.nan)  # type: ignore[no-untyped-call]
        self.passes += 1
        return logits


class DeadUnit(nn.Module):
    """Two layers; in one pass a bias gets an infinite gradient, which turns off a unit without changing any loss."""

    def __init__(self, spoilt_pass: int) -> None:
        super().__init__()
        self.hidden, self.output = nn.Linear(64, 32), nn.Linear(32, CLASSES)
        self.spoilt_pass, self.passes = spoilt_pass, 0

    def forward(self, pixels: Tensor) -> Tensor:
        bias = self.hidden.bias
        if self.passes == self.spoilt_pass:
            bias = SpoiltGradient.apply(bias, math.inf)  # type: ignore[no-untyped-call]
        self.passes += 1
        hidden = torch.relu(nn.functional.linear(pixels.flatten(1), self.hidden.weight, bias))
        logits: Tensor = self.output(hidden)
        return logits


def two_layers() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.Linear(32, CLASSES))


class Place(NamedTuple):
    """Where training stopped; epoch and batch count from 1."""

    epoch: int
    batch: int
    what: str
    lr: float
    last_loss: float

    def __str__(self) -> str:
        return (
            f"epoch {self.epoch}, batch {self.batch}: the {self.what} at lr {self.lr:g}, "
            f"the last finite loss was {self.last_loss:.6g}"
        )


def plain_training(batches: Batches, network: nn.Module, lr: float, schedule: str) -> Place:
    """Train in a plain loop that checks every loss and gradient; return where the first is not finite."""
    optimizer = torch.optim.SGD(network.parameters(), lr)
    last_loss, step = math.nan, 0
    for epoch in range(1, EPOCHS + 1):
        for batch, (pixels, targets) in enumerate(batches.epoch(epoch - 1), 1):
            progress = step / (EPOCHS * len(batches))
            now = lr * (1 if schedule == "constant" else 1 - progress)
            optimizer.param_groups[0]["lr"] = now
            loss = nn.functional.cross_entropy(network(pixels), targets)
            if not loss.isfinite():
                return Place(epoch, batch, f"loss is {loss.item()}", now, last_loss)
            last_loss = loss.item()
            optimizer.zero_grad()
            loss.backward()
            for name, parameter in network.named_parameters():
                if parameter.grad is not None and not parameter.grad.isfinite().all():
                    return Place(epoch, batch, f"gradient of {name} is not finite", now, last_loss)
            optimizer.step()
            step += 1
    raise AssertionError("all is finite")


def build_state(batches: Batches, network: nn.Module, lr: float, schedule: str) -> TrainState:
    optimizer = build_optimizer("sgd", list(network.parameters()), lr, 0.0, 0.0)
    return TrainState(network, optimizer, build_scheduler(schedule, optimizer, EPOCHS * len(batches)))


def train(batches: Batches, state: TrainState) -> None:
    for _ in range(EPOCHS):
        loss = train_loop(batches, state, nn.CrossEntropyLoss(), accumulate_steps=1, precision="float32")
        state.end_epoch({"train_loss": loss}, keep=True)


@pytest.mark.parametrize("schedule", ["constant", "linear"])
@pytest.mark.parametrize(
    ("network", "lr", "what"),
    [
        (two_layers, 1e30, "loss is"),
        (two_layers, 50.0, "loss is"),
        (lambda: Spoiling(0), 0.1, "gradient of linear.weight"),
        (lambda: Spoiling(7), 0.1, "gradient of linear.weight"),
        (lambda: Spoiling(9), 0.1, "gradient of linear.weight"),  # the last batch of an epoch
        (lambda: Spoiling(10), 0.1, "gradient of linear.weight"),
        (lambda: Spoiling(29), 0.1, "gradient of linear.weight"),  # the last batch of all
        (lambda: DeadUnit(12), 0.1, "gradient of hidden.bias"),
    ],
    ids=["vast lr", "high lr", "first batch", "batch 8", "last of epoch 1", "first of epoch 2", "last of all", "dead"],
)
def test_the_error_names_what_a_plain_loop_finds(
    batches: Batches, network: Callable[[], nn.Module], lr: float, what: str, schedule: str
) -> None:
    torch.manual_seed(0)
    ours = network()
    place = plain_training(batches, copy.deepcopy(ours), lr, schedule)
    with pytest.raises(PipelineError) as caught:
        train(batches, build_state(batches, ours, lr, schedule))
    assert str(caught.value).startswith(str(place))
    assert what in place.what
    assert str(caught.value).endswith("\nLower lr, or look at the images of this batch.")


def test_the_first_batch_has_no_last_finite_loss(batches: Batches) -> None:
    network = two_layers()
    with torch.no_grad():
        next(network.parameters()).fill_(1e30)
        list(network.parameters())[2].fill_(1e30)
    state = build_state(batches, network, 0.1, "constant")
    with pytest.raises(
        PipelineError, match=r"epoch 1, batch 1: the loss is (nan|inf) at lr 0.1, no finite loss before it\n"
    ):
        train(batches, state)


@pytest.mark.parametrize("figure", [math.nan, math.inf])
def test_an_update_that_only_the_validation_meets(batches: Batches, figure: float) -> None:
    state = build_state(batches, two_layers(), 0.1, "constant")
    loss = train_loop(batches, state, nn.CrossEntropyLoss(), accumulate_steps=1, precision="float32")
    with pytest.raises(
        PipelineError, match=rf"^epoch 1, after its last batch: val_loss is {figure} at lr 0\.1, the last "
    ):
        state.end_epoch({"train_loss": loss, "val_loss": figure, "val_accuracy": 0.25}, keep=True)
    assert not state.weights
    assert not state.history


def test_the_weights_that_were_kept_stay(batches: Batches) -> None:
    torch.manual_seed(0)
    state = build_state(batches, Spoiling(17), 0.1, "constant")
    train_loop(batches, state, nn.CrossEntropyLoss(), accumulate_steps=1, precision="float32")
    state.end_epoch({}, keep=True)
    kept = {name: tensor.clone() for name, tensor in state.weights.items()}
    with pytest.raises(PipelineError, match=r"epoch 2, batch 8: .*; the best weights so far are of epoch 1\n"):
        train_loop(batches, state, nn.CrossEntropyLoss(), accumulate_steps=1, precision="float32")
    assert state.weights.keys() == kept.keys()
    assert all(torch.equal(state.weights[name], kept[name]) for name in kept)


def test_a_training_that_goes_on_names_the_same_place(batches: Batches) -> None:
    """The last loss before the interruption is in the checkpoint."""
    torch.manual_seed(0)
    first, second = Spoiling(None), Spoiling(4)
    second.load_state_dict(first.state_dict())
    place = plain_training(batches, copy.deepcopy(second), 0.1, "constant")
    state = build_state(batches, first, 0.1, "constant")
    contents: list[dict[str, Any]] = []
    train_loop(
        batches, state, nn.CrossEntropyLoss(), accumulate_steps=1, precision="float32",
        after_update=lambda: contents.append(copy.deepcopy(state.state_dict())),
    )  # fmt: skip
    resumed = build_state(batches, second, 0.1, "constant")
    resumed.load_state_dict(contents[3])
    second.passes = 4
    with pytest.raises(PipelineError) as caught:
        train_loop(batches, resumed, nn.CrossEntropyLoss(), accumulate_steps=1, precision="float32")
    assert str(caught.value).startswith(str(place))
