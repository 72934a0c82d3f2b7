"""Fixtures that several test files use."""

import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from imports import ROOT

from classifier.files import hash_file
from classifier.sources.fashion_mnist import FILES, fetch

# Test files run side by side: with a thread for each core in each of them, the threads wait for one another.
os.environ["OMP_NUM_THREADS"] = "1"
# A shell that starts the tests in the background has Ctrl-C ignored by them, and by every process that they start.
signal.signal(signal.SIGINT, signal.default_int_handler)


# Those that take a minute or more, the longest first but for the one that is the longest of the fast tests; those that
# share a `reproduced_project` are apart, so that none waits while another makes it
LONG_FILES = [
    "pipeline", "team", "pages", "resume", "two_at_once", "sync", "disk_full", "reproduce", "distributed", "verify",
    "kill", "own_images", "remotes", "ui",
    "lineage", "golden", "export", "experiments", "tampering", "seeds", "tracking", "secrets", "prediction", "serving",
    "docs", "dvc_views", "fashion_mnist", "networks", "exchange",
]  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Start with the long files, so that the others run beside them and not before them."""
    order = {f"test_{name}.py": place for place, name in enumerate(LONG_FILES)}
    items.sort(key=lambda item: order.get(item.path.name, len(order)))


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Files of slow tests alone are not read where those are not wanted: what they import takes seconds."""
    if config.option.markexpr != "not slow" or collection_path.suffix != ".py":
        return None
    return "\npytestmark = pytest.mark.slow\n" in collection_path.read_text(encoding="utf-8") or None


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
