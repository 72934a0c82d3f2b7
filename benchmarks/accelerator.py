"""Is training on this machine's accelerator right, and how fast is it beside others?

python -m benchmarks.accelerator [--data FOLDER] [--json FILE] [--only SECTION ...] [--quick]

It needs Python, torch 2.9 or newer, torchvision, NumPy, pandas, Pillow, scikit-learn, PyYAML, psutil, tqdm and pytest;
no DVC, no MLflow and no network. It compares with timm's networks and with JAX where they are installed. --data is the
folder of Fashion-MNIST's four unpacked files (default data/raw, or FASHION_MNIST_DIR); without them, the sections that
need them are left out. On a machine without an accelerator it says so and measures nothing.

tests      pytest of the tests marked `accelerator`
tutorial   seconds of an epoch of the tutorial's network: 60,000 images, batches of 64, SGD; the tutorial's own loop,
           plain torch with all images on the device, JAX with the whole epoch in one scan, and this pipeline
images     images per second of training at 224 x 224 in bfloat16, batches of 256: a loop without data, as timm's
           benchmarks have it (the device's ceiling), and this pipeline, plain and augmented, deterministic or not
waiting    the share of the training time that goes into having batches, of `cnn` on Fashion-MNIST and ResNet-50:
           1 - (seconds with one batch, again and again) / (seconds with batches)
recipe     seconds of training to the end of the recipe for `cnn`, and the test accuracy then, five seeds
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from time import perf_counter
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
import yaml
from torch import Tensor, nn

from benchmarks.arrays import Arrays, fashion_mnist, random_images
from classifier.compute.device import choose_kernels, environment, place, select_device, usable_devices
from classifier.data.loader import Batches, batches_of, training_batches
from classifier.networks import Mirrored, Normalization
from classifier.pipeline.errors import run_main
from classifier.training import initial_state as start
from classifier.training.inference import test_loop
from classifier.training.state import TrainState

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tests"))
from train_loop import train_loop  # noqa: E402, it is found only now

SECTIONS = ("tests", "tutorial", "images", "waiting", "recipe")
NEEDS_DATA = ("tutorial", "waiting", "recipe")
# The recipe in classifier/networks/cnn.py, with more epochs, which an accelerator has the time for
RECIPE = {
    "network": "cnn", "epochs": 24, "batch_size": 256, "lr": 0.2, "momentum": 0.9, "weight_decay": 0.001,
    "schedule": "onecycle", "label_smoothing": 0.1, "augment": ["flip", "erase"], "precision": "bfloat16",
    "test_flip": True, "shuffle": True, "deterministic": True,
}  # fmt: skip
ARCHITECTURES = ("resnet50", "convnext_tiny")
CLASSES = 1000
PHOTOS = {"batch_size": 256, "lr": 0.05, "momentum": 0.9, "precision": "bfloat16", "shuffle": True, "epochs": 100}
AUGMENTED = ["crop", "flip", "color", "erase"]

Figures = dict[str, Any]


class Bench:
    """Where it runs, how long, and what has been found so far, printed as it is found."""

    def __init__(self, given: argparse.Namespace, device: torch.device) -> None:
        self.device = device
        self.quick: bool = given.quick
        self.data: Path = given.data
        self.json: Path = given.json
        self.side = 32 if given.quick else 224  # pixels of a photo
        self.found: Figures = {
            "date": datetime.now(UTC).strftime("%Y-%m-%d"),
            "environment": environment(device) | {"cuda": torch.version.cuda},
            "packages": {name: _version(name) for name in ("torch", "torchvision", "timm", "jax")},
        }

    def note(self, section: str, name: str, figure: Any) -> None:
        self.found.setdefault(section, {})[name] = figure
        print(f"{section}: {name}: {figure}", flush=True)
        self.json.parent.mkdir(parents=True, exist_ok=True)
        self.json.write_text(json.dumps(self.found, indent=1) + "\n")

    def params(self, **changes: Any) -> Any:
        return SimpleNamespace(**(yaml.safe_load((ROOT / "params.yaml").read_text()) | changes))


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--data", type=Path, default=Path(os.environ.get("FASHION_MNIST_DIR", ROOT / "data/raw")))
    arguments.add_argument("--json", type=Path, default=ROOT / "reports/accelerator.json")
    arguments.add_argument("--only", nargs="+", choices=SECTIONS, default=SECTIONS)
    arguments.add_argument("--quick", action="store_true", help="the smallest form of each, whose figures say nothing")
    given = arguments.parse_args()
    name = os.environ.get("ACCELERATOR", usable_devices()[0])
    if name == "cpu" and "ACCELERATOR" not in os.environ:
        print("There is no accelerator here: nothing was run. ACCELERATOR=cpu tries the same script on the CPU.")
        return
    bench = Bench(given, select_device(name))
    sections = [section for section in SECTIONS if section in given.only]
    if not (given.data / "train-images-idx3-ubyte").is_file():
        print(f"{given.data}: no Fashion-MNIST; left out: {', '.join(NEEDS_DATA)}", flush=True)
        sections = [section for section in sections if section not in NEEDS_DATA]
    failed = False
    for section in sections:
        begun = perf_counter()
        failed |= not {"tests": tests, "tutorial": tutorial, "images": images, "waiting": waiting, "recipe": recipe}[
            section
        ](bench)
        bench.note(section, "seconds of this section", round(perf_counter() - begun, 1))
    print(table(bench.found))
    sys.exit(failed)


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def table(found: Figures) -> str:
    """The figures as a Markdown table, a row each, below what they are of."""
    card = found["environment"]
    packages = ", ".join(f"{name} {number}" for name, number in found["packages"].items() if number)
    rows = [
        f"| {section} | {name} | {figure} |" for section in SECTIONS for name, figure in found.get(section, {}).items()
    ]
    about = f"{found['date']}, {card['device']}, CUDA {card['cuda']}, Python {card['python']}, {packages}"
    return "\n".join([about, "", "| section | what | figure |", "|---|---|---|", *rows])


def tests(bench: Bench) -> bool:
    # Without the settings of pyproject.toml: its plugins may be missing here, and other versions of libraries may warn
    options = ["-c", os.devnull, "--rootdir", str(ROOT), "-q", "-p", "no:cacheprovider", "--durations=8"]
    options += ["--real-processes", "-m", "accelerator", str(ROOT / "tests/test_accelerator.py")]
    if bench.quick:
        options += ["-k", "batches_are_the_cpus"]
    env = os.environ | {"FASHION_MNIST_DIR": str(bench.data)}
    done = subprocess.run([sys.executable, "-m", "pytest", *options], cwd=ROOT, env=env, capture_output=True, text=True)
    print(done.stdout[-12000:], done.stderr[-3000:], flush=True)
    closing = done.stdout.strip().splitlines()
    bench.note("tests", "pytest", closing[-1].strip("= ") if closing else "pytest did not start")
    return done.returncode == 0


def first_images(dataset: Arrays, count: int) -> Arrays:
    return Arrays(dataset.all_pixels[:count], dataset.labels[:count], dataset.classes or 0)


# The tutorial's network


def tutorial(bench: Bench) -> bool:
    train_set, _ = fashion_mnist(bench.data)
    if bench.quick:
        train_set = first_images(train_set, 640)
    rounds = 1 if bench.quick else 7
    loops = {
        "plain torch, all on the device": plain_torch(bench, train_set),
        "pipeline": pipeline(bench, train_set),
        "pipeline, cuda_graphs: false": pipeline(bench, train_set, cuda_graphs=False),
        "pipeline, deterministic: false": pipeline(bench, train_set, deterministic=False),
    }
    seconds = in_turns(loops, rounds, bench.device)
    for name, values in seconds.items():
        bench.note("tutorial", f"{name}, s/epoch", spread(values, 4))
    plain = seconds["plain torch, all on the device"]
    ratios = [ours / theirs for ours, theirs in zip(seconds["pipeline"], plain, strict=True)]
    bench.note("tutorial", "pipeline / plain torch", spread(ratios, 3))
    loader = tutorial_loop(bench, train_set)
    bench.note("tutorial", "tutorial's loop with a DataLoader, s/epoch", spread(in_turns({"": loader}, 1)[""], 3))
    if bench.found["packages"]["jax"]:
        done = subprocess.run(
            [sys.executable, "-m", "benchmarks.jax_scan", str(bench.data), str(rounds)], cwd=ROOT,
            env=os.environ | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}, capture_output=True, text=True,
        )  # fmt: skip
        taken = json.loads(done.stdout.splitlines()[-1]) if done.returncode == 0 else None
        figure = f"{spread(taken['seconds'], 4)} on {taken['device']}" if taken else f"failed: {done.stderr[-300:]}"
        bench.note("tutorial", "JAX, whole epoch in one scan, s/epoch", figure)
    return True


def in_turns(
    loops: Mapping[str, Callable[[], object]], rounds: int, device: torch.device | None = None
) -> dict[str, list[float]]:
    """Seconds of each loop in each round, in which they take turns; before it, one that does not count."""
    seconds: dict[str, list[float]] = {name: [] for name in loops}
    for number in range(rounds + 1):
        for name, loop in loops.items():
            started = perf_counter()
            loop()
            if device:
                wait(device)
            if number:
                seconds[name].append(perf_counter() - started)
    return seconds


def wait(device: torch.device) -> None:
    if device.type != "cpu":
        getattr(torch, device.type).synchronize()


def spread(values: list[float], digits: int) -> str:
    low, middle, high = (f"{value:.{digits}f}" for value in (min(values), statistics.median(values), max(values)))
    return f"median {middle} ({low} to {high}), n={len(values)}"


def pipeline(bench: Bench, dataset: Arrays, *, ready: bool = False, **settings: Any) -> Callable[[], float]:
    """An epoch of the pipeline's training; `ready`: with one batch, that is on the device, again and again."""
    params = bench.params(**{"shuffle": False, "epochs": 1000} | settings)
    batches = training_batches(dataset, [str(label) for label in range(10)], params, bench.device)
    with quiet():
        state = start.initial_state(params, batches, 10)
    if ready:
        repeat_one_batch(batches)

    def epoch() -> float:
        choose_kernels(deterministic=params.deterministic, precision=params.precision)
        return one_epoch(params, batches, state)

    return epoch


def one_epoch(params: Any, batches: Batches, state: TrainState) -> float:
    """Train an epoch of the pipeline; its loss."""
    loss_fn = nn.CrossEntropyLoss(label_smoothing=params.label_smoothing)
    loss = train_loop(batches, state, loss_fn, accumulate_steps=1, precision=params.precision)
    state.end_epoch({}, keep=False)
    return loss


@contextmanager
def quiet() -> Iterator[None]:
    """Without what the stages print of the network."""
    printed, sys.stdout = sys.stdout, Path(os.devnull).open("w")  # noqa: SIM115
    try:
        yield
    finally:
        sys.stdout.close()
        sys.stdout = printed


def plain_torch(bench: Bench, dataset: Arrays) -> Callable[[], None]:
    """What somebody writes who knows that the images fit on the device."""
    from classifier.networks.mlp import build

    torch.manual_seed(42)
    network = build((1, 28, 28), 10).to(bench.device)
    optimizer = torch.optim.SGD(network.parameters(), lr=1e-3)
    loss_fn = nn.CrossEntropyLoss()
    pixels, labels = dataset.all_pixels.to(bench.device), dataset.labels.to(bench.device)

    def epoch() -> None:
        torch.set_deterministic_debug_mode("default")
        network.train()
        for first in range(0, len(labels), 64):
            images = pixels[first : first + 64].float() / 255
            loss = loss_fn(network(images), labels[first : first + 64])
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()

    return epoch


def tutorial_loop(bench: Bench, dataset: Arrays) -> Callable[[], None]:
    """The loop of "Learn the basics": a DataLoader without workers, ToTensor, each batch copied to the device."""
    from torch.utils.data import DataLoader, Dataset
    from torchvision.transforms import ToTensor

    from classifier.networks.mlp import build

    to_tensor, pixels, labels = ToTensor(), dataset.all_pixels.numpy(), dataset.labels.tolist()

    class Pictures(Dataset[tuple[Tensor, int]]):
        def __len__(self) -> int:
            return len(labels)

        def __getitem__(self, index: int) -> tuple[Tensor, int]:
            return to_tensor(pixels[index].transpose(1, 2, 0)), labels[index]

    torch.manual_seed(42)
    model = build((1, 28, 28), 10).to(bench.device)
    loader = DataLoader(Pictures(), batch_size=64)
    loss_fn = nn.CrossEntropyLoss()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)

    def epoch() -> None:
        model.train()
        for number, (images, targets) in enumerate(loader):
            loss = loss_fn(model(images.to(bench.device)), targets.to(bench.device))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            if number % 100 == 0:
                loss.item()

    return epoch


# Photos


class Normalised(nn.Module):
    """A network of another library behind the pipeline's normalisation of pixels."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.normalize, self.network = Normalization(3), network

    def forward(self, pixels: Tensor) -> Tensor:
        logits: Tensor = self.network(self.normalize(pixels))
        return logits


def architecture(bench: Bench, name: str) -> nn.Module:
    """timm's network if timm is installed, else torchvision's."""
    if bench.found["packages"]["timm"]:
        import timm

        made: nn.Module = timm.create_model(name, num_classes=CLASSES)
    else:
        from torchvision import models

        made = models.get_model(name, num_classes=CLASSES)
    return made


def images(bench: Bench) -> bool:
    count, size = (64, 32) if bench.quick else (256 * 16, 256)
    dataset = random_images(count, (3, bench.side, bench.side), CLASSES)
    rounds = 1 if bench.quick else 3
    for name in ARCHITECTURES[: 1 if bench.quick else None]:
        rates = {"ceiling: no data": 0.0}
        ways: dict[str, dict[str, Any]] = {
            "pipeline": {"deterministic": False},
            "pipeline, augmented": {"deterministic": False, "augment": AUGMENTED},
            "pipeline, augmented, deterministic": {"deterministic": True, "augment": AUGMENTED},
        }
        ceiling = without_data(bench, name, size, count // size)
        rates["ceiling: no data"] = count / statistics.median(in_turns({"": ceiling}, rounds, bench.device)[""])
        for way, settings in ways.items():
            epoch = photos(bench, name, dataset, size, **settings)
            rates[way] = count / statistics.median(in_turns({"": epoch}, rounds, bench.device)[""])
            del epoch
        for way, rate in rates.items():
            share = f" = {rate / rates['ceiling: no data']:.3f} of the ceiling" if "ceiling" not in way else ""
            bench.note("images", f"{name}, {way}, images/s", f"{rate:.0f}{share}")
    return True


def photos(
    bench: Bench, name: str, dataset: Arrays, size: int, *, ready: bool = False, **settings: Any
) -> Callable[[], float]:
    """As `pipeline`, of another library's network."""
    params = bench.params(**PHOTOS | {"batch_size": size} | settings)
    batches = training_batches(dataset, [str(label) for label in range(CLASSES)], params, bench.device)
    network = Normalised(architecture(bench, name))
    with quiet(), patch.object(start, "build_network", lambda *_: network):
        state = start.initial_state(params, batches, CLASSES)
    if ready:
        repeat_one_batch(batches)
    return lambda: one_epoch(params, batches, state)


def without_data(bench: Bench, name: str, size: int, steps: int) -> Callable[[], None]:
    """One batch of noise again and again, with the settings of timm's own training: the most that the device gives."""
    device = bench.device
    torch.set_deterministic_debug_mode("default")
    torch.backends.cudnn.benchmark = True
    torch.backends.cudnn.allow_tf32 = True
    torch.set_float32_matmul_precision("high")
    network = place(architecture(bench, name), device)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.05, momentum=0.9, nesterov=True, weight_decay=2e-5)
    loss_fn = nn.CrossEntropyLoss()
    pixels = torch.randn(size, 3, bench.side, bench.side, device=device).contiguous(memory_format=torch.channels_last)
    labels = torch.randint(CLASSES, (size,), device=device)

    def epoch() -> None:
        network.train()
        for _ in range(steps):
            optimizer.zero_grad()
            with torch.autocast(device.type, torch.bfloat16):
                loss = loss_fn(network(pixels), labels)
            loss.backward()
            optimizer.step()

    return epoch


# Waiting for data


def repeat_one_batch(batches: Batches) -> None:
    """Have each epoch give its first batch again and again, without any work."""
    pixels, targets = next(iter(batches.epoch()))

    def epoch(epoch: int = 0, first: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        for number in range(first, len(batches)):
            yield pixels[: batches.count(number)], targets[: batches.count(number)]

    batches.epoch = epoch  # type: ignore[method-assign]


def waiting(bench: Bench) -> bool:
    train_set, _ = fashion_mnist(bench.data)
    rounds = 1 if bench.quick else 3
    if bench.quick:
        train_set = first_images(train_set, 512)
    settings: dict[str, Any] = RECIPE | {"epochs": 1000}
    share = share_of_waiting(bench, rounds, partial(pipeline, bench, train_set, **settings))
    bench.note("waiting", "cnn on Fashion-MNIST, augmented, share of the time", share)
    size = 32 if bench.quick else 256
    dataset = random_images(64 if bench.quick else 256 * 40, (3, bench.side, bench.side), CLASSES)
    for memory, room, where in ((8, True, "on the device"), (8, False, "in memory"), (0, False, "from workers")):
        workers = min(os.cpu_count() or 1, 12)
        make = partial(
            photos, bench, "resnet50", dataset, size, deterministic=False, augment=AUGMENTED, workers=workers,
            memory_limit_gib=memory,
        )  # fmt: skip
        with patch("classifier.data.loader.has_room", lambda *_, room=room: room):
            share = share_of_waiting(bench, rounds, make)
        bench.note("waiting", f"resnet50 at 224, augmented, images {where}, share of the time", share)
        if bench.quick:
            break
    return True


def share_of_waiting(bench: Bench, rounds: int, make: Callable[..., Callable[[], float]]) -> str:
    whole, ready = (in_turns({"": make(ready=one)}, rounds, bench.device)[""] for one in (False, True))
    return f"{1 - statistics.median(ready) / statistics.median(whole):.3f}"


# Time to accuracy


def recipe(bench: Bench) -> bool:
    train_set, test_set = fashion_mnist(bench.data)
    settings = RECIPE | ({"epochs": 1, "network": "mlp", "precision": "float32"} if bench.quick else {})
    if bench.quick:
        train_set, test_set = first_images(train_set, 512), first_images(test_set, 128)
    seconds, accuracies = [], []
    for seed in range(1 if bench.quick else 5):
        params = bench.params(seed=seed, **settings)
        started = perf_counter()
        batches = training_batches(train_set, [str(label) for label in range(10)], params, bench.device)
        with quiet():
            state = start.initial_state(params, batches, 10)
        for _ in range(params.epochs):
            one_epoch(params, batches, state)
        wait(bench.device)
        seconds.append(perf_counter() - started)
        test_batches = batches_of(test_set, params, bench.device)
        accuracies.append(test_loop(test_batches, Mirrored(state.network), params.precision)[1])
    bench.note(
        "recipe",
        f"{params.network}, {params.epochs} epochs, seconds from images in memory to weights",
        mean(seconds, 2),
    )
    bench.note("recipe", f"{params.network}, test accuracy", mean(accuracies, 4))
    runs = zip(accuracies, seconds, strict=True)
    bench.note(
        "recipe",
        f"{params.network}, each seed",
        ", ".join(f"{accuracy:.4f} in {took:.1f} s" for accuracy, took in runs),
    )
    return True


def mean(values: list[float], digits: int) -> str:
    deviation = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{deviation}, n={len(values)}"


if __name__ == "__main__":
    run_main(main)
