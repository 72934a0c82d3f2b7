"""The training of an accelerator: right, repeatable, and without waiting for the device.

`make accelerator` runs these tests where there is an accelerator; elsewhere they are skipped. With ACCELERATOR=cpu the
CPU takes its place, which shows that the tests run, and nothing of accelerators.
"""

import gc
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from imports import ROOT
from torch import Tensor, nn
from train_loop import train_loop

from benchmarks.arrays import Arrays, fashion_mnist, random_images
from classifier.compute.device import choose_kernels, select_device, usable_devices
from classifier.data import loader as batches_module
from classifier.data.loader import Batches, training_batches
from classifier.data.transforms import to_float
from classifier.networks import build_network
from classifier.pipeline.errors import PipelineError
from classifier.training import initial_state as start
from classifier.training.cuda_graphs import WARM_UP
from classifier.training.inference import load_weights, predict_logits, save_weights, test_loop
from classifier.training.optimization import build_loss
from classifier.training.state import TrainState

NAME = os.environ.get("ACCELERATOR", usable_devices()[0])
CPU = torch.device("cpu")
GOLDEN = json.loads((ROOT / "tests/golden/tutorial_seed42.json").read_text())
ACCURACY_DISTANCE = 0.02  # of a precision's accuracy after one epoch from float32's: some five standard errors
SMALL = {"network": "mlp", "batch_size": 16, "shuffle": True, "lr": 0.05, "momentum": 0.9, "epochs": 2}
NAMES = [str(label) for label in range(4)]

pytestmark = [
    pytest.mark.accelerator,
    pytest.mark.skipif(NAME == "cpu" and "ACCELERATOR" not in os.environ, reason="there is no accelerator here"),
]
needs_cuda = pytest.mark.skipif(not NAME.startswith("cuda"), reason="needs a CUDA device")


@pytest.fixture(scope="module")
def device() -> torch.device:
    return select_device(NAME)


@pytest.fixture(autouse=True)
def restore_kernels() -> Iterator[None]:
    yield
    choose_kernels(deterministic=False, precision="float32")
    torch.backends.cudnn.benchmark = False


@pytest.fixture(scope="module")
def clothes(fashion_mnist_dir: Path) -> tuple[Arrays, Arrays]:
    return fashion_mnist(fashion_mnist_dir)


def params_with(**changes: Any) -> Any:
    """params.yaml as it is in the repository, with some values changed; without pydantic, which may be missing."""
    return SimpleNamespace(**(yaml.safe_load((ROOT / "params.yaml").read_text()) | changes))


def images(count: int = 160, shape: tuple[int, int, int] = (1, 12, 12)) -> Arrays:
    """Noise of which each class has one bright quarter, so that there is something to learn."""
    dataset = random_images(count, shape, len(NAMES))
    half = shape[1] // 2
    for image, label in zip(dataset.all_pixels, dataset.labels.tolist(), strict=True):
        row, column = divmod(label, 2)
        image[:, row * half :, column * half :] //= 4
    return dataset


def begin(dataset: Arrays, device: torch.device, **settings: Any) -> tuple[Any, Batches, TrainState]:
    params = params_with(**SMALL | settings)
    names = [str(label) for label in range(dataset.classes or 0)]
    batches = training_batches(dataset, names, params, device)
    return params, batches, start.initial_state(params, batches, len(names))


def train(dataset: Arrays, device: torch.device, **settings: Any) -> TrainState:
    """Train all epochs as the train stage does."""
    params, batches, state = begin(dataset, device, **settings)
    weights = dataset.class_weights(NAMES).float().to(device) if params.balance == "loss" else None
    for _ in range(params.epochs):
        loss = train_loop(
            batches, state, build_loss(params.label_smoothing, weights),
            accumulate_steps=params.accumulate_steps, precision=params.precision,
        )  # fmt: skip
        state.end_epoch({"train_loss": loss}, keep=True)
    return state


def assert_same(one: TrainState, other: TrainState) -> None:
    """To the last bit."""
    assert one.history == other.history
    for name, tensor in one.weights.items():
        assert torch.equal(tensor, other.weights[name]), name


# What it computes


def test_the_first_epoch_of_the_tutorial_has_its_losses(clothes: tuple[Arrays, Arrays], device: torch.device) -> None:
    params, batches, state = begin(
        clothes[0], device, batch_size=64, shuffle=False, lr=0.001, momentum=0.0, seed=42, cuda_graphs=True
    )
    losses: dict[int, float] = {}

    def read() -> None:
        state.flush()
        losses[64 * state.batch] = state.last_loss

    train_loop(batches, state, nn.CrossEntropyLoss(), accumulate_steps=1, precision=params.precision, after_update=read)
    golden = dict(GOLDEN["first_epoch_losses"])
    assert [losses[seen] for seen in golden] == pytest.approx(list(golden.values()), abs=1e-4)


@pytest.mark.parametrize("place", ["resident", "picked", "streamed"])
@pytest.mark.parametrize(
    "names", [[], ["crop", "flip", "erase"], ["color"], ["mixup"], ["cutmix"], ["crop", "erase", "color", "mixup"]],
    ids="+".join,
)  # fmt: skip
def test_batches_are_the_cpus(
    monkeypatch: pytest.MonkeyPatch, device: torch.device, names: list[str], place: str
) -> None:
    if place == "picked" and device.type == "cuda":
        monkeypatch.setattr(batches_module, "has_room", lambda *_: False)
    dataset = images(50, (3, 16, 16))

    def epoch(device: torch.device) -> list[tuple[Tensor, Tensor]]:
        options = {"memory_limit_gib": 0 if place == "streamed" else 1, "workers": 2}
        made = Batches(dataset, 16, device, seed=1, shuffle=True, augmentations=names, **options)  # type: ignore[arg-type]
        if place != "resident" and device.type == "cuda":
            assert made.on_device is None
        return [(pixels.cpu(), targets.cpu()) for epoch in (0, 3) for pixels, targets in made.epoch(epoch)]

    tolerance = 2e-6 if {"color", "mixup"} & set(names) else 0
    for (pixels, targets), (expected, labels) in zip(epoch(device), epoch(CPU), strict=True):
        torch.testing.assert_close(pixels, expected, rtol=0, atol=tolerance)
        torch.testing.assert_close(targets, labels, rtol=0, atol=tolerance)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"balance": "sampler"},
        {"balance": "loss", "label_smoothing": 0.1},
        {"augment": ["mixup"]},
        {"augment": ["cutmix", "flip"]},
        {"freeze": ["linear_relu_stack.0.*"]},
        {"accumulate_steps": 3},
        {"optimizer": "adam", "lr": 0.001},
        {"optimizer": "adamw", "lr": 0.001, "weight_decay": 0.1, "schedule": "onecycle"},
        {"optimizer": "rmsprop", "lr": 0.0001, "schedule": "cosine"},
        {"target_transform": "one_hot"},
        {"memory_limit_gib": 0},
    ],
    ids=str,
)
def test_training_does_what_it_does_on_the_cpu(device: torch.device, settings: dict[str, Any]) -> None:
    dataset = images()
    dataset.target_transform = None
    expected = train(dataset, CPU, **settings)
    dataset.target_transform = None
    trained = train(dataset, device, **settings)
    # The other optimisers make whole steps of gradients that are hardly more than rounding
    tolerance = 2e-4 if settings.get("optimizer", "sgd") == "sgd" else 5 * settings["lr"]
    for name, tensor in expected.weights.items():
        torch.testing.assert_close(trained.weights[name], tensor, rtol=0, atol=tolerance)
    assert trained.history[-1]["train_loss"] == pytest.approx(expected.history[-1]["train_loss"], abs=1e-3)


@pytest.mark.parametrize("precision", ["tf32", "bfloat16", "float16"])
def test_a_precision_costs_little_accuracy(
    clothes: tuple[Arrays, Arrays], device: torch.device, precision: str
) -> None:
    accuracies = []
    for each in ("float32", precision):
        # A rate at which the network learns evenly, so that an accuracy after one epoch says something
        settings = {"network": "cnn", "batch_size": 256, "epochs": 1, "optimizer": "adamw", "lr": 0.001}
        state = train(clothes[0], device, precision=each, **settings)
        _, test_batches, _ = begin(clothes[1], device, batch_size=500, shuffle=False)
        accuracies.append(test_loop(test_batches, state.network, each)[1])  # type: ignore[arg-type]
    assert accuracies[0] > 0.85
    assert accuracies[1] == pytest.approx(accuracies[0], abs=ACCURACY_DISTANCE)


def test_a_network_trained_here_says_the_same_on_the_cpu(device: torch.device, tmp_path: Path) -> None:
    dataset = images(160, (3, 16, 16))
    state = train(dataset, device, network="cnn", lr=0.005)
    save_weights(state.weights, tmp_path / "weights.pth")
    network = build_network("cnn", (3, 16, 16), len(NAMES))
    load_weights(network, tmp_path / "weights.pth", CPU)
    options: dict[str, Any] = {"memory_limit_gib": 1, "workers": 0}
    here = predict_logits(Batches(dataset, 64, device, **options), state.network, "float32")
    there = predict_logits(Batches(dataset, 64, CPU, **options), network, "float32")
    torch.testing.assert_close(there, here, rtol=0, atol=1e-3)


def test_what_is_exported_says_the_same(device: torch.device, tmp_path: Path) -> None:
    for library in ("pydantic", "onnxruntime", "onnxscript", "safetensors"):
        pytest.importorskip(library)
    from classifier.export.formats import write_checked

    dataset = images(160, (3, 16, 16))
    state = train(dataset, device, network="cnn")
    network = build_network("cnn", (3, 16, 16), len(NAMES))
    network.load_state_dict(state.weights)
    paths = [tmp_path / f"model.{name}" for name in ("pth", "pt2", "safetensors")]
    write_checked(network, "cnn", len(NAMES), to_float(dataset.all_pixels[:32]), paths, also=tmp_path / "model.onnx")


# The same bytes


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"network": "cnn", "precision": "bfloat16", "augment": ["crop", "flip", "erase", "cutmix"]},
        {"network": "resnet18", "optimizer": "adamw", "lr": 0.001},
        {"network": "cnn", "precision": "float16", "augment": ["mixup", "color"]},
        {"network": "vgg16"},
    ],
    ids=str,
)
def test_the_same_training_gives_the_same_bytes(device: torch.device, settings: dict[str, Any]) -> None:
    size = {"vgg16": 32, "resnet18": 64}.get(settings.get("network", ""), 16)
    dataset = images(100, (3, size, size))
    first = train(dataset, device, **settings)
    assert_same(first, train(dataset, device, **settings))
    assert_same(first, train(dataset, device, **settings, cuda_graphs=False))


RESUMED = """\
import os, signal, sys
from pathlib import Path
import torch
from torch import nn
sys.path[:0] = [sys.argv[1], f"{sys.argv[1]}/tests"]
from classifier import networks
from classifier.training.checkpoint import checkpoints, resume
from classifier.compute.distributed import ALONE
from classifier.training.inference import save_weights
from train_loop import train_loop
import test_accelerator
from test_accelerator import begin, images

class Dropping(nn.Module):
    def __init__(self, network):
        super().__init__()
        self.network, self.dropout = network, nn.Dropout(0.3)
    def forward(self, pixels):
        return self.network(self.dropout(pixels))

build = test_accelerator.start.build_network
test_accelerator.start.build_network = lambda *given: Dropping(build(*given))
device, kill_at, graphs = torch.device(sys.argv[2]), int(sys.argv[3]), sys.argv[4] == "True"
settings = {"network": "cnn", "augment": ["crop", "erase", "mixup"], "schedule": "cosine", "precision": sys.argv[5]}
params, batches, state = begin(images(200, (1, 16, 16)), device, cuda_graphs=graphs, **settings)
with checkpoints({"training": "this"}) as saved, resume(state, ALONE, saved, every=4, last=len(batches)) as save:
    def after_update():
        save()
        if state.epoch * len(batches) + state.batch == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
    while state.epoch < params.epochs:
        loss = train_loop(batches, state, nn.CrossEntropyLoss(), accumulate_steps=1, precision=params.precision,
                          after_update=after_update)
        state.end_epoch({"train_loss": loss}, keep=True)
    save_weights(state.weights, Path("weights.pth"))
"""


@pytest.mark.parametrize("graphs", [True, False], ids=["graphs", "no graphs"])
@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_a_killed_training_goes_on_to_the_same_bytes(
    device: torch.device, tmp_path: Path, precision: str, graphs: bool
) -> None:
    """Killed in the middle of an epoch, once within the warm-up of a graph and once long after it."""

    def run(folder: str, kill_at: int) -> int:
        (tmp_path / folder / ".dvc").mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-c", RESUMED, str(ROOT), str(device), str(kill_at), str(graphs), precision]
        env = {key: value for key, value in os.environ.items() if key != "DVC_ROOT"} | {"ACCELERATOR": NAME}
        done = subprocess.run(command, cwd=tmp_path / folder, env=env, capture_output=True, text=True)
        assert done.returncode in (0, -9), done.stderr
        return done.returncode

    assert run("whole", -1) == 0
    assert [run("killed", kill_at) for kill_at in (WARM_UP + 2, 20, -1)] == [-9, -9, 0]
    whole, killed = ((tmp_path / folder / "weights.pth").read_bytes() for folder in ("whole", "killed"))
    assert killed == whole


# Without waiting


@needs_cuda
@pytest.mark.parametrize("place", ["resident", "picked", "streamed"])
@pytest.mark.parametrize("graphs", [True, False], ids=["graphs", "no graphs"])
@pytest.mark.parametrize("precision", ["float32", "float16"])
def test_no_step_waits_for_the_device(
    monkeypatch: pytest.MonkeyPatch, device: torch.device, place: str, graphs: bool, precision: str
) -> None:
    """All but those that report: every hundredth, and those before a graph is recorded."""
    if place == "picked":
        monkeypatch.setattr(batches_module, "has_room", lambda *_: False)
    params, batches, state = begin(
        images(800, (3, 16, 16)), device, network="cnn", batch_size=8, cuda_graphs=graphs, precision=precision,
        memory_limit_gib=0 if place == "streamed" else 1, augment=["crop", "flip", "erase", "color", "mixup", "cutmix"],
    )  # fmt: skip
    steps = 0

    def watch() -> None:
        nonlocal steps
        steps += 1
        torch.cuda.set_sync_debug_mode("error" if WARM_UP < steps < 95 else "default")

    try:
        train_loop(
            batches, state, nn.CrossEntropyLoss(), accumulate_steps=1, precision=params.precision, after_update=watch
        )
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert steps == 100
    assert (state.graphed_step is not None) == graphs


@needs_cuda
def test_images_that_the_device_has_no_room_for_stay_in_memory(
    monkeypatch: pytest.MonkeyPatch, device: torch.device
) -> None:
    dataset = images(16)
    size = dataset.all_pixels.numel()
    for free, expected in ((2 * size, True), (2 * size - 2, False)):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda *_, free=free: (free, 2**40))
        pixels = Batches(dataset, 8, device, memory_limit_gib=1, workers=0).on_device
        assert (pixels is not None) == expected


# What cannot be


UNRECORDABLE = """\
import sys
sys.path[:0] = [sys.argv[1], f"{sys.argv[1]}/tests"]
import test_accelerator
from torch import nn
from classifier.compute.device import select_device
from classifier.pipeline.errors import run_main

class Deciding(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(144, 4)
    def forward(self, pixels):
        logits = self.linear(pixels.flatten(1))
        return logits if logits.mean().item() > 100 else logits * 1

test_accelerator.start.build_network = lambda *_: Deciding()
graphs = sys.argv[2] == "True"
run_main(lambda: test_accelerator.train(test_accelerator.images(), select_device("cuda"), cuda_graphs=graphs))
"""


@needs_cuda
def test_a_network_that_cannot_be_recorded_is_told() -> None:
    """One that asks the device for a number before it goes on."""
    command = [sys.executable, "-c", UNRECORDABLE, str(ROOT)]
    told, trained = (
        subprocess.run([*command, graphs], capture_output=True, text=True, cwd=ROOT) for graphs in ("True", "False")
    )
    assert told.returncode == 1
    assert re.fullmatch(
        r"cuda_graphs: this network's training step cannot be recorded \(.+\); set cuda_graphs: false\n",
        told.stderr.splitlines(keepends=True)[-1],
    )
    assert trained.returncode == 0, trained.stderr


@needs_cuda
def test_too_little_memory_is_one_line(device: torch.device) -> None:
    gc.collect()
    torch.cuda.empty_cache()
    allowed = torch.cuda.memory_reserved(device) + 2**28
    torch.cuda.set_per_process_memory_fraction(allowed / torch.cuda.mem_get_info(device)[1])
    try:
        with pytest.raises(PipelineError) as caught:
            train(images(4096, (3, 32, 32)), device, network="cnn", batch_size=4096, accumulate_steps=2)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert str(caught.value) == (
        f"device: {device} does not have enough memory for batch_size: 4096; "
        "try batch_size: 2048 and accumulate_steps: 4, for the same updates"
    )


def test_a_device_that_is_not_here_lists_those_that_are(device: torch.device) -> None:
    with pytest.raises(PipelineError, match=rf"^device: cuda:99 is not usable here; usable: .*{device.type}"):
        select_device("cuda:99")


# Other ways to train


def test_a_compiled_network_learns_the_same(device: torch.device) -> None:
    dataset = images(160, (3, 16, 16))
    plain, compiled = (train(dataset, device, network="cnn", compile=compile) for compile in (False, True))
    assert compiled.history[0]["train_loss"] == pytest.approx(plain.history[0]["train_loss"], rel=0.02)


SHARED = """\
import os, sys
sys.path[:0] = [sys.argv[1], f"{sys.argv[1]}/tests"]
import torch
from torch import nn
from classifier.data.loader import training_batches
from classifier.compute.device import select_device
from classifier.compute.distributed import process_group
from classifier.training.initial_state import initial_state
from train_loop import train_loop
from test_accelerator import SMALL, images, params_with
with process_group() as group:
    device = select_device(sys.argv[2])
    params = params_with(**SMALL)
    batches = training_batches(images(), ["0", "1", "2", "3"], params, device, group)
    state = initial_state(params, batches, 4)
    loss = train_loop(batches, state, nn.CrossEntropyLoss(), accumulate_steps=1, precision="float32")
    print(f"loss {loss:.6f} of {group.size} on {torch.device(device).type}", flush=True)
"""


def test_several_processes_learn_what_one_does(device: torch.device) -> None:
    """With a process for each CUDA device that is here; one alone needs no NCCL."""
    processes = torch.cuda.device_count() if device.type == "cuda" else 1
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={processes}", "--no-python"]
    worker = [sys.executable, "-c", SHARED, str(ROOT), device.type]
    env = os.environ | {"ACCELERATOR": NAME, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, *worker], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    params, batches, state = begin(images(), device)
    loss = train_loop(batches, state, nn.CrossEntropyLoss(), accumulate_steps=1, precision=params.precision)
    assert done.stdout.splitlines()[-1] == f"loss {loss:.6f} of {processes} on {device.type}"
