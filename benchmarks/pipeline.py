"""What the pipeline costs besides its arithmetic: by stage, when there is nothing to do, an experiment, and its layout.

python -m benchmarks.pipeline [--repeats N] [--experiments N] [--epochs N] [--files N]

In a clone of its own with an empty cache, with the data of data/raw of this checkout, so that the network is not
measured:

- `dvc repro` once: each stage's wall time, the share of it that is the start of Python and imports, and the peak memory
  of its largest process;
- `dvc exp run -S lr=...` N times, interleaved with one of the trivial pipeline below: the wall time by stage, and how
  much of it is not the training loop's own;
- `dvc exp run train` N times, on 1,797 small images for one epoch: what a trial costs up to its validation figure where
  the training itself takes no time, in wall time and in seconds of all processors;
- the training loop with tracking, interleaved with one whose records nobody sends;
- no-op `dvc repro` N times, interleaved with that of a pipeline of one trivial stage;
- the same images as one zip and as a folder of 70,000 files, each the output of a stage that makes it of a zip: first
  and no-op `dvc repro`, push to and pull from a remote in a folder.
"""

import re
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
import psutil
from sklearn.datasets import load_digits

from benchmarks.measuring import (
    DVC,
    POLL_SECONDS,
    ROOT,
    Report,
    isolated_environment,
    largest_child,
    median_ratio,
    parser,
    raw_data,
    summary,
)
from classifier.pipeline.errors import PipelineError, run_main
from classifier.sources.fashion_mnist import read

sys.path.insert(0, str(ROOT / "tests"))
from pictures import encode_png, write_zip

IMPORT_RUNS = 5
RATES = (0.0011, 0.0012, 0.0013, 0.0014, 0.0015)  # of the experiments; none is the committed one

TRIVIAL = """\
stages:
  copy:
    cmd: cp input.txt output.txt
    deps: [input.txt]
    params: [lr]
    outs: [output.txt]
"""
# The train stage with a process beside it that takes what is to be sent, and sends nothing
WITHOUT_SENDER = """\
import os, runpy, subprocess
from classifier.tracking import tracker as tracking
def start_cat():
    cat = subprocess.Popen(["cat"], bufsize=0, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    os.set_blocking(cat.stderr.fileno(), False)
    return cat
tracking._start_sender = start_cat
runpy.run_module("stages", run_name="__main__")
"""
LAYOUTS = {"one zip": "cp source.zip images", "files": "python -m zipfile -e source.zip images"}
LAYOUT = """\
stages:
  make:
    cmd: {command}
    deps: [source.zip]
    outs: [images]
"""


class Stage(NamedTuple):
    """A stage of a `dvc repro`: seconds from its start to that of the next, and peak bytes of its largest process."""

    name: str
    seconds: float
    peak: int


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--repeats", type=int, default=9, help="no-op runs of each pipeline (default 9)")
    arguments.add_argument("--experiments", type=int, choices=range(1, len(RATES) + 1), default=3, metavar="N",
                           help="of them, and pairs of trainings, up to 5 (default 3)")  # fmt: skip
    arguments.add_argument("--epochs", type=int, help="of training (default: as in params.yaml)")
    arguments.add_argument("--files", type=int, default=70_000, help="images of the two layouts (default 70000)")
    given = arguments.parse_args()
    raw = raw_data()

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        env = isolated_environment(folder) | {"FASHION_MNIST_DIR": str(raw)}
        ours = folder / "ours"
        subprocess.run(["git", "clone", "--quiet", ROOT, ours], check=True)
        if given.epochs:
            params = (ours / "params.yaml").read_text()
            (ours / "params.yaml").write_text(re.sub(r"(?m)^epochs: \d+", f"epochs: {given.epochs}", params))
        report = Report("Pipeline", ("torch", "dvc", "mlflow"), given.page)
        measure_stages(report, ours, env)
        measure_experiments(report, ours, folder / "trivial", env, given.experiments)
        measure_trials(report, folder / "trials", env, given.experiments)
        measure_tracking(report, ours, env, given.experiments)
        measure_nothing_to_do(report, ours, folder / "trivial", env, given.repeats)
        measure_layouts(report, folder, raw, env, given.files, given.repeats)
        report.save()


def measure_stages(report: Report, ours: Path, env: dict[str, str]) -> None:
    total, stages, _ = watched([*DVC, "repro"], ours, env)
    report.line(f"\ndvc repro from nothing, data local, n=1: {total:.1f} s")
    for stage in stages:
        starts = [start_seconds(stage.name, ours, env) for _ in range(IMPORT_RUNS)]
        start = statistics.median(starts)
        report.line(
            f"  {stage.name:9} {stage.seconds:6.1f} s, of which start and imports {start:4.1f} s "
            f"({start / stage.seconds:4.0%}; n={IMPORT_RUNS}), peak memory {stage.peak / 2**20:6,.0f} MiB"
        )


def measure_experiments(report: Report, ours: Path, trivial: Path, env: dict[str, str], repeats: int) -> None:
    make_repository(trivial, TRIVIAL, env)
    (trivial / "input.txt").write_text("x\n")
    (trivial / "params.yaml").write_text("lr: 0.001\n")
    dvc_seconds(trivial, env, "repro")
    subprocess.run(["git", "add", "--all"], cwd=trivial, check=True)
    author = ["-c", "user.name=Benchmark", "-c", "user.email=benchmark@example.org"]
    subprocess.run(["git", *author, "commit", "--quiet", "--message", "Trivial"], cwd=trivial, check=True)
    parts: dict[str, list[float]] = {}
    floor = []
    for rate in RATES[:repeats]:
        experiment = ("exp", "run", "--set-param", f"lr={rate}")
        total, stages, printed = watched([*DVC, *experiment], ours, env)
        training = loop_seconds(printed, ours)
        seconds = {stage.name: stage.seconds for stage in stages}
        # The first stage's seconds begin when DVC says that it starts it
        seconds |= {"train": seconds["train"] - training, "DVC before the stages": total - sum(seconds.values())}
        for name, value in ({"training loop": training, "all else": total - training} | seconds).items():
            parts.setdefault(name, []).append(value)
        floor.append(dvc_seconds(trivial, env, *experiment))
    report.line(f"\ndvc exp run -S lr=..., which runs {', '.join(stage.name for stage in stages)}:")
    for name, values in parts.items():
        indent = "  " if name in ("training loop", "all else") else "    "
        without = " without the loop" if name == "train" else ""
        report.line(f"{indent}{name}{without}: {summary(values, 's', 1)}")
    report.line(f"  dvc exp run of one trivial stage: {summary(floor, 's', 1)}")


def measure_trials(report: Report, clone: Path, env: dict[str, str], repeats: int) -> None:
    subprocess.run(["git", "clone", "--quiet", ROOT, clone], check=True)
    (clone / "dvc.lock").unlink()  # DVC would look in the empty cache for what it names
    for index, (pixels, label) in enumerate(zip(*load_digits(return_X_y=True), strict=True)):
        path = clone / f"data/own/{label}/{index:04d}.png"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(encode_png((pixels.reshape(8, 8) * (255 / 16)).round().astype(np.uint8)))
    data = ["-S", "source=folder", "-S", "data_path=data/own", "-S", "epochs=1"]
    watched([*DVC, "exp", "run", *data], clone, env)  # what a trial finds done
    parts: dict[str, list[float]] = {"wall time": [], "all processors": [], "train stage": []}
    for rate in RATES[:repeats]:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        total, (_, train), _ = watched([*DVC, "exp", "run", "train", "-S", f"lr={rate}"], clone, env)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        parts["wall time"].append(total)
        parts["train stage"].append(train.seconds)
        parts["all processors"].append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    report.line("\ndvc exp run train -S lr=..., one epoch of 1,151 images of 8 x 8:")
    for name, values in parts.items():
        report.line(f"  {name}: {summary(values, 's', 1)}")


def measure_tracking(report: Report, ours: Path, env: dict[str, str], repeats: int) -> None:
    commands = {"with": ["-m", "stages", "train"], "without": ["-c", WITHOUT_SENDER, "train"]}
    loops: dict[str, list[float]] = {kind: [] for kind in commands}
    for _ in range(repeats):
        for kind, arguments in commands.items():
            done = subprocess.run(
                [sys.executable, *arguments], cwd=ours, env=env, check=True, stdout=subprocess.PIPE, text=True
            )
            loops[kind].append(loop_seconds(done.stdout, ours))
    report.line()
    for kind, seconds in loops.items():
        report.line(f"training loop {kind} a process that sends to MLflow: {summary(seconds, 's')}")
    report.line(f"tracking ratio: median {median_ratio(loops['with'], loops['without']):.3f}, n={repeats} pairs")


def loop_seconds(printed: str, ours: Path) -> float:
    """The training loop's own seconds, by what the stage told of each epoch: its images a second."""
    images = len((ours / "data/annotations/train.csv").read_text().splitlines()) - 1
    return sum(images / float(rate.replace(",", "")) for rate in re.findall(r"([\d,]+) images/s", printed))


def measure_nothing_to_do(report: Report, ours: Path, trivial: Path, env: dict[str, str], repeats: int) -> None:
    timings: dict[Path, list[float]] = {ours: [], trivial: []}
    for _ in range(repeats):
        for pipeline, seconds in timings.items():
            seconds.append(dvc_seconds(pipeline, env, "repro"))
    report.line()
    report.line(f"no-op dvc repro, these five stages: {summary(timings[ours], 's')}")
    report.line(f"no-op dvc repro, one trivial stage: {summary(timings[trivial], 's')}")
    report.line(f"no-op ratio: median {median_ratio(timings[ours], timings[trivial]):.2f}, n={repeats} pairs")


def measure_layouts(report: Report, folder: Path, raw: Path, env: dict[str, str], count: int, repeats: int) -> None:
    images = np.concatenate([np.asarray(split.images) for split in read(raw).values()])[:count]
    source = folder / "source.zip"
    write_zip(source, ((f"{index:05d}.png", encode_png(image)) for index, image in enumerate(images)))
    repositories = {kind: folder / f"layout{number}" for number, kind in enumerate(LAYOUTS)}
    seconds: dict[str, dict[str, list[float]]] = {}
    for kind, repository in repositories.items():
        make_repository(repository, LAYOUT.format(command=LAYOUTS[kind]), env)
        shutil.copyfile(source, repository / "source.zip")
        subprocess.run([*DVC, "remote", "add", "--quiet", "--default", "local", f"{repository}-remote"],
                       cwd=repository, env=env, check=True)  # fmt: skip
        seconds[kind] = {"first repro": [dvc_seconds(repository, env, "repro")], "no-op repro": []}
    for _ in range(repeats):
        for kind, repository in repositories.items():
            seconds[kind]["no-op repro"].append(dvc_seconds(repository, env, "repro"))
    for kind, repository in repositories.items():
        seconds[kind]["push"] = [dvc_seconds(repository, env, "push")]
        shutil.rmtree(repository / ".dvc/cache")
        made = repository / "images"
        shutil.rmtree(made) if made.is_dir() else made.unlink()
        seconds[kind]["pull"] = [dvc_seconds(repository, env, "pull")]
    report.line(f"\n{len(images):,} PNG images as one zip, and as files in a folder; n=1, no-op n={repeats} (median):")
    for what in seconds["one zip"]:
        one, many = (statistics.median(seconds[kind][what]) for kind in LAYOUTS)
        report.line(f"  {what:11} {one:7.2f} s and {many:7.2f} s, ratio {many / one:.1f}")


def make_repository(folder: Path, pipeline: str, env: dict[str, str]) -> None:
    folder.mkdir()
    subprocess.run(["git", "init", "--quiet"], cwd=folder, check=True)
    subprocess.run([*DVC, "init", "--quiet"], cwd=folder, env=env, check=True)
    (folder / "dvc.yaml").write_text(pipeline)


def dvc_seconds(folder: Path, env: dict[str, str], *command: str) -> float:
    """Seconds of wall time that a command of DVC's takes in `folder`."""
    started = time.perf_counter()
    subprocess.run([*DVC, *command, "--quiet"], cwd=folder, env=env, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - started


def start_seconds(stage: str, folder: Path, env: dict[str, str]) -> float:
    """Seconds that Python takes to start and to import all that a stage imports first."""
    started = time.perf_counter()
    subprocess.run([sys.executable, "-c", f"import stages.{stage}"], cwd=folder, env=env, check=True)
    return time.perf_counter() - started


def watched(command: list[str], folder: Path, env: dict[str, str]) -> tuple[float, list[Stage], str]:
    """Run DVC; return the seconds of wall time, the stages that it ran, and what was printed."""
    started = time.perf_counter()
    printed: list[str] = []
    starts: dict[str, float] = {}
    peaks: dict[str, int] = {}
    with subprocess.Popen(
        command, cwd=folder, env=env | {"PYTHONUNBUFFERED": "1"}, stdout=subprocess.PIPE, text=True
    ) as process:
        watcher = threading.Thread(target=_note_peaks, args=(psutil.Process(process.pid), starts, peaks))
        watcher.start()
        assert process.stdout is not None
        for line in process.stdout:
            printed.append(line)
            if match := re.match(r"Running stage '(\w+)'", line):
                starts[match[1]] = time.perf_counter()
    ended = time.perf_counter()
    watcher.join()
    if process.returncode != 0:
        raise PipelineError(f"{' '.join(command[2:])} failed; its messages are above")
    moments = [*starts.values(), ended]
    stages = [
        Stage(name, end - start, peaks.get(name, 0))
        for name, (start, end) in zip(starts, pairwise(moments), strict=True)
    ]
    return ended - started, stages, "".join(printed)


def _note_peaks(dvc: psutil.Process, starts: dict[str, float], peaks: dict[str, int]) -> None:
    """Until DVC ends, note the peak memory of the largest process below it for the stage that was started last."""
    while dvc.is_running() and dvc.status() != psutil.STATUS_ZOMBIE:
        if starts:
            stage = list(starts)[-1]
            peaks[stage] = max(peaks.get(stage, 0), largest_child(dvc))
        time.sleep(POLL_SECONDS)


if __name__ == "__main__":
    run_main(main)
