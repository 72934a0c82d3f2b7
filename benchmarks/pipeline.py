"""How long the default recipe takes from nothing, and what `dvc repro` costs when there is nothing to do.

python -m benchmarks.pipeline [--repeats N]

In a clone of its own with an empty cache: `dvc repro` once, with the wall time of each stage, then no-op
`dvc repro` N times, interleaved with no-op `dvc repro` of a pipeline of one trivial stage. The data comes from
data/raw of this checkout, so that the network is not measured.
"""

import argparse
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

from classifier.device import environment, set_threads
from classifier.errors import PipelineError, run_main

ROOT = Path(__file__).parent.parent
DVC = [sys.executable, "-m", "dvc"]

TRIVIAL = """\
stages:
  copy:
    cmd: cp input.txt output.txt
    deps: [input.txt]
    outs: [output.txt]
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=9, help="no-op runs of each pipeline (default 9)")
    repeats = parser.parse_args().repeats
    raw = ROOT / "data/raw"
    if not raw.is_dir():
        raise PipelineError(f"{raw}: missing; run `make repro` first, so that the data is local")

    with tempfile.TemporaryDirectory() as folder:
        env = isolated_environment(Path(folder)) | {"FASHION_MNIST_DIR": str(raw)}
        ours, trivial = Path(folder) / "ours", Path(folder) / "trivial"
        subprocess.run(["git", "clone", "--quiet", ROOT, ours], check=True)
        make_trivial(trivial, env)

        print_machine()
        total, stages = first_repro(ours, env)
        print(f"dvc repro from nothing, data local, n=1: {total:.1f} s")
        for stage, seconds in stages.items():
            print(f"  {stage:9} {seconds:6.1f} s")

        timings: dict[Path, list[float]] = {ours: [], trivial: []}
        for _ in range(repeats):
            for pipeline, seconds_taken in timings.items():
                seconds_taken.append(timed_repro(pipeline, env))
        for name, pipeline in (("these five stages", ours), ("one trivial stage", trivial)):
            runs = timings[pipeline]
            median = statistics.median(runs)
            print(f"no-op dvc repro, {name}, n={repeats}: median {median:.2f} s ({min(runs):.2f} to {max(runs):.2f})")
        ratios = [one / other for one, other in zip(timings[ours], timings[trivial], strict=True)]
        print(f"no-op ratio, n={repeats} pairs: median {statistics.median(ratios):.2f}")


def isolated_environment(folder: Path) -> dict[str, str]:
    """No setting of this shell or of the user's DVC reaches the measured commands, and no cache is shared."""
    env = {key: value for key, value in os.environ.items() if not key.startswith(("DVC_", "MLFLOW_"))}
    env.pop("PYTHONDONTWRITEBYTECODE", None)
    env["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{env['PATH']}"
    for kind in ("DVC_GLOBAL_CONFIG_DIR", "DVC_SYSTEM_CONFIG_DIR", "DVC_SITE_CACHE_DIR"):
        env[kind] = str(folder / kind)
    return env


def make_trivial(folder: Path, env: dict[str, str]) -> None:
    folder.mkdir()
    subprocess.run(["git", "init", "--quiet"], cwd=folder, check=True)
    subprocess.run([*DVC, "init", "--quiet"], cwd=folder, env=env, check=True)
    (folder / "input.txt").write_text("x\n")
    (folder / "dvc.yaml").write_text(TRIVIAL)
    timed_repro(folder, env)


def timed_repro(folder: Path, env: dict[str, str]) -> float:
    """Seconds of wall time that `dvc repro` takes in `folder`."""
    started = time.perf_counter()
    subprocess.run([*DVC, "repro", "--quiet"], cwd=folder, env=env, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - started


def first_repro(folder: Path, env: dict[str, str]) -> tuple[float, dict[str, float]]:
    """Seconds of wall time of a whole `dvc repro`, and from the start of each stage to the start of the next."""
    started = time.perf_counter()
    starts: dict[str, float] = {}
    with subprocess.Popen(
        [*DVC, "repro"], cwd=folder, env=env | {"PYTHONUNBUFFERED": "1"}, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if match := re.match(r"Running stage '(\w+)'", line):
                starts[match[1]] = time.perf_counter()
    ended = time.perf_counter()
    if process.returncode != 0:
        raise PipelineError("dvc repro failed; its messages are above")
    ends = [*list(starts.values())[1:], ended]
    return ended - started, {stage: end - start for (stage, start), end in zip(starts.items(), ends, strict=True)}


def print_machine() -> None:
    import torch

    set_threads("auto")
    here = environment(torch.device("cpu"))
    packages = ", ".join(f"{package} {version(package)}" for package in ("torch", "dvc", "mlflow"))
    print(f"{here['cpu']}, {here['threads']} threads, {here['system']}, Python {platform.python_version()}, {packages}")


if __name__ == "__main__":
    run_main(main)
