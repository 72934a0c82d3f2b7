"""One recipe, many seeds: how much of a result is the recipe, and how much is luck.

The seed draws the first weights, the order of the images and their augmentation, and split_seed which images are held
out. Each run is an experiment of DVC's queue, so it is kept, tracked and can be compared like any other.
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

# A line of `dvc queue status`: task, name, time of creation, state
TASK = re.compile(r"^[0-9a-f]{7}\s+(\S+)\s.*\s(Queued|Running|Success|Failed)\s*$", re.MULTILINE)
# key=value with a value that DVC does not take for several, as it does 1,2 or choice(1,2)
ONE_VALUE = re.compile(r"[\w.]+=(\[.*\]|[^,()]*)")
NO_WORKER = "Worker status: 0 active"
POLL_SECONDS = 10  # asking costs DVC more than a second of a core
TOLERATED = 2  # answers in a row that nobody works, or that DVC cannot tell
RESTARTS = 3  # of workers that were killed, as for want of memory


def run_seeds(count: int, settings: list[str], workers: int, folder: Path) -> pd.DataFrame:
    """Run `count` seeds, from the one in params.yaml on, and return mean, standard deviation, min and max per metric.

    settings: further parameters as `key=value`. workers: experiments that run at the same time. Writes seeds.csv, a
    row a seed, and seeds.png to `folder`. Raises PipelineError, with the way to the logs, if an experiment fails;
    the others are kept, and written all the same.
    """
    first = load_params().seed
    seeds = range(first, first + count)
    recover()  # what an earlier call that was killed had begun
    names = _queue(list(seeds), settings)
    _start(workers)
    failed = _wait(names, workers)
    commits = {experiment.name: experiment.commit for experiment in experiments()}
    rows = [
        {"seed": seed, "experiment": name}
        | {key: value for key, value in metrics_at(commits[name]).items() if isinstance(value, int | float)}
        for seed, name in zip(seeds, names, strict=True)
        if name not in failed
    ]
    if rows:
        with atomic(folder / "seeds.csv") as path:
            pd.DataFrame(rows).to_csv(path, index=False, lineterminator="\n")
    if failed:
        raise PipelineError(
            f"{len(failed)} of {count} experiments failed: {', '.join(failed)}; `dvc queue logs {failed[0]}` says why"
        )
    table = pd.DataFrame(rows).drop(columns=["seed", "experiment"])
    with atomic(folder / "seeds.png") as path:
        save_spread(path, {str(metric): table[metric].to_list() for metric in table})
    return table.agg(["mean", "std", "min", "max"]).T  # the sample's standard deviation, with n - 1


def _queue(seeds: list[int], settings: list[str]) -> list[str]:
    """Queue an experiment for each seed; the names that DVC gave them, in order."""
    command = ["exp", "run", "--queue", "--set-param", f"seed={','.join(map(str, seeds))}"]
    for setting in settings:
        if not ONE_VALUE.fullmatch(setting):
            raise PipelineError(f"{setting}: not one key=value; seeds are run of one recipe at a time")
        if setting.startswith("seed="):
            raise PipelineError(f"{setting}: the first seed is that of {PARAMS}; set it there")
        command += ["--set-param", setting]
    names = re.findall(r"Queued experiment '([^']+)'", dvc(*command))
    if len(names) != len(seeds):
        raise PipelineError(
            f"DVC queued {len(names)} experiments for {len(seeds)} seeds; `dvc queue status` lists them"
        )
    return names


def _start(workers: int) -> None:
    dvc("queue", "start", "--jobs", str(workers))


def _wait(names: list[str], workers: int) -> list[str]:
    """Wait until none of the experiments is queued or running; return the names of those that failed.

    Workers that were killed are started again, and continue what they had begun. Raises PipelineError if nobody works
    at the experiments any more for another reason.
    """
    consecutive_failures = 0  # times in a row that something is, which may be as DVC's workers write what it reads
    restarts = 0
    with progress("seeds", "seed", len(names)) as bar:
        while True:
            fault = PipelineError(
                "the queue was stopped or emptied; `dvc queue status` lists what is left, "
                "`classifier queue resume` continues it"
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
