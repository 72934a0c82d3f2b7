"""What the benchmarks share: the machine, contenders that take turns, medians and fits, and the page of results."""

import argparse
import multiprocessing
import os
import platform
import re
import statistics
import sys
import weakref
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from classifier.pipeline.errors import PipelineError

ROOT = Path(__file__).parent.parent
RESULTS = Path(__file__).with_name("results.md")
DVC = [sys.executable, "-m", "dvc"]
POLL_SECONDS = 0.05  # between two looks at the memory of processes

RESULTS_HEAD = """\
# Results of the benchmarks

`make bench` writes this page; each program below writes its own section, with what it printed. Figures are of the
machine that a section names.
"""


def parser(doc: str | None) -> argparse.ArgumentParser:
    """A parser of the command line that shows a module's docstring as it is, and takes the page of results."""
    arguments = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--page", type=Path, default=RESULTS, help="of results (default benchmarks/results.md)")
    return arguments


class Report:
    """Lines that are printed at once, and become the benchmark's section of the page of results when it has ended."""

    def __init__(self, title: str, packages: Sequence[str], page: Path) -> None:
        self.title = title
        self.page = page
        self.lines: list[str] = []
        self.line(machine(packages))

    def line(self, text: str = "") -> None:
        print(text, flush=True)
        self.lines.append(text)

    def save(self) -> None:
        module = Path(sys.argv[0]).stem
        command = " ".join(["python -m", f"benchmarks.{module}", *sys.argv[1:]])
        write_section(self.page, self.title, [f"`{command}`", "", "```text", *self.lines, "```"])


def write_section(path: Path, title: str, lines: Sequence[str]) -> None:
    """Put lines below the heading `## title` of a page, in the place of what was there; a new section goes to the end.

    A missing page is begun.
    """
    page = path.read_text(encoding="utf-8") if path.exists() else RESULTS_HEAD
    head, *sections = re.split(r"^(?=## )", page, flags=re.MULTILINE)
    content = "\n".join([f"## {title}", "", *lines]) + "\n"
    titles = [section.split("\n", 1)[0] for section in sections]
    if f"## {title}" in titles:
        sections[titles.index(f"## {title}")] = content
    else:
        sections.append(content)
    path.parent.mkdir(exist_ok=True)
    path.write_text("\n".join(part.rstrip("\n") + "\n" for part in [head, *sections]), encoding="utf-8")


def machine(packages: Sequence[str]) -> str:
    """Processor, threads, system and versions, in one line."""
    import torch

    from classifier.compute.device import environment, set_threads

    set_threads("auto")
    here = environment(torch.device("cpu"))
    versions = ", ".join(f"{package} {version(package)}" for package in packages)
    return f"{here['cpu']}, {here['threads']} threads, {here['system']}, Python {platform.python_version()}, {versions}"


def summary(values: Sequence[float], unit: str, digits: int = 2) -> str:
    """Median and range, such as `median 1.51 s (1.31 to 1.72), n=9`."""
    low, middle, high = (f"{value:.{digits}f}" for value in (min(values), statistics.median(values), max(values)))
    return f"median {middle} {unit} ({low} to {high}), n={len(values)}".replace("  ", " ")


def median_ratio(values: Sequence[float], others: Sequence[float]) -> float:
    """The median of the ratios of values that were measured in the same rounds."""
    return statistics.median(one / other for one, other in zip(values, others, strict=True))


def exponent(sizes: Sequence[float], values: Sequence[float]) -> float:
    """The k of the least-squares fit value = c * size^k, a straight line in logarithms; two sizes at least."""
    slope, _ = np.polyfit(np.log(sizes), np.log(values), 1)
    return float(slope)


def raw_data() -> Path:
    """The folder of Fashion-MNIST's unpacked files: FASHION_MNIST_DIR, or data/raw of this checkout."""
    raw = Path(os.environ.get("FASHION_MNIST_DIR", ROOT / "data/raw"))
    if not (raw / "train-images-idx3-ubyte").is_file():
        raise PipelineError(f"{raw}: no Fashion-MNIST; run `make repro` first, so that the data is local")
    return raw


def isolated_environment(folder: Path) -> dict[str, str]:
    """No setting of this shell or of the user's DVC reaches the measured commands, and no cache is shared."""
    env = {key: value for key, value in os.environ.items() if not key.startswith(("DVC_", "MLFLOW_"))}
    env.pop("PYTHONDONTWRITEBYTECODE", None)
    env["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{env['PATH']}"
    for kind in ("DVC_GLOBAL_CONFIG_DIR", "DVC_SYSTEM_CONFIG_DIR", "DVC_SITE_CACHE_DIR"):
        env[kind] = str(folder / kind)
    return env


def peak_memory(process: psutil.Process) -> int:
    """The most bytes that a process has had resident until now: on Linux ever, elsewhere at this moment."""
    status = Path(f"/proc/{process.pid}/status")
    if status.exists() and (found := re.search(r"VmHWM:\s*(\d+) kB", status.read_text())):
        return int(found[1]) * 1024
    return int(process.memory_info().rss)


def largest_child(process: psutil.Process) -> int:
    """The largest `peak_memory` among the processes below one, in bytes; 0 if there is none."""
    sizes = [0]
    try:
        for child in process.children(recursive=True):
            try:
                sizes.append(peak_memory(child))
            except (psutil.Error, OSError):  # it has just ended
                continue
    except psutil.NoSuchProcess:
        pass
    return max(sizes)


class Contender:
    """A process of its own, so that no thread pools mix, which stays alive between its turns.

    prepare: a function of a module, called in the process with the arguments; it returns what is called at each turn.
    """

    def __init__(self, prepare: Callable[..., Callable[..., Any]], *arguments: Any) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_take_turns, args=(theirs, prepare, arguments))
        self.process.start()
        weakref.finalize(self, self.process.terminate)  # also where this one is interrupted in the middle of a turn
        theirs.close()

    def turn(self, *arguments: Any) -> Any:
        """What the process answers to a call. Raises PipelineError if it has failed."""
        try:
            self.pipe.send(arguments)
            return self.pipe.recv()
        except (EOFError, BrokenPipeError):
            raise PipelineError("a contender failed; its messages are above") from None

    def close(self) -> None:
        self.pipe.close()
        self.process.join()


def _take_turns(pipe: Any, prepare: Callable[..., Callable[..., Any]], arguments: Sequence[Any]) -> None:
    turn = prepare(*arguments)
    while True:
        try:
            asked = pipe.recv()
        except EOFError:
            return
        pipe.send(turn(*asked))


def in_turns(contenders: Mapping[str, Contender], rounds: int) -> dict[str, list[Any]]:
    """What each contender answers in each round, in which they take turns; before it, one that does not count."""
    answers: dict[str, list[Any]] = {name: [] for name in contenders}
    for number in range(rounds + 1):
        for name, contender in contenders.items():
            answer = contender.turn()
            if number:
                answers[name].append(answer)
    return answers
