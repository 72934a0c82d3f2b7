"""The same parameters with several seeds or folds, to measure how much results vary.

`seed` determines the initial weights, the order of the images and their augmentation; `split_seed`, which stays the
same, determines the validation images. `fold` determines which part of the training images validates; the test images
stay the same, and are not evaluated. Each run is an experiment in DVC's queue and tracked like any other.
"""

import re
import time
from pathlib import Path

import pandas as pd

from classifier.cli.charts import save_spread
from classifier.cli.experiment_queue import dvc, recover
from classifier.pipeline.errors import PipelineError
from classifier.pipeline.outputs import atomic
from classifier.pipeline.params import load_params
from classifier.pipeline.paths import PARAMS
from classifier.progress import progress
from classifier.tracking.git import experiments, metrics_at

# A line of `dvc queue status`: task, name, creation time, state
TASK = re.compile(r"^[0-9a-f]{7}\s+(\S+)\s.*\s(Queued|Running|Success|Failed)\s*$", re.MULTILINE)
# key=value with a single value; DVC reads 1,2 and choice(1,2) as several
ONE_VALUE = re.compile(r"[\w.]+=(\[.*\]|[^,()]*)")
NO_WORKER = "Worker status: 0 active"
POLL_SECONDS = 10  # `dvc queue status` takes more than a second of a core
TOLERATED = 2  # consecutive polls that fail or show no active worker
REPEATED = {"seed": f"set the first seed in {PARAMS}", "fold": "each fold is run"}
RESTARTS = 3  # of killed workers, for example when memory runs out


def run_seeds(count: int, settings: list[str], workers: int, folder: Path) -> pd.DataFrame:
    """Run `count` seeds, starting with the one in params.yaml; return mean, std, min and max of each metric.

    settings: other parameters as `key=value`. workers: number of concurrent experiments. Writes seeds.csv, one row per
    seed, and seeds.png to `folder`. The standard deviation divides by n - 1. Raises PipelineError if an experiment
    fails, after writing the rows of the others to seeds.csv.
    """
    first = load_params().seed
    return _run("seed", range(first, first + count), settings, workers, folder)


def run_folds(count: int, settings: list[str], workers: int, folder: Path) -> pd.DataFrame:
    """Run `count` folds of a cross-validation up to `train`; as `run_seeds`, with folds.csv and folds.png.

    The metrics are those of training and validation.
    """
    if given := [setting for setting in settings if setting.startswith("folds=")]:
        raise PipelineError(f"{given[0]}: give the number of folds with --count")
    return _run("fold", range(count), [*settings, f"folds={count}"], workers, folder, target="train")


def _run(
    parameter: str, values: range, settings: list[str], workers: int, folder: Path, target: str = ""
) -> pd.DataFrame:
    recover()  # experiments of an earlier call that was killed
    names = _queue(parameter, list(values), settings, target)
    _start(workers)
    failed = _wait(names, workers, parameter)
    commits = {experiment.name: experiment.commit for experiment in experiments()}
    rows = [
        {parameter: value, "experiment": name}
        | {
            key: number
            for key, number in metrics_at(commits[name]).items()
            if isinstance(number, int | float) and not (target and key.startswith("test "))
        }
        for value, name in zip(values, names, strict=True)
        if name not in failed
    ]
    if rows:
        with atomic(folder / f"{parameter}s.csv") as path:
            pd.DataFrame(rows).to_csv(path, index=False, lineterminator="\n")
    if failed:
        raise PipelineError(
            f"{len(failed)} of {len(values)} experiments failed: {', '.join(failed)}; "
            f"`dvc queue logs {failed[0]}` shows why"
        )
    table = pd.DataFrame(rows).drop(columns=[parameter, "experiment"])
    with atomic(folder / f"{parameter}s.png") as path:
        save_spread(path, {str(metric): table[metric].to_list() for metric in table})
    return table.agg(["mean", "std", "min", "max"]).T


def _queue(parameter: str, values: list[int], settings: list[str], target: str) -> list[str]:
    """Queue an experiment for each value and return their names in order."""
    command = ["exp", "run", "--queue", "--set-param", f"{parameter}={','.join(map(str, values))}"]
    for setting in settings:
        if not ONE_VALUE.fullmatch(setting):
            raise PipelineError(f"{setting}: expected key=value with a single value")
        if setting.startswith(f"{parameter}="):
            raise PipelineError(f"{setting}: {REPEATED[parameter]}")
        command += ["--set-param", setting]
    names = re.findall(r"Queued experiment '([^']+)'", dvc(*command, *([target] if target else [])))
    if len(names) != len(values):
        raise PipelineError(
            f"DVC queued {len(names)} experiments for {len(values)} {parameter}s; `dvc queue status` lists them"
        )
    return names


def _start(workers: int) -> None:
    dvc("queue", "start", "--jobs", str(workers))


def _wait(names: list[str], workers: int, what: str) -> list[str]:
    """Wait until all experiments have finished; return the names of those that failed.

    Killed workers are started again and continue their experiments. Raises PipelineError if the queue stops for another
    reason.
    """
    consecutive_failures = 0  # a single failed poll can be a race with DVC's workers
    restarts = 0
    with progress(f"{what}s", what, len(names)) as bar:
        while True:
            fault = PipelineError(
                "the queue was stopped or emptied; `dvc queue status` lists the remaining experiments, "
                "`classifier queue resume` continues them"
            )
            try:
                status = dvc("queue", "status")
            except PipelineError as error:
                status, fault = "", error
            states = dict(TASK.findall(status))
            ended = [name for name in names if states.get(name) in ("Success", "Failed")]
            bar.update(max(len(ended) - bar.n, 0))
            if len(ended) == len(names):
                return [name for name in names if states[name] == "Failed"]
            consecutive_failures = (
                consecutive_failures + 1 if NO_WORKER in status or not set(names) <= states.keys() else 0
            )
            if consecutive_failures > TOLERATED:
                if restarts == RESTARTS or not recover().names:
                    raise fault
                _start(workers)
                restarts, consecutive_failures = restarts + 1, 0
            time.sleep(POLL_SECONDS)
