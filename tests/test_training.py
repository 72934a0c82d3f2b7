"""The training loop, inference and scores, on small images in the format of the pipeline."""

import copy
import io
import math
import re
import zipfile
from collections.abc import Callable, Sequence
from copy import deepcopy
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from hostile import RunsCodeWhenUnpickled, halve, write_nothing, write_text
from pictures import write_annotations, write_arrays
from small_images import CLASSES, make_images
from torch import Tensor, nn
from train_loop import train_loop

from classifier.data.dataset import CustomImageDataset
from classifier.data.loader import Batches
from classifier.data.transforms import one_hot
from classifier.networks import build_network, describe_network
from classifier.pipeline.errors import PipelineError
from classifier.training.inference import load_weights, predict_logits, saliency, score, test_loop
from classifier.training.loop import set_training_mode
from classifier.training.optimization import (
    build_loss,
    build_optimizer,
    build_scheduler,
    freeze,
    lr_factor,
    weighted_cross_entropy,
)
from classifier.training.state import TrainState

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = torch.device("cpu")
WEIGHTS = torch.tensor([0.25, 3.0, 0.5, 1.0])  # of classes
PINNED_LOSSES = [1.29352989, 0.83373013, 0.32433271, 0.16194701, 0.13042829]  # of an epoch each
MIXES = [["mixup"], ["cutmix"], ["mixup", "cutmix"]]
SCHEDULES = ["constant", "linear", "cosine", "onecycle"]

BatchMaker = Callable[..., Batches]


@pytest.fixture(scope="module")
def make_batches(tmp_path_factory: pytest.TempPathFactory) -> BatchMaker:
    """A function that writes images and returns them in batches."""

    def make(
        batch_size: int,
        count: int = 160,
        size: int = 8,
        target_transform: Callable[[Any], Any] | None = None,
        seed: int = 0,
        shuffle: bool = False,
        augmentations: Sequence[str] = (),
    ) -> Batches:
        csv, images = make_images(tmp_path_factory.mktemp("images"), count, size)
        dataset = CustomImageDataset(csv, images, target_transform=target_transform, classes=CLASSES)
        return Batches(
            dataset,
            batch_size,
            CPU,
            seed=seed,
            shuffle=shuffle,
            augmentations=augmentations,
            memory_limit_gib=1,
            workers=0,
        )

    return make


def small_mlp(seed: int = 42) -> nn.Module:
    torch.manual_seed(seed)
    return build_network("mlp", (1, 8, 8), CLASSES)


def linear(pixels: int = 64) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(pixels, CLASSES))


def train(
    batches: Batches,
    network: nn.Module,
    *,
    epochs: int = 1,
    optimizer: str = "sgd",
    lr: float = 0.1,
    momentum: float = 0.0,
    weight_decay: float = 0.0,
    schedule: str = "constant",
    label_smoothing: float = 0.0,
    class_weights: Tensor | None = None,
    accumulate_steps: int = 1,
    precision: str = "float32",
) -> list[float]:
    """Train as the train stage does; return the mean loss of each epoch."""
    chosen = build_optimizer(optimizer, freeze(network, []), lr, momentum, weight_decay)
    scheduler = build_scheduler(schedule, chosen, epochs * -(-len(batches) // accumulate_steps))
    state = TrainState(network, chosen, scheduler, scaler=torch.amp.GradScaler("cpu", enabled=precision == "float16"))
    losses = []
    for _ in range(epochs):
        loss = train_loop(
            batches,
            state,
            build_loss(label_smoothing, class_weights),
            accumulate_steps=accumulate_steps,
            precision=precision,  # type: ignore[arg-type]
        )
        state.end_epoch({"train_loss": loss}, keep=False)
        losses.append(loss)
    return losses


# The losses of a run


def test_first_losses_are_pinned(make_batches: BatchMaker) -> None:
    """A change of the code that moves these numbers changes everybody's results."""
    batches = make_batches(16, seed=42, shuffle=True)
    losses = train(batches, small_mlp(), epochs=5, momentum=0.5, schedule="cosine")
    assert losses == pytest.approx(PINNED_LOSSES, abs=1e-5)


def test_same_seed_gives_same_weights_bit_for_bit(make_batches: BatchMaker) -> None:
    networks = [small_mlp(), small_mlp()]
    for network in networks:
        train(make_batches(16, seed=1, shuffle=True), network, epochs=2)
    first, second = (network.state_dict() for network in networks)
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("target_transform", [None, partial(one_hot, classes=CLASSES)])
def test_returned_loss_is_the_mean_over_batches(make_batches: BatchMaker, target_transform: object) -> None:
    batches = make_batches(64, target_transform=target_transform)  # batches of 64, 64, 32
    network = linear()
    with torch.no_grad():
        expected = [nn.functional.cross_entropy(network(pixels), targets).item() for pixels, targets in batches.epoch()]
    assert train(batches, network, lr=1e-12) == pytest.approx([np.mean(expected)], abs=1e-6)


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
@pytest.mark.parametrize("class_weights", [None, WEIGHTS], ids=["plain", "weighted"])
def test_one_hot_targets_train_alike(
    make_batches: BatchMaker, label_smoothing: float, class_weights: Tensor | None
) -> None:
    runs = []
    for target_transform in (None, partial(one_hot, classes=CLASSES)):
        network = small_mlp()
        batches = make_batches(16, target_transform=target_transform)
        losses = train(batches, network, epochs=3, label_smoothing=label_smoothing, class_weights=class_weights)
        runs.append((losses, network.state_dict()))
    (losses, weights), (one_hot_losses, one_hot_weights) = runs
    assert one_hot_losses == pytest.approx(losses, abs=1e-6)
    torch.testing.assert_close(one_hot_weights, weights, rtol=0, atol=1e-6)


def test_label_smoothing_changes_the_loss(make_batches: BatchMaker) -> None:
    plain, smoothed = (train(make_batches(16), small_mlp(), label_smoothing=share) for share in (0.0, 0.1))
    assert abs(plain[0] - smoothed[0]) > 1e-3


@pytest.mark.parametrize("count", [128, 160, 150], ids=["whole groups", "short last group", "short last batch"])
@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
@pytest.mark.parametrize("class_weights", [None, WEIGHTS], ids=["plain", "weighted"])
def test_accumulated_batches_update_as_one_batch(
    make_batches: BatchMaker, optimizer: str, count: int, class_weights: Tensor | None
) -> None:
    together, accumulated = small_mlp(), small_mlp()
    settings = {"epochs": 2, "optimizer": optimizer, "lr": 0.01, "schedule": "linear", "class_weights": class_weights}
    train(make_batches(64, count, seed=3, shuffle=True), together, **settings)  # type: ignore[arg-type]
    batches = make_batches(16, count, seed=3, shuffle=True)
    train(batches, accumulated, accumulate_steps=4, **settings)  # type: ignore[arg-type]
    # Adam takes a step of nearly `lr` for any gradient, even one as small as the rounding error of its sum
    tolerance = 1e-4 if optimizer == "adam" else 1e-5
    torch.testing.assert_close(accumulated.state_dict(), together.state_dict(), rtol=0, atol=tolerance)


@pytest.mark.parametrize("names", MIXES, ids="+".join)
def test_mixed_images_teach_the_classes(make_batches: BatchMaker, names: list[str]) -> None:
    network = small_mlp()
    train(make_batches(16, count=64, shuffle=True, augmentations=names), network, epochs=12)
    _, accuracy = test_loop(make_batches(64, count=64), network, "float32")
    assert accuracy > 0.9


@pytest.mark.parametrize("names", MIXES, ids="+".join)
@pytest.mark.parametrize("class_weights", [None, WEIGHTS], ids=["plain", "weighted"])
def test_mixed_images_go_with_every_other_setting(
    make_batches: BatchMaker, names: list[str], class_weights: Tensor | None
) -> None:
    """With label smoothing, one-hot targets, bfloat16, and accumulated batches of one image."""
    encode = partial(one_hot, classes=CLASSES)
    batches = make_batches(1, count=64, target_transform=encode, shuffle=True, augmentations=names)
    settings = {"class_weights": class_weights, "accumulate_steps": 8, "precision": "bfloat16"}
    losses = train(batches, small_mlp(), epochs=4, label_smoothing=0.1, **settings)  # type: ignore[arg-type]
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_half_precisions_train_and_keep_float32_weights(
    make_batches: BatchMaker, precision: Literal["bfloat16", "float16"]
) -> None:
    batches, network = make_batches(16), small_mlp()
    losses = train(batches, network, epochs=5, precision=precision)
    assert losses[-1] < losses[0]
    assert losses == pytest.approx(train(batches, small_mlp(), epochs=5), abs=0.02)
    assert {parameter.dtype for parameter in network.parameters()} == {torch.float32}
    assert predict_logits(batches, network, precision).dtype == torch.float32


def test_a_float16_update_that_overflows_is_skipped(make_batches: BatchMaker) -> None:
    """The scale is halved until gradients are finite; a checkpoint holds it."""

    def begin(scale: float) -> TrainState:
        network = small_mlp()
        optimizer = build_optimizer("sgd", list(network.parameters()), 0.1, 0.9, 0.0)
        scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        return TrainState(network, optimizer, build_scheduler("constant", optimizer, 10), scaler=scaler)

    state, other = begin(2.0**40), begin(1.0)
    first = copy.deepcopy(state.network.state_dict())
    updates: list[bool] = []

    def watch() -> None:
        updates.append(any(not tensor.equal(first[name]) for name, tensor in state.network.state_dict().items()))

    loop = partial(train_loop, loss_fn=nn.CrossEntropyLoss(), accumulate_steps=1, precision="float16")
    loss = loop(make_batches(4), state, after_update=watch)
    assert not updates[0]
    assert updates[-1]
    assert math.isfinite(loss)
    other.load_state_dict(copy.deepcopy(state.state_dict()))
    assert other.scaler.get_scale() == state.scaler.get_scale() < 2.0**40


def test_the_progress_bar_counts_images_and_tells_the_loss(
    make_batches: BatchMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    terminal = io.StringIO()
    terminal.isatty = lambda: True  # type: ignore[method-assign]
    monkeypatch.setattr("sys.stderr", terminal)
    (loss,) = train(make_batches(64, count=6500, size=2), linear(pixels=4), lr=1e-12)
    last = terminal.getvalue().split("\r")[-1]
    assert "6500/6500 " in last
    (told,) = re.findall(r"loss=([\d.]+)", last)
    assert float(told) == pytest.approx(loss, abs=0.1)


# Weights of classes


def logits_and_labels(count: int = 40) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn((count, CLASSES), generator=generator), torch.randint(CLASSES, (count,), generator=generator)


def test_weighted_loss_is_torchs_divided_by_the_number_of_images() -> None:
    logits, labels = logits_and_labels()
    torchs = nn.CrossEntropyLoss(WEIGHTS, reduction="none")(logits, labels)
    for targets in (labels, one_hot(labels, CLASSES)):
        torch.testing.assert_close(weighted_cross_entropy(logits, targets, WEIGHTS, 0.0), torchs.mean())
    torchs_mean = nn.CrossEntropyLoss(WEIGHTS)(logits, one_hot(labels, CLASSES))  # of probabilities, it divides alike
    torch.testing.assert_close(weighted_cross_entropy(logits, labels, WEIGHTS, 0.0), torchs_mean)


def test_weighted_loss_is_computed_where_the_logits_are() -> None:
    """torch's device `meta` refuses tensors of other devices, as an accelerator does."""
    logits, labels, weights = (tensor.to("meta") for tensor in (*logits_and_labels(), WEIGHTS))
    assert weighted_cross_entropy(logits, labels, weights, 0.1).device.type == "meta"


def test_balanced_loss_of_all_images_is_torchs_weighted_mean() -> None:
    logits, labels = logits_and_labels()
    balanced = len(labels) / (CLASSES * labels.bincount())
    expected = nn.CrossEntropyLoss(balanced)(logits, labels)
    torch.testing.assert_close(weighted_cross_entropy(logits, labels, balanced, 0.0), expected)


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1, 0.9])
def test_weighted_loss_weighs_images(label_smoothing: float) -> None:
    """As if each image were in the batch as many times as its class weight."""
    logits, labels = logits_and_labels()
    weights = torch.tensor([1, 3, 2, 5])
    repeated = torch.arange(len(labels)).repeat_interleave(weights[labels])
    expected = nn.CrossEntropyLoss(label_smoothing=label_smoothing, reduction="sum")(logits[repeated], labels[repeated])
    loss = weighted_cross_entropy(logits, labels, weights.float(), label_smoothing)
    torch.testing.assert_close(loss, expected / len(labels))


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_weighted_loss_of_a_mixture_is_the_mixture_of_the_losses(label_smoothing: float) -> None:
    logits, labels = logits_and_labels()
    others = labels.roll(1)
    mixed = 0.3 * one_hot(labels, CLASSES) + 0.7 * one_hot(others, CLASSES)
    loss, own, other = (
        weighted_cross_entropy(logits, targets, WEIGHTS, label_smoothing) for targets in (mixed, labels, others)
    )
    torch.testing.assert_close(loss, 0.3 * own + 0.7 * other)


def test_without_weights_the_loss_is_torchs() -> None:
    logits, labels = logits_and_labels()
    for label_smoothing in (0.0, 0.1):
        expected = nn.CrossEntropyLoss(label_smoothing=label_smoothing)(logits, labels)
        assert torch.equal(build_loss(label_smoothing, None)(logits, labels), expected)


def skewed(folder: Path, common: int, rare: int) -> CustomImageDataset:
    """Return noise that is slightly brighter in the upper half for the rare class, 1."""
    labels = (np.arange(common + rare) < rare).astype(int)
    pictures = np.random.default_rng(common).integers(0, 200, (len(labels), 8, 8))
    pictures[:, :4] += 40 * labels[:, None, None]
    folder.mkdir()
    images = write_arrays(folder / "images", pictures.astype(np.uint8)[:, None])
    return CustomImageDataset(write_annotations(folder / "images.csv", labels), images, classes=2)


def test_a_rare_class_is_found_more_often_when_balanced(tmp_path: Path) -> None:
    train_set, test_set = skewed(tmp_path / "train", 475, 25), skewed(tmp_path / "test", 300, 300)
    class_weights = train_set.class_weights(["common", "rare"])
    options: dict[str, Any] = {"memory_limit_gib": 1, "workers": 0}
    recalls = {}
    for balance in ("none", "sampler", "loss"):
        torch.manual_seed(0)
        network = nn.Sequential(nn.Flatten(), nn.Linear(64, 2))
        weights = class_weights[train_set.labels] if balance == "sampler" else None
        batches = Batches(train_set, 25, CPU, seed=1, shuffle=True, weights=weights, **options)
        train(batches, network, epochs=10, class_weights=class_weights.float() if balance == "loss" else None)
        answers = predict_logits(Batches(test_set, 100, CPU, **options), network, "float32").argmax(1)
        recalls[balance] = [float((answers[test_set.labels == label] == label).float().mean()) for label in (0, 1)]
    assert recalls["none"][1] < 0.2
    for balance in ("sampler", "loss"):
        assert recalls[balance][1] > 0.6
        assert recalls[balance][0] > 0.6


# Optimisers and schedules


@pytest.mark.parametrize(("optimizer", "lr"), [("sgd", 0.1), ("adam", 0.001), ("adamw", 0.001), ("rmsprop", 0.001)])
def test_every_optimizer_learns(make_batches: BatchMaker, optimizer: str, lr: float) -> None:
    network = small_mlp()
    before = deepcopy(network.state_dict())
    losses = train(make_batches(16), network, epochs=3, optimizer=optimizer, lr=lr, momentum=0.5, weight_decay=1e-4)
    assert losses[2] < losses[1] < losses[0]
    assert all(not torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())


def test_optimizers_are_the_named_ones() -> None:
    parameters = [nn.Parameter(torch.zeros(1))]
    made = [build_optimizer(name, parameters, 0.5, 0.25, 0.125) for name in ("sgd", "adam", "adamw", "rmsprop")]
    assert [type(optimizer) for optimizer in made] == [
        torch.optim.SGD,
        torch.optim.Adam,
        torch.optim.AdamW,
        torch.optim.RMSprop,
    ]
    assert [optimizer.defaults["lr"] for optimizer in made] == [0.5] * 4
    assert [optimizer.defaults["weight_decay"] for optimizer in made] == [0.125] * 4
    assert [optimizer.defaults.get("momentum") for optimizer in made] == [0.25, None, None, 0.25]


def test_unknown_names_are_refused() -> None:
    with pytest.raises(PipelineError, match="optimizer: 'lion' is not one of sgd, adam, adamw, rmsprop"):
        build_optimizer("lion", [], 0.1, 0, 0)
    with pytest.raises(PipelineError, match="schedule: 'steps' is not one of constant, linear, cosine, onecycle"):
        lr_factor("steps", 0)


@pytest.mark.parametrize(
    ("schedule", "start", "middle", "end"),
    [
        ("constant", 1, 1, 1),
        ("linear", 1, 0.5, 0),
        ("cosine", 1, 0.5, 0),
        ("onecycle", 1 / 25, (1 + math.cos(math.pi * 2 / 7)) / 2, 0),
    ],
)
def test_lr_factor(schedule: str, start: float, middle: float, end: float) -> None:
    assert [lr_factor(schedule, progress) for progress in (0, 0.5, 1)] == pytest.approx([start, middle, end])


def test_onecycle_peaks_after_30_percent() -> None:
    assert lr_factor("onecycle", 0.3) == 1
    assert lr_factor("onecycle", 0.15) == pytest.approx((1 + 1 / 25) / 2)
    assert all(0 <= lr_factor("onecycle", step / 100) <= 1 for step in range(101))


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("accumulate_steps", [1, 3])
def test_lr_follows_the_schedule(make_batches: BatchMaker, schedule: str, accumulate_steps: int) -> None:
    batches, network = make_batches(16), linear()  # 10 batches
    updates = math.ceil(10 / accumulate_steps)
    optimizer = build_optimizer("sgd", list(network.parameters()), 0.5, 0, 0)
    scheduler = build_scheduler(schedule, optimizer, 2 * updates)
    used: list[float] = []
    optimizer.register_step_pre_hook(lambda optimizer, *_: used.append(optimizer.param_groups[0]["lr"]))
    state = TrainState(network, optimizer, scheduler)
    for _ in range(2):
        train_loop(batches, state, nn.CrossEntropyLoss(), accumulate_steps=accumulate_steps, precision="float32")
        state.end_epoch({}, keep=False)
    steps = range(2 * updates)
    assert used == pytest.approx([0.5 * lr_factor(schedule, step / (2 * updates)) for step in steps])
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.5 * lr_factor(schedule, 1))


# Frozen weights


def test_frozen_weights_stay(make_batches: BatchMaker) -> None:
    network = small_mlp()
    before = deepcopy(network.state_dict())
    trainable = freeze(network, ["linear_relu_stack.0.*", "linear_relu_stack.4.bias"])
    optimizer = build_optimizer("adamw", trainable, 0.01, 0, weight_decay=0.1)
    scheduler = build_scheduler("constant", optimizer, 10)
    state = TrainState(network, optimizer, scheduler)
    train_loop(make_batches(16), state, nn.CrossEntropyLoss(), accumulate_steps=1, precision="float32")

    frozen = {"linear_relu_stack.0.weight", "linear_relu_stack.0.bias", "linear_relu_stack.4.bias"}
    after = network.state_dict()
    assert {name for name in before if torch.equal(before[name], after[name])} == frozen
    names_with_state = {name for name, parameter in network.named_parameters() if parameter in optimizer.state}
    assert names_with_state == set(before) - frozen
    assert describe_network(network).endswith("297,988 parameters, 33,284 of them frozen")


@pytest.mark.parametrize(
    ("name", "size", "patterns"),
    [
        ("cnn", 8, ["stages.0.*", "stages.1.*"]),
        ("resnet18", 16, ["conv1.*", "bn1.*", "layer[123].*"]),
        pytest.param("vgg16", 32, ["features.*", "classifier.[03].*"], marks=pytest.mark.slow),
    ],
)
def test_frozen_layers_stay_whole(make_batches: BatchMaker, name: str, size: int, patterns: list[str]) -> None:
    """Including the running statistics of batch normalisation: the whole state_dict."""
    torch.manual_seed(0)
    network = build_network(name, (1, size, size), CLASSES)
    trainable = freeze(network, patterns)
    before = {key: tensor.clone() for key, tensor in network.state_dict().items() if matches(key, patterns)}
    last = deepcopy(list(network.modules())[-1].state_dict())
    optimizer = build_optimizer("sgd", trainable, 0.01, momentum=0.9, weight_decay=0.1)
    state = TrainState(network, optimizer, build_scheduler("constant", optimizer, 4))
    batches = make_batches(4, count=8, size=size)
    for _ in range(2):
        train_loop(batches, state, nn.CrossEntropyLoss(), accumulate_steps=1, precision="float32")
        test_loop(batches, network, "float32")  # leaves evaluation mode
        state.end_epoch({}, keep=False)
    after = network.state_dict()
    assert all(torch.equal(after[key], tensor) for key, tensor in before.items())
    assert len(before) > 4
    assert not any(torch.equal(tensor, last[key]) for key, tensor in list(network.modules())[-1].state_dict().items())
    assert {parameter for parameter in network.parameters() if parameter in optimizer.state} == set(trainable)
    assert not any(matches(key, patterns) for key, parameter in network.named_parameters() if parameter.requires_grad)
    statistics = [key for key in after if key.endswith("num_batches_tracked")]
    assert [int(after[key]) for key in statistics] == [0 if matches(key, patterns) else 4 for key in statistics]


def matches(key: str, patterns: list[str]) -> bool:
    return any(fnmatchcase(key, pattern) for pattern in patterns)


def test_batch_normalisation_with_a_parameter_to_train_follows_the_images() -> None:
    network = nn.Sequential(nn.BatchNorm2d(3), nn.BatchNorm2d(3, affine=False), nn.BatchNorm2d(3), nn.Dropout())
    freeze(network, ["0.weight", "2.*"])
    set_training_mode(network)
    assert [module.training for module in network] == [True, True, False, True]


def test_training_with_frozen_batch_normalisation_goes_on_to_the_same_weights(make_batches: BatchMaker) -> None:
    class Stopped(Exception):
        pass

    def stop() -> None:
        if state.batch == 5:
            raise Stopped

    def start() -> TrainState:
        torch.manual_seed(0)
        network = build_network("cnn", (1, 8, 8), CLASSES)
        optimizer = build_optimizer("adamw", freeze(network, ["stages.[01].*"]), 0.01, 0, 0.1)
        return TrainState(network, optimizer, build_scheduler("cosine", optimizer, 10))

    loop = partial(train_loop, loss_fn=nn.CrossEntropyLoss(), accumulate_steps=1, precision="float32")
    batches = make_batches(16)
    whole, state = start(), start()
    loop(batches, whole)
    with pytest.raises(Stopped):
        loop(batches, state, after_update=stop)
    content = state.state_dict()
    state = start()
    state.load_state_dict(content)
    loop(batches, state)
    torch.testing.assert_close(state.network.state_dict(), whole.network.state_dict(), rtol=0, atol=0)


def test_no_pattern_freezes_nothing() -> None:
    network = small_mlp()
    assert freeze(network, []) == list(network.parameters())
    assert describe_network(network).endswith("297,988 parameters")


def test_pattern_without_match_lists_the_names() -> None:
    with pytest.raises(
        PipelineError, match=r"freeze: 'layer1\.\*' matches no parameter; the names are 1.weight, 1.bias"
    ):
        freeze(linear(), ["1.bias", "layer1.*"])


def test_freezing_everything_is_refused() -> None:
    with pytest.raises(PipelineError, match=r"freeze: \['\*'\] leaves no parameter to train"):
        freeze(linear(), ["*"])


# Prediction and scores


def network_with_modes() -> nn.Sequential:
    """A network that computes differently in training mode."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Flatten(), nn.Linear(64, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.5), nn.Linear(16, CLASSES)
    )


def test_predict_is_in_evaluation_mode(make_batches: BatchMaker) -> None:
    batches, network = make_batches(64), network_with_modes()
    train(batches, network, epochs=2)
    before = deepcopy(network.state_dict())
    network.train()
    logits = predict_logits(batches, network, "float32")
    assert torch.equal(predict_logits(batches, network, "float32"), logits)
    assert logits.is_inference()
    assert logits.shape == (160, CLASSES)
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())
    whole = torch.cat([pixels for pixels, _ in batches.epoch()])
    network.eval()
    torch.testing.assert_close(logits, network(whole).detach(), rtol=0, atol=1e-5)
    network.train()
    assert not torch.allclose(network(whole), logits, atol=1e-2)  # so the mode does matter here


def test_training_resumes_in_training_mode(make_batches: BatchMaker) -> None:
    batches, network = make_batches(64), network_with_modes()
    predict_logits(batches, network, "float32")
    before = deepcopy(network.state_dict())
    train(batches, network)
    assert not torch.equal(network.state_dict()["2.running_mean"], before["2.running_mean"])


def test_test_loop_equals_a_loop_over_batches(make_batches: BatchMaker) -> None:
    batches, network = make_batches(64, count=150), small_mlp()  # batches of 64, 64, 22
    train(batches, network, epochs=2)
    losses, correct = [], 0
    with torch.no_grad():
        for pixels, labels in batches.epoch():
            logits = network(pixels)
            losses.append(nn.functional.cross_entropy(logits, labels).item())
            correct += int((logits.argmax(1) == labels).sum())
    loss, accuracy = test_loop(batches, network, "float32")
    assert loss == pytest.approx(np.mean(losses), abs=1e-6)
    assert accuracy == pytest.approx(correct / 150)


def test_score_by_hand() -> None:
    logits = torch.tensor([[0.0, 0.0], [math.log(3), 0.0], [0.0, math.log(3)]])
    loss, accuracy = score(logits, torch.tensor([0, 0, 0]), batch_size=2)
    batch_losses = [(math.log(2) + math.log(4 / 3)) / 2, math.log(4)]  # the single image of the last batch weighs more
    assert loss == pytest.approx(sum(batch_losses) / 2, abs=1e-7)
    assert accuracy == pytest.approx(2 / 3)


def test_saliency_equals_finite_differences() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Flatten(), nn.Linear(18, 8), nn.Tanh(), nn.Dropout(0.5), nn.Linear(8, CLASSES)).double()
    pixels = torch.rand(5, 2, 3, 3, dtype=torch.float64)
    before = pixels.clone()
    found = saliency(network, pixels)

    step = 1e-6
    expected = torch.zeros(5, 3, 3, dtype=torch.float64)
    with torch.no_grad():
        winners = network.eval()(pixels).argmax(1)
        for channel, row, column in np.ndindex(2, 3, 3):
            sides = []
            for sign in (1, -1):
                moved = pixels.clone()
                moved[:, channel, row, column] += sign * step
                sides.append(network(moved)[torch.arange(5), winners])
            slope = ((sides[0] - sides[1]) / (2 * step)).abs()
            expected[:, row, column] = torch.maximum(expected[:, row, column], slope)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-7)
    assert torch.equal(pixels, before)
    assert not pixels.requires_grad
    assert all(parameter.grad is None for parameter in network.parameters())


# Weights from files


def test_weights_come_back(tmp_path: Path) -> None:
    trained, fresh = small_mlp(seed=1), small_mlp(seed=2)
    torch.save(trained.state_dict(), tmp_path / "weights.pth")
    load_weights(fresh, tmp_path / "weights.pth", CPU)
    torch.testing.assert_close(fresh.state_dict(), trained.state_dict(), rtol=0, atol=0)


def write_half(path: Path) -> None:
    torch.save(small_mlp().state_dict(), path)
    halve(path)


def write_whole_module(path: Path) -> None:
    torch.save(small_mlp(), path)


def write_other_network(path: Path) -> None:
    torch.save(linear().state_dict(), path)


def write_other_classes(path: Path) -> None:
    torch.save(build_network("mlp", (1, 8, 8), CLASSES + 1).state_dict(), path)


def write_one_tensor(path: Path) -> None:
    torch.save(torch.zeros(3), path)


def write_numbered_tensors(path: Path) -> None:
    torch.save({0: torch.zeros(3)}, path)


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda _: None, "there is no file"),
        (Path.mkdir, "there is no file"),
        (write_text, "cannot be read; it must be"),
        (write_nothing, "cannot be read; it must be"),
        (write_half, "cannot be read; it must be"),
        (write_whole_module, "cannot be read; it must be"),
        (write_other_network, "does not hold weights of this network: .*Missing key"),
        (write_other_classes, "does not hold weights of this network: .*size mismatch"),
        (write_one_tensor, "does not hold weights of this network"),
        (write_numbered_tensors, "does not hold weights of this network"),
    ],
)
def test_files_without_the_networks_weights(tmp_path: Path, write: Callable[[Path], None], message: str) -> None:
    write(tmp_path / "weights.pth")
    with pytest.raises(PipelineError, match=message) as caught:
        load_weights(small_mlp(), tmp_path / "weights.pth", CPU)
    text = str(caught.value)
    assert text.startswith("weights: ")
    assert "weights.pth" in text
    assert "\n" not in text
    assert "weights_only" not in text  # torch's advice is to run the file's code
    assert caught.value.__context__ is None or caught.value.__suppress_context__  # no traceback of torch behind it


def test_a_compressed_file_is_not_unpacked(tmp_path: Path) -> None:
    """torch would expand it, here by a factor of a thousand."""
    torch.save({"weight": torch.zeros(2**22)}, tmp_path / "stored.pth")
    with (
        zipfile.ZipFile(tmp_path / "stored.pth") as stored,
        zipfile.ZipFile(tmp_path / "weights.pth", "w", zipfile.ZIP_DEFLATED) as packed,
    ):
        for member in stored.namelist():
            packed.writestr(member, stored.read(member))
    assert torch.load(tmp_path / "weights.pth")["weight"].shape == (2**22,)
    with pytest.raises(PipelineError, match="cannot be read"):
        load_weights(small_mlp(), tmp_path / "weights.pth", CPU)


def test_a_name_longer_than_any_file_has(tmp_path: Path) -> None:
    with pytest.raises(PipelineError, match="weights: there is no file"):
        load_weights(small_mlp(), tmp_path / ("x" * 300), CPU)


def test_code_in_a_weights_file_is_not_run(tmp_path: Path) -> None:
    torch.save(RunsCodeWhenUnpickled(tmp_path / "ran"), tmp_path / "weights.pth")
    with pytest.raises(PipelineError, match="cannot be read"):
        load_weights(small_mlp(), tmp_path / "weights.pth", CPU)
    assert not (tmp_path / "ran").exists()
    torch.load(tmp_path / "weights.pth", weights_only=False)  # it would have run
    assert (tmp_path / "ran").exists()
