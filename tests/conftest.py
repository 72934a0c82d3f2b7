"""Fixtures that several test files use."""

import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import fork_server
import pytest
from imports import ROOT

from classifier.pipeline.outputs import hash_file
from classifier.sources.fashion_mnist import FILES, fetch

pytest_plugins = ["durations"]

# Test files run side by side: with a thread for each core in each of them, the threads wait for one another.
os.environ["OMP_NUM_THREADS"] = "1"
# A shell that starts the tests in the background has Ctrl-C ignored by them, and by every process that they start.
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Files of slow tests alone are not read where those are not wanted: what they import takes seconds."""
    if "not slow" not in config.option.markexpr or collection_path.suffix != ".py":
        return None
    return "\npytestmark = pytest.mark.slow\n" in collection_path.read_text(encoding="utf-8") or None


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--real-processes", action="store_true", help="start Python anew for each process: no copies")


def pytest_configure(config: pytest.Config) -> None:
    """Start the process that is copied in place of a new Python, one for all that run tests, and these copies too."""
    # On macOS, what its libraries have started does not survive a fork
    copies = sys.platform == "linux" and not (config.option.real_processes or config.option.collectonly)
    if copies and "PYTEST_XDIST_WORKER" not in os.environ:
        server, shim = fork_server.start()
        os.environ |= {"FORKING_PYTHON": str(shim), "REAL_PYTHON": sys.executable}
        config.option.tx = [f"popen//python={shim}" for _ in config.option.tx or []]
        config.add_cleanup(lambda: fork_server.stop(server, shim))
    sys.executable = os.environ.get("REAL_PYTHON", sys.executable)


@pytest.fixture(scope="session")
def fashion_mnist_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the four unpacked files of Fashion-MNIST: the checkout's own if they are right, else fetched.

    Tests only read it.
    """
    raw = ROOT / "data/raw"
    if all((raw / name).is_file() and hash_file(raw / name) == md5 for name, md5 in FILES.items()):
        return raw
    raw = tmp_path_factory.mktemp("fashion_mnist") / "raw"
    fetch(raw, raw)
    return raw


@pytest.fixture(scope="module", autouse=True)
def other_kernels_again() -> Iterator[None]:
    """What a file's tests set in torch, that only deterministic kernels may run, ends with them."""
    yield
    if torch := sys.modules.get("torch"):
        torch.use_deterministic_algorithms(False)
        torch.utils.deterministic.fill_uninitialized_memory = True


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Threads that wait for each other on a busy machine make small networks ten times slower."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
