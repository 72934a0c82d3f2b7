"""What each stage costs in time and memory on many images of one's own, streamed.

python -m benchmarks.large [--images N N ...] [--memory-limit-gib G] [--network NAME]

For each N, a zip of N small colour JPEGs, no two alike, in ten classes; in a copy of the project of its own, each stage
once by `dvc repro --single-item`, one epoch of training, with a memory limit that the images are far above. Printed are
the wall time, DVC's own included, the time for each image, and the peak memory of the stage's largest process.
"""

import argparse
import io
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from pathlib import Path

import numpy as np
import psutil
from PIL import Image

from benchmarks.pipeline import DVC, ROOT, isolated_environment, print_machine
from classifier.errors import PipelineError, run_main

sys.path.insert(0, str(ROOT / "tests"))
from project import Project

STAGES = ("download", "annotate", "train", "evaluate", "export")
CLASSES = 10
JPEG_SIDE, IMAGE_SIZE = 96, 32
POLL_SECONDS = 0.1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, nargs="+", default=[50_000, 100_000, 200_000])
    parser.add_argument("--memory-limit-gib", type=float, default=0.05)
    parser.add_argument("--network", default="mlp")
    arguments = parser.parse_args()

    print_machine()
    for count in arguments.images:
        with tempfile.TemporaryDirectory(prefix="large-") as folder:
            data = Path(folder) / "images.zip"
            write_jpegs(data, count)
            decoded = count * 3 * IMAGE_SIZE**2 / 2**20
            print(f"\n{count:,} JPEGs of {JPEG_SIDE} x {JPEG_SIDE}, {data.stat().st_size / 2**20:,.0f} MiB; ", end="")
            print(f"decoded to {IMAGE_SIZE} x {IMAGE_SIZE} {decoded:,.0f} MiB, limit {arguments.memory_limit_gib} GiB")
            project = Project.create(Path(folder) / "project")
            project.set_params(
                source="folder", data_path=str(data), image_size=str(IMAGE_SIZE), network=arguments.network, epochs="1",
                batch_size="256", memory_limit_gib=str(arguments.memory_limit_gib), export_formats="[onnx]",
            )  # fmt: skip
            project.commit()
            env = isolated_environment(Path(folder))
            for stage in STAGES:
                seconds, peak = run_stage(project.root, stage, env)
                print(f"  {stage:9} {seconds:7.1f} s {seconds / count * 1e6:7.0f} us an image {peak / 2**20:7,.0f} MiB")


def write_jpegs(path: Path, count: int) -> None:
    """A zip with a folder for each class; an image is a smooth surface of its own, and brighter by its class."""
    with ProcessPoolExecutor() as pool, zipfile.ZipFile(path, "w") as archive:
        for start, contents in enumerate(pool.map(_jpegs, chunks(count))):
            for place, content in enumerate(contents):
                index = start * CHUNK + place
                archive.writestr(f"{index % CLASSES}/{index:07d}.jpg", content)


CHUNK = 1000


def chunks(count: int) -> Iterator[range]:
    return (range(start, min(start + CHUNK, count)) for start in range(0, count, CHUNK))


def _jpegs(indices: range) -> list[bytes]:
    contents = []
    for index in indices:
        few = np.random.default_rng(index).integers(0, 128, (8, 8, 3), dtype=np.uint8) + 12 * (index % CLASSES)
        picture = Image.fromarray(few.astype(np.uint8)).resize((JPEG_SIDE, JPEG_SIDE), Image.Resampling.BICUBIC)
        file = io.BytesIO()
        picture.save(file, "JPEG", quality=85)
        contents.append(file.getvalue())
    return contents


def run_stage(folder: Path, stage: str, env: dict[str, str]) -> tuple[float, int]:
    """Seconds of `dvc repro` of one stage, and the peak memory (resident, in bytes) of the stage's largest process."""
    started = time.perf_counter()
    with (folder.parent / f"{stage}.log").open("w+") as log:
        with subprocess.Popen(
            [*DVC, "repro", "--single-item", stage], cwd=folder, env=env, stdout=log, stderr=subprocess.STDOUT
        ) as process:
            peak = 0
            while process.poll() is None:
                peak = max(peak, _resident(psutil.Process(process.pid)))
                time.sleep(POLL_SECONDS)
        seconds = time.perf_counter() - started
        if process.returncode != 0:
            log.seek(0)
            raise PipelineError(f"{stage} failed:\n{log.read()}")
    return seconds, peak


def _resident(dvc: psutil.Process) -> int:
    """The largest resident set among the processes that DVC has started."""
    sizes = [0]
    with suppress(psutil.NoSuchProcess):
        for process in dvc.children(recursive=True):
            with suppress(psutil.NoSuchProcess):
                sizes.append(process.memory_info().rss)
    return max(sizes)


if __name__ == "__main__":
    run_main(main)
