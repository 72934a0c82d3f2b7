"""Two processes under torchrun against one, on the same cores: losses, time, memory; and a killed process.

python -m benchmarks.distributed [--rounds N] [--epochs N]

On all of Fashion-MNIST the train stage whole, by `dvc repro train`: the tutorial's recipe, and the cnn in bfloat16 with
batches of 256. Printed are the largest relative difference of the epochs' training losses, the seconds an epoch of
training takes in alternating rounds, and the peak memory of each process that trains. Then the same once more, in which
one of the two processes is killed after a checkpoint: torchrun starts both again, and the weights are compared.
"""

import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import pandas as pd
import psutil

from benchmarks.measuring import (
    DVC,
    POLL_SECONDS,
    ROOT,
    Report,
    isolated_environment,
    median_ratio,
    parser,
    peak_memory,
    raw_data,
    summary,
)
from classifier.pipeline.errors import PipelineError, run_main
from classifier.pipeline.outputs import hash_file

sys.path.insert(0, str(ROOT / "tests"))
from project import Project

LAUNCHERS = {"one process": "python", "two processes": "torchrun --nproc-per-node=2 --max-restarts=1"}
RECIPES = {
    "mlp, the tutorial's recipe": {},
    "cnn, batches of 256, bfloat16": {
        "network": "cnn", "batch_size": "256", "lr": "0.01", "momentum": "0.9", "augment": "[flip]",
        "precision": "bfloat16",
    },
}  # fmt: skip


class Training(NamedTuple):
    """losses: of training, by epoch; seconds: of each epoch; peaks: bytes of memory of each process that trained."""

    losses: pd.Series
    seconds: list[float]
    peaks: list[int]
    weights: str


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--rounds", type=int, default=3, help="trainings of each kind (default 3)")
    arguments.add_argument("--epochs", type=int, default=2, help="of each training (default 2)")
    given = arguments.parse_args()
    report = Report("Distributed", ("torch",), given.page)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        project = Project.create(folder / "project")
        project.set_params(epochs=str(given.epochs))
        project.commit()
        env = isolated_environment(folder) | {"FASHION_MNIST_DIR": str(raw_data())}
        for recipe, settings in RECIPES.items():
            project.set_params(**settings)
            compare(report, project, env, recipe, given.rounds)
        # The last one again
        report.line("\none of the two processes killed after a checkpoint, cnn:")
        whole = train(project, env)
        killed = train(project, env, kills=True)
        report.line(f"  the weights are {'the same bytes' if whole.weights == killed.weights else 'OTHERS'}")
    report.save()


def compare(report: Report, project: Project, env: dict[str, str], recipe: str, rounds: int) -> None:
    trainings: dict[str, list[Training]] = {kind: [] for kind in LAUNCHERS}
    for _ in range(rounds):
        for kind, launcher in LAUNCHERS.items():
            project.set_params(launcher=launcher)
            trainings[kind].append(train(project, env))
    one, two = (trainings[kind] for kind in LAUNCHERS)
    difference = ((two[0].losses - one[0].losses).abs() / one[0].losses).max()
    report.line(f"\n{recipe}: training losses differ by {difference:.1e} at most, relatively")
    seconds = {kind: [statistics.mean(training.seconds) for training in runs] for kind, runs in trainings.items()}
    for kind, runs in trainings.items():
        peaks = " and ".join(f"{peak / 2**20:,.0f}" for peak in runs[0].peaks)
        report.line(f"  {kind:13} an epoch: {summary(seconds[kind], 's')}; peak memory {peaks} MiB")
    ratio = median_ratio(seconds["two processes"], seconds["one process"])
    report.line(f"  two processes take {ratio:.2f} of the time, median of {rounds} rounds")


def train(project: Project, env: dict[str, str], *, kills: bool = False) -> Training:
    """Run the train stage; kills: the second process, once there is a checkpoint."""
    images: dict[int, int] = {}
    command = [*DVC, "repro", "--force", "--single-item", "train"]
    if not (project.root / "data/annotations").exists():
        subprocess.run([*DVC, "repro", "annotate"], cwd=project.root, env=env, check=True, capture_output=True)
    with subprocess.Popen(
        command, cwd=project.root, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as dvc:
        watcher = threading.Thread(target=watch, args=(psutil.Process(dvc.pid), project, images, kills))
        watcher.start()
        printed, _ = dvc.communicate()
        watcher.join()
    if dvc.returncode != 0:
        raise PipelineError(f"the train stage failed:\n{printed}")
    count = len((project.root / "data/annotations/train.csv").read_text().splitlines()) - 1
    seconds = [count / float(rate.replace(",", "")) for rate in re.findall(r"([\d,]+) images/s", printed)]
    losses = pd.read_csv(project.root / "metrics/epochs.csv")["train_loss"]
    return Training(losses, seconds, sorted(images.values()), hash_file(project.root / "models/model_weights.pth"))


def watch(dvc: psutil.Process, project: Project, peaks: dict[int, int], kills: bool) -> None:
    """Until DVC ends, note the peak memory of each process that trains; kill the second of them if asked."""
    while dvc.is_running() and dvc.status() != psutil.STATUS_ZOMBIE:
        with suppress(psutil.Error, OSError):
            for process in dvc.children(recursive=True):
                command = process.cmdline()
                if [word for word in command[1:] if word != "-u"] == ["-m", "stages", "train"]:
                    peaks[process.pid] = max(peaks.get(process.pid, 0), peak_memory(process))
                    if kills and process.environ()["RANK"] == "1" and list(project.root.glob(".checkpoints/*/*.pt")):
                        process.kill()
                        kills = False
        time.sleep(POLL_SECONDS)


if __name__ == "__main__":
    run_main(main)
