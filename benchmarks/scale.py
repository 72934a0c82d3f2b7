"""What each stage costs in time and memory as the images grow in number, streamed.

python -m benchmarks.scale [--images N N ...] [--jpeg] [--memory-limit-gib G] [--network NAME]

For each N, a zip of N generated images in ten classes, no two alike: PNG of 28 x 28 grey pixels, or with --jpeg colour
JPEGs of 96 x 96 that become 32 x 32. In a copy of the project of its own, each stage once by `dvc repro --single-item`,
one epoch of training, with a memory limit that the images are far above; then a `dvc repro` with nothing to do. Printed
are the wall time, DVC's own included, the peak memory of the stage's largest process, and how both grow: the exponent
of the time (least squares in logarithms: 1 is as the images), and the bytes of memory that an image adds (least
squares).
"""

import io
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import psutil
from PIL import Image

from benchmarks.measuring import (
    DVC,
    POLL_SECONDS,
    ROOT,
    Report,
    exponent,
    isolated_environment,
    largest_child,
    parser,
)
from classifier.pipeline.errors import PipelineError, run_main

sys.path.insert(0, str(ROOT / "tests"))
from pictures import encode_png
from project import Project

STAGES = ("download", "annotate", "train", "evaluate", "export")
NOTHING = "no-op"
CLASSES = 10
PNG_SIDE, JPEG_SIDE, IMAGE_SIZE = 28, 96, 32
CHUNK = 1000  # images that a process makes at a time

Figures = dict[str, tuple[float, int]]  # of each stage: seconds, and peak bytes of its largest process


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--images", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    arguments.add_argument("--jpeg", action="store_true", help="colour JPEGs, which take longer to make and to decode")
    arguments.add_argument("--memory-limit-gib", type=float, help="default: an eighth of the fewest images, decoded")
    arguments.add_argument("--network", default="mlp")
    given = arguments.parse_args()

    report = Report("Scale", ("torch", "dvc", "mlflow"), given.page)
    bytes_of_image = 3 * IMAGE_SIZE**2 if given.jpeg else PNG_SIDE**2
    limit = given.memory_limit_gib or min(given.images) * bytes_of_image / 8 / 2**30
    kind = f"JPEGs of {JPEG_SIDE} x {JPEG_SIDE}, made {IMAGE_SIZE} x {IMAGE_SIZE}" if given.jpeg else (
        f"PNGs of {PNG_SIDE} x {PNG_SIDE}"
    )  # fmt: skip
    report.line(f"{kind}; network {given.network}; memory limit {limit * 1024:,.1f} MiB; n=1 for each number of images")
    measured: dict[int, Figures] = {}
    for count in given.images:
        with tempfile.TemporaryDirectory(prefix="scale-") as folder:
            data = Path(folder) / "images.zip"
            make_images(data, count, given.jpeg)
            decoded = count * bytes_of_image
            report.line(
                f"\n{count:,} images, {data.stat().st_size / 2**20:,.0f} MiB, decoded {decoded / 2**20:,.0f} MiB"
            )
            project = Project.create(Path(folder) / "project")
            project.set_params(
                source="folder", data_path=str(data), network=given.network, epochs="1", batch_size="256",
                image_size=str(IMAGE_SIZE) if given.jpeg else "", memory_limit_gib=repr(limit), export_formats="[onnx]",
            )  # fmt: skip
            project.commit()
            measured[count] = measure(report, project.root, count, isolated_environment(Path(folder)))
    if len(measured) > 1:
        report_growth(report, measured)
    report.save()


def measure(report: Report, folder: Path, count: int, env: dict[str, str]) -> Figures:
    figures = {}
    for name in (*STAGES, NOTHING):
        seconds, peak = run(folder, [name] if name in STAGES else [], env)
        figures[name] = (seconds, peak)
        each = seconds / count * 1e6
        memory = f"{peak / 2**20:7,.0f} MiB" if name in STAGES else ""
        report.line(f"  {name:9} {seconds:8.1f} s {each:8.1f} us an image {memory}".rstrip())
    return figures


def report_growth(report: Report, measured: dict[int, Figures]) -> None:
    counts = list(measured)
    report.line(f"\nfrom {min(counts):,} to {max(counts):,} images, {len(counts)} sizes")
    for name in (*STAGES, NOTHING):
        seconds, peaks = zip(*(figures[name] for figures in measured.values()), strict=True)
        line = f"  {name:9} time exponent {exponent(counts, seconds):5.2f}"
        if name in STAGES:
            bytes_each, _ = np.polyfit(counts, peaks, 1)
            line += f", memory {bytes_each:8.1f} bytes an image, {max(peaks) / min(peaks):5.2f} times the least"
        report.line(line)


def make_images(path: Path, count: int, jpeg: bool) -> None:
    """A zip with a folder for each class; an image is a surface of its own, and brighter by its class."""
    make = _jpegs if jpeg else _pngs
    with ProcessPoolExecutor() as pool, zipfile.ZipFile(path, "w") as archive:
        for numbers, contents in zip(chunks(count), pool.map(make, chunks(count)), strict=True):
            for index, content in zip(numbers, contents, strict=True):
                archive.writestr(f"{index % CLASSES}/{index:07d}.{'jpg' if jpeg else 'png'}", content)


def chunks(count: int) -> Iterator[range]:
    return (range(start, min(start + CHUNK, count)) for start in range(0, count, CHUNK))


def _pngs(indices: range) -> list[bytes]:
    images = np.random.default_rng(indices.start).integers(0, 128, (len(indices), PNG_SIDE, PNG_SIDE), np.uint8)
    brighter = 12 * (np.array(indices) % CLASSES).astype(np.uint8)
    return [encode_png(image) for image in images + brighter[:, None, None]]


def _jpegs(indices: range) -> list[bytes]:
    contents = []
    for index in indices:
        few = np.random.default_rng(index).integers(0, 128, (8, 8, 3), dtype=np.uint8) + 12 * (index % CLASSES)
        picture = Image.fromarray(few.astype(np.uint8)).resize((JPEG_SIDE, JPEG_SIDE), Image.Resampling.BICUBIC)
        file = io.BytesIO()
        picture.save(file, "JPEG", quality=85)
        contents.append(file.getvalue())
    return contents


def run(folder: Path, stage: list[str], env: dict[str, str]) -> tuple[float, int]:
    """Seconds of `dvc repro`, of one stage or all, and the peak memory of the largest process that it starts."""
    command = [*DVC, "repro", *(["--single-item", *stage] if stage else [])]
    started = time.perf_counter()
    with (folder.parent / "dvc.log").open("w+") as log:
        with subprocess.Popen(command, cwd=folder, env=env, stdout=log, stderr=subprocess.STDOUT) as process:
            peak = 0
            while process.poll() is None:
                peak = max(peak, largest_child(psutil.Process(process.pid)))
                time.sleep(POLL_SECONDS)
        seconds = time.perf_counter() - started
        if process.returncode != 0:
            log.seek(0)
            raise PipelineError(f"{' '.join(command[2:])} failed:\n{log.read()}")
    return seconds, peak


if __name__ == "__main__":
    run_main(main)
