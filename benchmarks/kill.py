"""Kill the pipeline at random moments, and see that it then ends where an uninterrupted run does.

python -m benchmarks.kill [--times N] [--seed S] [--ways repro torchrun temp queue] [--real]

In a copy of the project of its own: one whole `dvc repro`, then each stage once more alone, which gives its duration.
For each kill, all is set back to that state, and a way to run is drawn:

- repro: a stage drawn at random is made to run again (its entry in dvc.lock, its outputs, their bytes in DVC's cache
  and the run cache go), and at a moment drawn from its duration, start-up and writing included, SIGKILL ends the stage,
  or dvc, or all processes at once. `dvc repro` follows immediately; if DVC was killed while it wrote a file of its own
  and refuses that now, the file is brought back first (REFUSALS).
- torchrun: the same, of a training by two processes; or one of these is killed, which torchrun starts again.
- temp: `dvc exp run --temp` with another learning rate. Its stage, dvc, or all processes are killed. The same command
  follows, and `classifier queue resume` for the copy that the first one left.
- queue: the same experiment in DVC's queue. The worker or all processes are killed; `classifier queue resume` follows.

Then

- every file below data, models and metrics must be as an uninterrupted run left it, byte for byte, and dvc.lock must
  say the same; of an experiment, its commit must hold the same dvc.lock and metrics;
- the repository must hold no other file than after that run, but for lock files;
- MLflow's runs must be as they were, and of a new training there must be one more, FINISHED, with each epoch once;
- no process may be left.

The data is small; with --real it is Fashion-MNIST at the default parameters, from data/raw of this checkout.
"""

import argparse
import json
import random
import re
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

from benchmarks.measuring import ROOT, machine
from classifier.pipeline.errors import PipelineError, run_main
from classifier.pipeline.outputs import hash_bytes, hash_file
from classifier.pipeline.paths import WEIGHTS
from classifier.tracking.tracker import WEIGHTS_TAG

sys.path.insert(0, str(ROOT / "tests"))
from dvc_queue import processes_in, stop_queue, wait_for_queue
from project import Project, clean_environment, python, small_project

STAGES = ("download", "annotate", "train", "evaluate", "export")
TARGETS = {
    "repro": ("stage", "dvc", "everything"),
    "torchrun": ("stage", "dvc", "everything", "process"),
    "temp": ("stage", "dvc", "everything"),
    "queue": ("worker", "everything"),
}  # by way
EXPERIMENT = ["-S", "lr=0.05"]
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
    parser.add_argument("--ways", nargs="+", choices=TARGETS, default=list(TARGETS), help="to run (default: all)")
    arguments = parser.parse_args()

    with tempfile.TemporaryDirectory() as folder:
        print(f"{machine(('torch', 'dvc', 'mlflow'))}; seed {arguments.seed}")
        draw = random.Random(arguments.seed)  # noqa: S311
        benches: dict[str, Bench] = {}
        kills, late, faults = 0, 0, 0
        while kills < arguments.times:
            way = draw.choice(arguments.ways)
            if way not in benches:
                kind = Experiments if way in ("temp", "queue") else Bench
                benches[way] = kind(Path(folder) / way, way, arguments.real)
            stage = draw.choice(STAGES) if way == "repro" else "train"
            target = draw.choice(TARGETS[way])
            killed, what, differences = benches[way].kill(stage, target, draw.random())
            verdict = "; ".join(differences) or "identical"
            kills, late, faults = kills + killed, late + (not killed), faults + bool(differences)
            print(f"{kills if killed else '':3} {way:8} {stage:9} {target:10} {what}: {verdict}", flush=True)
    print(f"{kills} kills, {late} more came too late; {faults} left a difference")
    if faults:
        raise PipelineError("a kill left a difference; the lines above name it")


class Bench:
    """A project, and a copy of it as it was after a whole run."""

    def __init__(self, folder: Path, way: str, real: bool) -> None:
        folder.mkdir()
        self.env = clean_environment(folder)
        launcher = {"launcher": "torchrun --nproc-per-node=2 --max-restarts=1"} if way == "torchrun" else {}
        if real:
            raw = ROOT / "data/raw"
            if not raw.is_dir():
                raise PipelineError(f"{raw}: missing; run `make repro` first, so that the data is local")
            self.env["FASHION_MNIST_DIR"] = str(raw)
            self.project = Project.create(folder / "project")
            self.project.set_params(**launcher)
            self.project.commit()
        else:
            self.project = small_project(folder, **SMALL | launcher)
        self.way = way
        self.root = self.project.root
        self.kept = folder / "kept"
        self.log = folder / "log"
        self.expected: dict[str, Expected] = {}  # by stage
        started = time.perf_counter()
        self.repro()
        print(f"{way}: dvc repro from nothing, n=1: {time.perf_counter() - started:.1f} s")
        self.project.commit()
        shutil.copytree(self.root, self.kept, symlinks=True)  # which each kill starts from

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
                [python(), "-m", "dvc", "repro"],
                cwd=self.root,
                env=self.env,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )

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
            for process in processes_in(self.root):
                if words(process)[-3:] == ["-m", "stages", stage]:
                    return process, time.perf_counter()
            time.sleep(0.005)
        raise PipelineError(f"dvc repro has not run {stage}:\n{self.log.read_text()}")

    def kill(self, stage: str, target: str, moment: float) -> tuple[bool, str, list[str]]:
        """Kill once and go on; return whether it was in time, what happened, and what differs in the end.

        moment: from 0, the start of the stage, to 1, its end, or that of dvc.
        """
        if stage not in self.expected:
            self.expected[stage] = self.measure(stage)
        expected = self.expected[stage]
        self.set_back(stage)
        second = moment * (expected.stage_seconds if target == "stage" else expected.seconds)
        with self.start() as dvc:
            process, started = self.wait_for(stage, dvc)
            time.sleep(max(0.0, started + second - time.perf_counter()))
            there = processes_in(self.root)
            one = {"stage": process.pid, "dvc": dvc.pid}.get(target)
            if target == "process":  # which torchrun has started
                one = next((child.pid for child in there if "-u" in words(child)), 0)
            victims = [victim for victim in there if one in (None, victim.pid)]
            kill_all(victims)
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
        if (self.root / "dvc.lock").stat().st_size:  # DVC empties it, and then writes it
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

    def different_runs(self, most: int, whole: dict[str, Any] | None = None) -> list[str]:
        """What is wrong with MLflow's runs, of which there may be so many new ones, each like `whole` or the first.

        A training that had ended, and whose outputs dvc was killed before it took, has a finished run already: the
        training after it is another one, with a second.
        """
        before, after = stored_runs(self.kept), stored_runs(self.root)
        ((key, complete),) = before.items()
        lines = [f"run {key} is {after.get(key)}, was {complete}"] if after.get(key) != complete else []
        new = [run for other, run in after.items() if other != key]
        lines += [f"a new run is {run}, not {whole or complete}" for run in new if run != (whole or complete)]
        if not min(most, 1) <= len(new) <= most:
            lines.append(f"{len(new)} new runs")
        return lines


class Experiments(Bench):
    """The same for an experiment that runs outside the work tree."""

    def run(self) -> "subprocess.Popen[bytes]":
        """Start the experiment; a queued one runs in processes that are not below this one."""
        options = ["--temp", *EXPERIMENT] if self.way == "temp" else ["--queue", *EXPERIMENT]
        command = ["exp", "run", *options]
        if self.way == "queue":
            self.project.dvc(*command)
            command = ["queue", "start"]
        with self.log.open("wb") as log:
            return subprocess.Popen(
                [python(), "-m", "dvc", *command], cwd=self.root, env=self.env, stdin=subprocess.DEVNULL, stdout=log,
                stderr=log,
            )  # fmt: skip

    def wait(self, dvc: "subprocess.Popen[bytes]") -> None:
        """Wait until the experiment has ended. Raises PipelineError if it failed."""
        failed = dvc.wait() != 0
        if self.way == "queue":
            states = wait_for_queue(self.project)
            failed |= set(states.values()) != {"Success"}
        if failed:
            raise PipelineError(f"the experiment failed:\n{self.log.read_text()}")

    def set_back(self, stage: str) -> None:
        shutil.rmtree(self.root)
        shutil.copytree(self.kept, self.root, symlinks=True)

    def measure(self, stage: str) -> Expected:
        """Run the experiment without a kill."""
        self.set_back(stage)
        started = time.perf_counter()
        with self.run() as dvc:
            self.wait(dvc)
        seconds = time.perf_counter() - started
        self.end_workers()
        print(f"  {self.way} {seconds:5.1f} s")
        self.project.run(sys.executable, "-m", "classifier", "sync")
        (outputs,) = self.commits()
        (self.whole,) = [run for key, run in stored_runs(self.root).items() if key not in stored_runs(self.kept)]
        return Expected(seconds, seconds, outputs, files(self.root))

    def kill(self, stage: str, target: str, moment: float) -> tuple[bool, str, list[str]]:
        if not self.expected:
            self.expected[stage] = self.measure(stage)
        expected = self.expected[stage]
        self.set_back(stage)
        with self.run() as dvc:
            started = time.perf_counter()
            time.sleep(moment * expected.seconds)
            second = time.perf_counter() - started
            there = processes_in(self.root)
            victims = [process for process in there if self.is_target(process, target, dvc.pid)]
            kill_all(victims)
            dvc.wait()
        what = f"{'killed' if victims else 'over before the kill'} at {second:5.2f} s"
        try:
            if self.way == "temp":
                psutil.wait_procs(processes_in(self.root), timeout=ENDING_SECONDS)
                self.wait(self.run())
            self.project.run(sys.executable, "-m", "classifier", "queue", "resume")
            if self.way == "queue":
                wait_for_queue(self.project)
        except (PipelineError, AssertionError) as error:
            return bool(victims), what, [str(error)]
        self.end_workers()
        differences = self.left_running()
        self.project.run(sys.executable, "-m", "classifier", "sync")
        commits = self.commits()
        if not commits or any(commit != expected.outputs for commit in commits):
            differences.append(f"{len(commits)} experiments, not all with the outputs of an uninterrupted one")
        differences += [f"{path} is left" for path in self.root.glob(".dvc/tmp/exps/**/tmp*") if path.is_dir()]
        differences += self.different_files(Expected(0, 0, digests(self.kept), expected.files))
        return bool(victims), what, differences + self.different_runs(2, self.whole)

    def is_target(self, process: psutil.Process, target: str, dvc: int) -> bool:
        if target == "stage":
            return "stages" in words(process)
        if target == "worker":
            return "queue-worker" in words(process)
        return target == "everything" or process.pid == dvc

    def end_workers(self) -> None:
        """A worker waits ten seconds for another task."""
        if self.way == "queue":
            stop_queue(self.project)

    def commits(self) -> list[dict[str, str]]:
        """Of each experiment that has ended: the hashes of its metrics, and what its dvc.lock says."""
        refs = self.project.run("git", "for-each-ref", "--format=%(refname)", "refs/exps").stdout.split()
        found = []
        for ref in refs:
            if re.match(r"refs/exps/[0-9a-f]{2}/", ref):
                tree = self.project.run("git", "ls-tree", "-r", ref, "metrics").stdout.splitlines()
                lock = yaml.safe_load(self.project.run("git", "show", f"{ref}:dvc.lock").stdout)
                found.append(
                    {line.split("\t")[1]: line.split()[2] for line in tree}
                    | {"dvc.lock": hash_bytes(json.dumps(lock, sort_keys=True).encode())}
                )
        return found


def kill_all(processes: list[psutil.Process]) -> None:
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.kill()


def words(process: psutil.Process) -> list[str]:
    """Those of a process's command; none if it has ended."""
    with suppress(psutil.Error):
        return list(process.cmdline())
    return []


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
