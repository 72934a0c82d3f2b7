"""Write how long each test took, and each process that it started: `pytest --record=FILE`, as `make test` does.

The file is JSON: `tests` by their names, and `processes` by the test that was running when they started. A process
that was killed has no seconds. `python tests/durations.py FILE...` prints the sums by test file.
"""

import json
import os
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest

RECORD = "PROCESS_RECORD"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--record", metavar="FILE", help="write durations of tests and processes to this file")


class Recorder:
    """What the process that distributes the tests hears of them."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.started = time.monotonic()
        self.tests: dict[str, dict[str, Any]] = {}
        handle, self.processes = tempfile.mkstemp(prefix="processes-")
        os.close(handle)
        os.environ[RECORD] = self.processes
        folders = [str(Path(__file__).parent / "start"), *filter(None, [os.environ.get("PYTHONPATH")])]
        os.environ["PYTHONPATH"] = os.pathsep.join(folders)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        test = self.tests.setdefault(report.nodeid, {"seconds": 0, "outcome": "passed"})
        test["seconds"] += report.duration
        test |= dict(report.user_properties)
        if report.outcome != "passed":
            test["outcome"] = report.outcome

    def pytest_sessionfinish(self) -> None:
        lines = Path(self.processes).read_text(encoding="utf-8").splitlines()
        Path(self.processes).unlink()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        record = {
            "seconds": time.monotonic() - self.started,
            "tests": self.tests,
            "processes": paired([json.loads(line) for line in lines]),
        }
        self.path.write_text(json.dumps(record, indent=1), encoding="utf-8")


def paired(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One entry for a process, of the lines that it wrote when it started and when it ended."""
    processes: list[dict[str, Any]] = []
    running: dict[int, dict[str, Any]] = {}
    for line in lines:
        pid = line.pop("pid")
        if "command" in line:
            processes.append(line)
            running[pid] = line
        elif pid in running:
            running.pop(pid).update(line)
    return processes


def pytest_configure(config: pytest.Config) -> None:
    if config.option.record and "PYTEST_XDIST_WORKER" not in os.environ:
        config.pluginmanager.register(Recorder(config.rootpath / config.option.record))


STARTED = pytest.StashKey[float]()


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    item.stash[STARTED] = time.process_time()


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> None:
    """Put the processor seconds of pytest's own process into the report of the test's last part."""
    if call.when == "teardown" and STARTED in item.stash:
        item.user_properties.append(("processor_seconds", time.process_time() - item.stash[STARTED]))


def sums_by_file(record: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Of each test file: cases, seconds, processes that were started, and processor seconds of them and of pytest."""
    sums: dict[str, dict[str, float]] = defaultdict(lambda: dict.fromkeys(COLUMNS, 0))
    for name, test in record["tests"].items():
        row = sums[name.partition("::")[0]]
        row["cases"] += 1
        row["seconds"] += test["seconds"]
        row["processor seconds"] += test.get("processor_seconds", 0)
    for process in record["processes"]:
        row = sums[process["test"].partition("::")[0]]
        row["processes"] += 1
        row["processor seconds"] += process.get("processor_seconds", 0)
    return sums


COLUMNS = ("cases", "processes", "seconds", "processor seconds")


def main(paths: list[str]) -> None:
    total: dict[str, dict[str, float]] = defaultdict(lambda: dict.fromkeys(COLUMNS, 0))
    for path in paths:
        for file, row in sums_by_file(json.loads(Path(path).read_text(encoding="utf-8"))).items():
            total[file] = {column: total[file][column] + row[column] for column in COLUMNS}
    rows = sorted(total.items(), key=lambda item: -item[1]["seconds"])
    rows.append(("all", {column: sum(row[column] for _, row in rows) for column in COLUMNS}))
    print(f"| file | {' | '.join(COLUMNS)} |\n|---|{'---:|' * len(COLUMNS)}")
    for file, row in rows:
        print(f"| {Path(file).stem} | {' | '.join(f'{row[column]:.0f}' for column in COLUMNS)} |")


if __name__ == "__main__":
    main(sys.argv[1:])
