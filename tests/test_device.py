"""The device policy, seeds, threads and the record of the environment.

What torch says of accelerators is replaced here, and only here: there is none to test with.
"""

import os
import platform
import random
import subprocess
import sys
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch.utils import deterministic

from classifier.compute import device
from classifier.compute.device import (
    Precision,
    choose_kernels,
    environment,
    naming_batch_size,
    seed_everything,
    select_device,
    set_threads,
    usable_devices,
)
from classifier.pipeline.errors import PipelineError


@pytest.fixture
def restore_torch(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Put threads and determinism back to what they were."""
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    threads, deterministic = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    benchmark, tf32 = torch.backends.cudnn.benchmark, torch.backends.cudnn.allow_tf32
    yield
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(deterministic)
    torch.backends.cudnn.benchmark, torch.backends.cudnn.allow_tf32 = benchmark, tf32
    torch.set_float32_matmul_precision("highest")
    os.environ.pop("CUBLAS_WORKSPACE_CONFIG", None)


def pretend(monkeypatch: pytest.MonkeyPatch, cuda_devices: int, mps: bool) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda_devices > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: cuda_devices)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    monkeypatch.setattr(device, "_holds_a_tensor", lambda name: True)


@pytest.mark.parametrize(
    ("cuda_devices", "mps", "chosen", "usable"),
    [
        (0, False, "cpu", ["cpu"]),
        (0, True, "mps", ["mps", "cpu"]),
        (1, False, "cuda", ["cuda", "cuda:0", "cpu"]),
        (2, True, "cuda", ["cuda", "cuda:0", "cuda:1", "mps", "cpu"]),
    ],
)
def test_auto_is_cuda_then_mps_then_cpu(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    cuda_devices: int,
    mps: bool,
    chosen: str,
    usable: list[str],
) -> None:
    pretend(monkeypatch, cuda_devices, mps)
    assert usable_devices() == usable
    assert select_device("auto") == torch.device(chosen)
    assert capsys.readouterr().out == f"Using {chosen} device\n"
    assert [str(select_device(name)) for name in usable] == usable


@pytest.mark.skipif(torch.backends.mps.is_available(), reason="has a real one")
def test_an_mps_device_without_memory_is_not_usable(monkeypatch: pytest.MonkeyPatch) -> None:
    # Virtual machines say so; where there is none at all, a tensor is refused just the same.
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert usable_devices()[-1] == "cpu"
    assert "mps" not in usable_devices()


@pytest.mark.parametrize(
    ("cuda_devices", "name", "usable"),
    [
        (0, "cuda", "cpu"),
        (0, "cuda:0", "cpu"),
        (0, "mps", "cpu"),
        (0, "toaster", "cpu"),
        (2, "cuda:2", "cuda, cuda:0, cuda:1, cpu"),
        (2, "cuda:01", "cuda, cuda:0, cuda:1, cpu"),
    ],
)
def test_a_device_that_is_not_usable_is_an_error(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], cuda_devices: int, name: str, usable: str
) -> None:
    pretend(monkeypatch, cuda_devices, mps=False)
    with pytest.raises(PipelineError, match=rf"^device: {name} is not usable here; usable: {usable}$"):
        select_device(name)
    assert capsys.readouterr().out == ""


def test_this_machines_cpu(capsys: pytest.CaptureFixture[str]) -> None:
    assert select_device("cpu") == torch.device("cpu")
    assert capsys.readouterr().out == "Using cpu device\n"


@pytest.mark.usefixtures("restore_torch")
def test_seeding_makes_draws_equal() -> None:
    def draws() -> tuple[float, float, float]:
        return random.random(), float(np.random.rand()), torch.rand(1).item()  # noqa: NPY002, S311, what is seeded

    seed_everything(7)
    first = draws()
    second = draws()
    seed_everything(7)
    assert draws() == first
    assert first != second
    seed_everything(8)
    assert draws() != first


@pytest.mark.usefixtures("restore_torch")
def test_kernels_are_deterministic_or_the_quickest() -> None:
    choose_kernels(deterministic=True, precision="float32")
    assert torch.are_deterministic_algorithms_enabled()
    assert not deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    assert not torch.backends.cudnn.benchmark
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    choose_kernels(deterministic=False, precision="float32")
    assert not torch.are_deterministic_algorithms_enabled()
    assert torch.backends.cudnn.benchmark


@pytest.mark.usefixtures("restore_torch")
@pytest.mark.parametrize("precision", ["float32", "tf32", "bfloat16", "float16"])
def test_tf32_is_used_only_where_it_is_asked_for(precision: Precision) -> None:
    choose_kernels(deterministic=True, precision=precision)
    asked = precision == "tf32"
    assert (torch.get_float32_matmul_precision() == "high") == asked
    assert torch.backends.cudnn.allow_tf32 == asked


@pytest.mark.parametrize(
    ("batch_size", "accumulate_steps", "advice"),
    [
        (256, None, "batch_size: 256; try batch_size: 128$"),
        (256, 2, "batch_size: 256; try batch_size: 128 and accumulate_steps: 4, for the same updates$"),
        (1, 1, "batch_size: 1; set a smaller image_size, or device: cpu$"),
    ],
)
@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory."), RuntimeError("MPS backend out of memory (MPS allocated)")]
)
def test_too_little_memory_names_the_batch_size_to_try(
    error: RuntimeError, batch_size: int, accumulate_steps: int | None, advice: str
) -> None:
    expected = pytest.raises(PipelineError, match=f"^device: cuda does not have enough memory for {advice}")
    with expected, naming_batch_size(torch.device("cuda"), batch_size, accumulate_steps):
        raise error


def test_other_errors_are_not_taken_for_too_little_memory() -> None:
    with pytest.raises(RuntimeError, match=r"^size mismatch$"), naming_batch_size(torch.device("cpu"), 2):
        raise RuntimeError("size mismatch")


@pytest.mark.usefixtures("restore_torch")
def test_threads() -> None:
    assert set_threads(1) == 1
    assert torch.get_num_threads() == 1
    threads = set_threads("auto")
    assert 1 <= threads <= (os.cpu_count() or 1)
    assert torch.get_num_threads() == threads


def test_auto_is_the_number_in_classifier_threads_where_that_is_set(
    monkeypatch: pytest.MonkeyPatch, restore_torch: None
) -> None:
    monkeypatch.setenv("CLASSIFIER_THREADS", "3")
    assert set_threads("auto") == torch.get_num_threads() == 3
    assert set_threads(2) == 2
    monkeypatch.setenv("CLASSIFIER_THREADS", "many")
    with pytest.raises(PipelineError, match="CLASSIFIER_THREADS: 'many' is not a whole number from 1 to 1024"):
        set_threads("auto")


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="a process's cores can be chosen on Linux only")
@pytest.mark.usefixtures("restore_torch")
def test_auto_threads_are_the_cores_of_this_process() -> None:
    cores = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(cores)})
        assert set_threads("auto") == 1
    finally:
        os.sched_setaffinity(0, cores)


@pytest.mark.slow
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries have no mallopt")
def test_freed_memory_is_kept() -> None:
    """The next tensor takes the pages of the one before: in a process of its own, for malloc stays as it is set."""
    script = (
        "import resource, torch; from classifier.compute.device import keep_freed_memory\n"
        "def faults():\n"
        "    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n"
        "    for _ in range(10): torch.ones(50_000_000, dtype=torch.uint8)\n"
        "    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before\n"
        "given_back = faults(); keep_freed_memory(); faults(); print(given_back, faults())"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    given_back, kept = map(int, done.stdout.split())
    assert given_back > 100
    assert kept < given_back / 10


@pytest.mark.usefixtures("restore_torch")
def test_environment_is_complete_and_plain() -> None:
    set_threads(1)
    recorded = environment(torch.device("cpu"))
    assert set(recorded) == {
        "device",
        "cpu",
        "cpu_capability",
        "threads",
        "system",
        "python",
        "torch",
        "torchvision",
        "numpy",
        "blas",
    }
    assert all(isinstance(value, str | int) and value != "" for value in recorded.values())
    assert recorded["device"] == "cpu"
    assert recorded["threads"] == 1
    assert recorded["torch"] == torch.__version__
    assert recorded == environment(torch.device("cpu"))


@pytest.mark.usefixtures("restore_torch")
def test_processes_of_one_machine_share_its_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    alone = environment(torch.device("cpu"))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert [set_threads(threads) for threads in (6, 3, 1)] == [3, 1, 1]
    assert environment(torch.device("cpu")) == alone | {"threads": 2, "processes": 4}
