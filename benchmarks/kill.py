"""Kill the pipeline at random moments, and see that `dvc repro` then ends where an uninterrupted one does.

python -m benchmarks.kill [--times N] [--seed S] [--real]

In a copy of the project of its own: one whole `dvc repro`, then each stage once more alone, which gives its duration.
For each kill, all is set back to that state, a stage drawn at random is made to run again (its entry in dvc.lock, its
outputs, their bytes in DVC's cache and the run cache go), and at a moment drawn from its duration, start-up and writing
included, SIGKILL ends the stage, or dvc, or all processes at once. `dvc repro` follows immediately; if DVC was killed
while it wrote a file of its own and refuses that now, the file is brought back first (REFUSALS). Then

- every file below data, models and metrics must be as an uninterrupted run left it, byte for byte, and dvc.lock must
  say the same;
- the repository must hold no other file than after that run, but for lock files;
- MLflow's runs must be as they were, and of a new training there must be one more, FINISHED, with each epoch once;
- no process may be left.

The data is small; with --real it is Fashion-MNIST at the default parameters, from data/raw of this checkout.
"""

import argparse
import json
import random
import shutil
import sqlite3
import subprocess
import sys
import tempfile
import time
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import yaml

from benchmarks.measuring import DVC, ROOT, isolated_environment, machine
from classifier.errors import PipelineError, run_main
from classifier.files import WEIGHTS, hash_bytes, hash_file
from classifier.tracking import WEIGHTS_TAG

sys.path.insert(0, str(ROOT / "tests"))
from dvc_queue import processes_in
from project import Project, small_project

STAGES = ("download", "annotate", "train", "evaluate", "export")
TARGETS = ("stage", "dvc", "everything")
OUTPUTS = ("data", "models", "metrics")
# So that training takes seconds, on 160 images of which a checkpoint is written after every 7th batch; and of the
# formats two that are soon written
SMALL = {
    "epochs": "60", "batch_size": "8", "momentum": "0.9", "augment": "[crop, flip]", "checkpoint_steps": "7",
    "export_formats": "[onnx, safetensors]",
}  # fmt: skip
# What DVC, which writes both files in place, says of half a dvc.lock and of half a .dvc/tmp/rwlock
REFUSALS = ("dvc.lock' validation failed", "Unable to read RWLock-file")
ENDING_SECONDS = 60  # that a stage without dvc, its decoding processes and its sender may take to end


@dataclass
class Expected:
    """What an uninterrupted run of one stage leaves, and how long it takes."""

    stage_seconds: float  # of the stage's process
    seconds: float  # until dvc has ended, too
    outputs: dict[str, str]
    files: set[str]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", type=int, default=30, help="kills (default 30)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (default 0)")
    parser.add_argument("--real", action="store_true", help="Fashion-MNIST at the default parameters")
    arguments = parser.parse_args()

    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder), arguments.real)
        print(machine(("torch", "dvc", "mlflow")))
        started = time.perf_counter()
        bench.repro()
        print(f"dvc repro from nothing, n=1: {time.perf_counter() - started:.1f} s; seed {arguments.seed}")
        bench.remember()
        draw = random.Random(arguments.seed)  # noqa: S311
        expected: dict[str, Expected] = {}
        kills, late, faults = 0, 0, 0
        while kills < arguments.times:
            stage, target = draw.choice(STAGES), draw.choice(TARGETS)
            if stage not in expected:
                expected[stage] = bench.measure(stage)
            killed, what, differences = bench.kill(stage, target, draw.random(), expected[stage])
            verdict = "; ".join(differences) or "identical"
            kills, late, faults = kills + killed, late + (not killed), faults + bool(differences)
            print(f"{kills if killed else '':3} {stage:9} {target:10} {what}: {verdict}", flush=True)
    print(f"{kills} kills, {late} more came too late; {faults} left a difference")
    if faults:
        raise PipelineError("a kill left a difference; the lines above name it")


class Bench:
    """A project, and a copy of it as it was after a whole run."""

    def __init__(self, folder: Path, real: bool) -> None:
        self.env = isolated_environment(folder)
        if real:
            raw = ROOT / "data/raw"
            if not raw.is_dir():
                raise PipelineError(f"{raw}: missing; run `make repro` first, so that the data is local")
            self.env["FASHION_MNIST_DIR"] = str(raw)
            self.project = Project.create(folder / "project")
            self.project.commit()
        else:
            self.project = small_project(folder, **SMALL)
        self.root = self.project.root
        self.kept = folder / "kept"
        self.log = folder / "log"

    def repro(self) -> str:
        """Run `dvc repro` to its end; return what it prints. Raises PipelineError if it fails."""
        with self.start() as dvc:
            dvc.wait()
        if dvc.returncode != 0:
            raise PipelineError(f"dvc repro failed:\n{self.log.read_text()}")
        return self.log.read_text()

    def start(self) -> "subprocess.Popen[bytes]":
        with self.log.open("wb") as log:
            return subprocess.Popen(
                [*DVC, "repro"], cwd=self.root, env=self.env, stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )

    def remember(self) -> None:
        """Commit the results and keep the project as it is now, for each kill to start from."""
        self.project.commit()
        shutil.copytree(self.root, self.kept, symlinks=True)

    def set_back(self, stage: str) -> None:
        """Make the project what it was, but for one stage, which must run again."""
        shutil.rmtree(self.root)
        shutil.copytree(self.kept, self.root, symlinks=True)
        shutil.rmtree(self.root / ".dvc/cache/runs")
        lock = yaml.safe_load((self.root / "dvc.lock").read_text())
        for out in lock["stages"].pop(stage)["outs"]:
            path = self.root / out["path"]
            shutil.rmtree(path) if path.is_dir() else path.unlink()
            self.forget(out["md5"])
        (self.root / "dvc.lock").write_text(yaml.safe_dump(lock, sort_keys=False))

    def forget(self, md5: str) -> None:
        """Remove an object, and those that it lists if it is a folder, from DVC's cache."""
        path = self.root / ".dvc/cache/files/md5" / md5[:2] / md5[2:]
        if md5.endswith(".dir"):
            for entry in json.loads(path.read_bytes()):
                self.forget(entry["md5"])
        path.unlink(missing_ok=True)  # some are not cached, and two names may stand for one object

    def measure(self, stage: str) -> Expected:
        """Run one stage without a kill."""
        self.set_back(stage)
        with self.start() as dvc:
            process, started = self.wait_for(stage, dvc)
            psutil.wait_procs([process])
            stage_seconds = time.perf_counter() - started
            dvc.wait()
            seconds = time.perf_counter() - started
        before, outputs = digests(self.kept), digests(self.root)
        differing = [name for name in before.keys() | outputs.keys() if before.get(name) != outputs.get(name)]
        if dvc.returncode != 0 or differing:
            raise PipelineError(f"{stage} alone, without a kill: {differing} differ\n{self.log.read_text()}")
        print(f"  {stage:9} {stage_seconds:5.1f} s, with dvc {seconds:5.1f} s")
        return Expected(stage_seconds, seconds, outputs, files(self.root))

    def wait_for(self, stage: str, dvc: "subprocess.Popen[bytes]") -> tuple[psutil.Process, float]:
        """The process of a stage that dvc starts now, and when it was there; a shell that stays between is none."""
        while dvc.poll() is None:
            with suppress(psutil.NoSuchProcess):
                for process in psutil.Process(dvc.pid).children(recursive=True):
                    if process.cmdline()[-2:] == ["-m", f"stages.{stage}"]:
                        return process, time.perf_counter()
            time.sleep(0.005)
        raise PipelineError(f"dvc repro has not run {stage}:\n{self.log.read_text()}")

    def kill(self, stage: str, target: str, moment: float, expected: Expected) -> tuple[bool, str, list[str]]:
        """Kill once and go on; return whether it was in time, what happened, and what differs in the end.

        moment: from 0, the start of the stage, to 1, its end, or that of dvc.
        """
        self.set_back(stage)
        second = moment * (expected.stage_seconds if target == "stage" else expected.seconds)
        with self.start() as dvc:
            process, started = self.wait_for(stage, dvc)
            time.sleep(max(0.0, started + second - time.perf_counter()))
            there = processes_in(self.root)
            one = {"stage": process.pid, "dvc": dvc.pid}.get(target)
            victims = [victim for victim in there if one in (None, victim.pid)]
            for victim in victims:
                with suppress(psutil.NoSuchProcess):
                    victim.kill()
            dvc.wait()
        has_weights = (self.root / WEIGHTS).exists()
        what = f"{'killed' if victims else 'over before the kill'} at {second:5.2f} s"
        try:
            what += f", {self.go_on(stage)}"
        except PipelineError as error:
            return bool(victims), what, [str(error)]
        differences = self.left_running()
        self.project.run(sys.executable, "-m", "classifier", "sync")  # what a busy machine has not sent yet
        most_runs = 0 if stage != "train" else 2 if has_weights or target == "dvc" else 1
        differences += self.different_files(expected) + self.different_runs(most_runs)
        return bool(victims), what, differences

    def go_on(self, stage: str) -> str:
        """Repeat `dvc repro` as docs/reliability.md says; return how the stage went on."""
        try:
            return went_on(self.repro(), stage)
        except PipelineError as error:
            if not any(refusal in str(error) for refusal in REFUSALS):
                raise
        self.project.run("git", "restore", "dvc.lock")
        (self.root / ".dvc/tmp/rwlock").unlink(missing_ok=True)
        return f"DVC's own files restored, {went_on(self.repro(), stage)}"

    def left_running(self) -> list[str]:
        """The processes that do not end by themselves; they are ended."""
        _, left = psutil.wait_procs(processes_in(self.root), timeout=ENDING_SECONDS)
        lines = [f"process {process.pid} is left" for process in left]
        for process in left:
            process.kill()
        return lines

    def different_files(self, expected: Expected) -> list[str]:
        """Outputs with other bytes than after an uninterrupted run, and files too many or too few."""
        outputs, there = digests(self.root), files(self.root)
        names = sorted(outputs.keys() | expected.outputs.keys())
        lines = [f"{name} differs" for name in names if outputs.get(name) != expected.outputs.get(name)]
        lines += [f"{name} is left behind" for name in sorted(there - expected.files)]
        return lines + [f"{name} is missing" for name in sorted(expected.files - there)]

    def different_runs(self, most: int) -> list[str]:
        """What is wrong with MLflow's runs, of which there may be so many new ones.

        A training that had ended, and whose outputs dvc was killed before it took, has a finished run already: the
        training after it is another one, with a second.
        """
        before, after = stored_runs(self.kept), stored_runs(self.root)
        ((key, complete),) = before.items()
        lines = [f"run {key} is {after.get(key)}, was {complete}"] if after.get(key) != complete else []
        new = [run for other, run in after.items() if other != key]
        lines += [f"a new run is {run}, not {complete}" for run in new if run != complete]
        if not min(most, 1) <= len(new) <= most:
            lines.append(f"{len(new)} new runs")
        return lines


def went_on(printed: str, stage: str) -> str:
    """How a stage went on, in the words of what `dvc repro` printed."""
    if f"Running stage '{stage}'" not in printed:
        return "was done"
    return next((line.lower() for line in printed.splitlines() if line.startswith("Going on")), "began anew")


def digests(root: Path) -> dict[str, str]:
    """The md5 of every file below OUTPUTS, and of what dvc.lock says, whatever the order of its stages."""
    paths = [path for folder in OUTPUTS for path in (root / folder).rglob("*") if path.is_file()]
    lock = json.dumps(yaml.safe_load((root / "dvc.lock").read_text()), sort_keys=True)
    found = {path.relative_to(root).as_posix(): hash_file(path) for path in paths}
    return found | {"dvc.lock": hash_bytes(lock.encode())}


def files(root: Path) -> set[str]:
    """All files and folders, but for what Git, DVC, MLflow and Python keep, and locks."""
    return {
        name
        for path in root.rglob("*")
        if not (name := path.relative_to(root).as_posix()).startswith(
            (".git/", ".dvc/cache/", ".dvc/tmp/", "mlruns/", "mlflow.db")
        )
        and "__pycache__" not in path.parts
        and not name.endswith(".lock")
    }


def stored_runs(root: Path) -> dict[str, dict[str, Any]]:
    """The runs of the MLflow store by id: status, the md5 of the weights, and how often each metric has each step."""
    with closing(sqlite3.connect(root / "mlflow.db")) as store:
        statuses = dict(store.execute("SELECT run_uuid, status FROM runs"))
        weights = dict(store.execute("SELECT run_uuid, value FROM tags WHERE key = ?", [WEIGHTS_TAG]))
        logged = store.execute(
            "SELECT run_uuid, key, step, count(*) FROM metrics WHERE key IN "
            "('train_loss', 'val_loss', 'val_accuracy', 'images_per_second') GROUP BY run_uuid, key, step"
        ).fetchall()
    return {
        run: {
            "status": status,
            "weights": weights.get(run),
            "logged": {(key, step): count for other, key, step, count in logged if other == run},
        }
        for run, status in statuses.items()
    }


if __name__ == "__main__":
    run_main(main)
