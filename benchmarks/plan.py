"""What a data set of many images takes, worked out from what one image takes here.

python -m benchmarks.plan [--images N] [--sample N] [--rates R R ...]

For three kinds of images: the bytes of an original JPEG and of the image in data/images; the seconds of a core that
`annotate` takes to make the one from the other, that training takes to read it, in any order, and that it takes to be
hashed; and the images/s that a network trains on here. From these, for N images: storage, shards, time, and how many
cores feed an accelerator that trains on R images/s.
"""

import io
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import nn

from benchmarks.measuring import Report, parser
from classifier.compute.device import keep_freed_memory
from classifier.data.arrays import SHARD_BYTES, array_files
from classifier.data.dataset import CustomImageDataset
from classifier.networks import build_network
from classifier.pipeline.annotations import write_csv
from classifier.pipeline.errors import run_main
from classifier.pipeline.outputs import hash_file
from classifier.preparation.preprocessing import Recipe, write_images
from classifier.preparation.workers import start_workers
from classifier.sources import LabelledImages

CLASSES = 10
STEPS = 8  # of a network, after two that are not counted


class Kind(NamedTuple):
    """Images of one shape, what they are made of, and a network that is trained on them."""

    shape: tuple[int, int, int]  # channels, height, width
    original: tuple[int, int]  # width and height of a JPEG
    network: str
    batch_size: int


KINDS = (
    Kind((1, 28, 28), (28, 28), "cnn", 256),
    Kind((3, 96, 96), (192, 144), "cnn", 64),
    Kind((3, 224, 224), (500, 375), "resnet18", 16),
)


class Cost(NamedTuple):
    """What an image takes: bytes, seconds of a core, and images/s of the network on all threads."""

    original_bytes: float
    stored_bytes: float
    annotate: float
    read: float
    hash: float
    trained: float


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--images", type=int, default=100_000_000)
    arguments.add_argument("--sample", type=int, default=1000, help="images to measure with (default 1000)")
    arguments.add_argument("--rates", type=float, nargs="+", default=[1000, 3000], help="of an accelerator, images/s")
    given = arguments.parse_args()
    report = Report("Plan", ("torch", "pillow"), given.page)
    keep_freed_memory()
    for kind in KINDS:
        cost = measure(kind, given.sample)
        channels, height, width = kind.shape
        report.line(f"\n{height} x {width} x {channels}, from JPEGs of {kind.original[0]} x {kind.original[1]}")
        report.line(f"  an image: original {cost.original_bytes:,.0f} bytes, in data/images {cost.stored_bytes:,.0f}")
        report.line(
            f"    us of a core: annotate {cost.annotate * 1e6:,.0f}, read {cost.read * 1e6:,.0f}, "
            f"hash {cost.hash * 1e6:,.1f}"
        )
        report.line(f"    {kind.network} trains on {cost.trained:,.0f} images/s, {torch.get_num_threads()} threads")
        report_plan(report, cost, given.images, given.rates)
    report.save()


def report_plan(report: Report, cost: Cost, images: int, rates: Sequence[float]) -> None:
    terabytes = images * cost.stored_bytes / 1e12
    report.line(
        f"  {images:,} images: original {images * cost.original_bytes / 1e12:,.2f} TB, data/images {terabytes:,.2f} TB "
        f"in {-(-images * cost.stored_bytes // SHARD_BYTES):,.0f} shards"
    )
    report.line(
        f"    annotate {images * cost.annotate / 3600:,.0f} core hours, one hashing {images * cost.hash / 3600:,.2f} "
        f"core hours, sent at 10 Gbit/s {terabytes * 8e12 / 1e10 / 3600:,.2f} h"
    )
    epoch = images / cost.trained / 3600
    report.line(f"    an epoch: {epoch:,.0f} h on a machine as this one, {epoch / 64:,.1f} h on 64 of them")
    for rate in rates:
        hours = images / rate / 3600
        report.line(
            f"    an accelerator of {rate:,.0f} images/s: {hours:,.1f} h, 8 of them {hours / 8:,.1f} h; "
            f"fed by {rate * cost.read:,.2f} cores each, {rate * cost.stored_bytes / 1e6:,.0f} MB/s"
        )


def measure(kind: Kind, sample: int) -> Cost:
    originals = [jpeg(index, kind.original) for index in range(sample)]
    labels = np.arange(sample, dtype=np.int64) % CLASSES
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        splits = {"train": LabelledImages(originals, labels)}
        (folder / "images").mkdir()
        started = time.process_time()  # of all threads
        with start_workers(sample) as pool:
            write_images(pool, splits, Recipe(kind.shape, "pad", (255, 255, 255), "full"), folder / "images")
        annotate = time.process_time() - started
        write_csv(folder / "train.csv", {"file": range(sample), "label": labels, "row": range(sample)})
        dataset = CustomImageDataset(folder / "train.csv", folder / "images", classes=CLASSES)
        order = np.random.default_rng(0).permutation(sample).tolist()
        started = time.process_time()
        for index in order:
            dataset.read([index])
        read = time.process_time() - started
        files = array_files(folder / "images")
        started = time.process_time()
        for path in files:
            hash_file(path)
        hashing = time.process_time() - started
        stored_bytes = sum(path.stat().st_size for path in files)
    return Cost(
        sum(map(len, originals)) / sample, stored_bytes / sample, annotate / sample, read / sample, hashing / sample,
        training_rate(kind),
    )  # fmt: skip


def jpeg(index: int, size: tuple[int, int]) -> bytes:
    """A picture of smooth surfaces with grain, which takes about the bytes that a photograph takes."""
    generator = np.random.default_rng(index)
    few = Image.fromarray(generator.integers(0, 255, (8, 8, 3), dtype=np.uint8))
    smooth = np.asarray(few.resize(size, Image.Resampling.BICUBIC), np.float64)
    picture = smooth + generator.normal(0, 10, (*smooth.shape[:2], 1))
    file = io.BytesIO()
    Image.fromarray(picture.clip(0, 255).astype(np.uint8)).save(file, "JPEG", quality=90)
    return file.getvalue()


def training_rate(kind: Kind) -> float:
    """Images/s of training steps on a batch that is there, in bfloat16."""
    torch.manual_seed(0)
    network = build_network(kind.network, kind.shape, CLASSES).train()
    optimizer = torch.optim.SGD(network.parameters(), lr=0.01, momentum=0.9)
    pixels, labels = torch.rand(kind.batch_size, *kind.shape), torch.arange(kind.batch_size) % CLASSES
    for step in range(2 + STEPS):
        if step == 2:
            started = time.perf_counter()
        with torch.autocast("cpu", torch.bfloat16):
            loss = nn.functional.cross_entropy(network(pixels), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return STEPS * kind.batch_size / (time.perf_counter() - started)


if __name__ == "__main__":
    run_main(main)
