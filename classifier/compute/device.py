"""Choose device, kernels, threads and seeds of torch, and record them."""

import ctypes
import os
import platform
import random
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib.metadata import version
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import deterministic as fill

from classifier.compute.cores import usable_cores
from classifier.pipeline.errors import PipelineError

Precision = Literal["float32", "tf32", "bfloat16", "float16"]

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h of glibc


def select_device(name: str) -> torch.device:
    """Return the device for the parameter `device`, and print `Using cpu device`.

    auto is cuda, then mps, then cpu. Raises PipelineError that lists the usable devices if this one is not usable.
    """
    usable = usable_devices()
    if name == "auto":
        name = usable[0]
    if name == "cuda" and _processes_here() > 1:
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    if name not in usable:
        raise PipelineError(f"device: {name} is not usable here; usable: {', '.join(usable)}")
    device = torch.device(name)
    print(f"Using {device} device", flush=True)
    return device


def usable_devices() -> list[str]:
    """Return the names of the usable devices, the preferred one first and cpu last."""
    cuda = [f"cuda:{index}" for index in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    mps = ["mps"] if torch.backends.mps.is_available() and _holds_a_tensor("mps") else []
    return (["cuda", *cuda] if cuda else []) + mps + ["cpu"]


def _holds_a_tensor(name: str) -> bool:
    """Whether the device has memory: virtual machines report an mps device without any."""
    try:
        torch.zeros(1, device=name)
    except RuntimeError:
        return False
    return True


def set_threads(threads: int | Literal["auto"]) -> int:
    """Set the number of CPU threads of this process, and return it.

    threads: of the machine, which the processes that torchrun starts share. auto is the environment variable
    CLASSIFIER_THREADS if it is set, as in a rebuild with the recorded number, otherwise one for each usable core.
    The number decides the last bits of sums, so results are reproducible only for the same number.
    """
    if threads == "auto" and (recorded := os.environ.get("CLASSIFIER_THREADS")):
        if not recorded.isdecimal() or not 1 <= int(recorded) <= 1024:
            raise PipelineError(f"CLASSIFIER_THREADS: {recorded!r} is not a whole number from 1 to 1024")
        threads = int(recorded)
    if threads == "auto":
        threads = usable_cores()
    own = max(int(threads) // _processes_here(), 1)
    torch.set_num_threads(own)
    return own


def _processes_here() -> int:
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def keep_freed_memory() -> None:
    """Make glibc keep freed memory for the next tensors; do nothing with other C libraries.

    By default glibc returns large blocks to the system and gets them back as new pages, filled with zeros: thousands of
    page faults in each step of a convolutional network. With these thresholds (`man 3 mallopt`), blocks below 1 GiB
    come from the heap, which keeps up to 2 GiB of free memory. `python -m benchmarks.step` measures the effect.
    """
    with suppress(AttributeError, TypeError):  # another C library; Windows
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(M_MMAP_THRESHOLD, 2**30)
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def seed_everything(seed: int) -> None:
    """Seed the generators of Python, NumPy and torch, on all devices."""
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002, libraries use the global generator
    torch.manual_seed(seed)


def choose_kernels(*, deterministic: bool, precision: Precision) -> None:
    """Choose which kernels torch uses.

    deterministic: use only kernels that return the same bits every time; an operation without one raises RuntimeError.
    If false, cuDNN times its convolutions at the first call and keeps the fastest.
    precision: with `tf32`, matrix products and convolutions on CUDA devices use TF32, a float32 with 10 bits of
    mantissa instead of 23. With any other value they do not; torch's default uses it in convolutions.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS needs it to be deterministic
    # Same as torch.use_deterministic_algorithms, which imports for two seconds
    torch.set_deterministic_debug_mode("error" if deterministic else "default")
    # By default, deterministic mode fills new tensors with NaN; benchmarks/step.py measures the cost
    fill.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.backends.cudnn.benchmark = not deterministic
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    torch.backends.cudnn.allow_tf32 = precision == "tf32"


def place(network: nn.Module, device: torch.device) -> nn.Module:
    """Move a network to a device; on CUDA, weights get the channels-last layout, for which convolutions are faster."""
    network = network.to(device)
    return network.to(memory_format=torch.channels_last) if device.type == "cuda" else network


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy a tensor from the CPU to a device. On CUDA, do not wait for the copy.

    A copy from pageable memory would wait for all queued work of the device; one from page-locked memory is queued.
    """
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def has_room(device: torch.device, size: int) -> bool:
    """Whether `size` bytes of images fit on a device; on CUDA, half of the free memory is left for training."""
    return device.type != "cuda" or size <= torch.cuda.mem_get_info(device)[0] // 2


@contextmanager
def naming_batch_size(device: torch.device, batch_size: int, accumulate_steps: int | None = None) -> Iterator[None]:
    """Raise PipelineError with a smaller batch size if the device runs out of memory in the block.

    accumulate_steps: of a training, which makes the same updates from smaller batches by accumulating gradients.
    """
    try:
        yield
    except RuntimeError as error:
        if not (isinstance(error, torch.OutOfMemoryError) or "backend out of memory" in str(error)):
            raise
        smaller = batch_size // 2
        if smaller == 0:
            advice = "set a smaller image_size, or device: cpu"
        elif accumulate_steps is None:
            advice = f"try batch_size: {smaller}"
        else:
            advice = f"try batch_size: {smaller} and accumulate_steps: {2 * accumulate_steps}, for the same updates"
        raise PipelineError(
            f"device: {device} does not have enough memory for batch_size: {batch_size}; {advice}"
        ) from None


def environment(device: torch.device) -> dict[str, str | int]:
    """Return what affects the last bits of a result, besides code, data and parameters."""
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    several: dict[str, str | int] = {"processes": processes} if processes > 1 else {}
    return several | {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "cpu": _cpu_name(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads() * _processes_here(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": version("torchvision"),
        "numpy": np.__version__,
        "blas": _blas_name(),
    }


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        fields = dict(
            [part.strip() for part in line.split(":", 1)] for line in cpuinfo.read_text().splitlines() if ":" in line
        )
        if "model name" in fields:
            name, family, model = (fields.get(key, "?") for key in ("model name", "cpu family", "model"))
            return f"{name} (family {family}, model {model})"
        if "CPU part" in fields:  # Arm
            return f"implementer {fields.get('CPU implementer', '?')}, part {fields['CPU part']}"
    if platform.system() == "Darwin":
        asked = subprocess.run(["sysctl", "-n", "machdep.cpu.brand_string"], capture_output=True, text=True)
        if asked.returncode == 0:
            return asked.stdout.strip()
    return platform.processor() or platform.machine()


def _blas_name() -> str:
    """Return the BLAS library in torch's build configuration."""
    for line in torch.__config__.show().splitlines():
        if "Math Kernel Library" in line or "OpenBLAS" in line or "Accelerate" in line:
            return line.strip(" -")
    return "unknown"
