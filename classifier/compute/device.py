"""Where and how torch computes: the device policy, seeds, determinism, threads, and a record of them all."""

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
    """The device that `device` in params.yaml asks for, announced as `Using cpu device`.

    auto is cuda, then mps, then cpu. Raises PipelineError, with the usable ones, for one that is not usable.
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
    """Names of the devices that can be used, the preferred one first; cpu is always the last."""
    cuda = [f"cuda:{index}" for index in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    mps = ["mps"] if torch.backends.mps.is_available() and _holds_a_tensor("mps") else []
    return (["cuda", *cuda] if cuda else []) + mps + ["cpu"]


def _holds_a_tensor(name: str) -> bool:
    """Whether the device has any memory: virtual machines report an mps device that has none."""
    try:
        torch.zeros(1, device=name)
    except RuntimeError:
        return False
    return True


def set_threads(threads: int | Literal["auto"]) -> int:
    """Set the number of CPU threads, shared by the processes that torchrun starts on a machine; return this one's.

    auto is one for each core that may be used.
    The number decides the last bits of sums, so results are reproducible for one number only. The environment
    variable CLASSIFIER_THREADS is what auto means where it is set: a rebuild elsewhere uses the recorded number.
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
    """Have glibc keep the memory of tensors that are gone for the next ones; elsewhere, do nothing.

    By default it gives large blocks back to the system, which hands them out again as new pages, filled with zeros: in
    each step of a convolutional network thousands of page faults. The numbers of `man 3 mallopt`: blocks below 1 GiB
    come from the heap, whose free end stays, up to 2 GiB. `python -m benchmarks.step` measures it.
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
    """Choose among the kernels that torch has for an operation.

    deterministic: allow only kernels that give the same bits every time; one that has no such form raises RuntimeError
    when it is called. Otherwise cuDNN times its convolutions at their first call and keeps the quickest.
    precision: float32 products and convolutions on CUDA devices use TF32, a float32 with 10 bits of mantissa instead
    of 23, for `tf32` alone; torch's own default uses it in convolutions.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what cuBLAS needs to be deterministic
    # What torch.use_deterministic_algorithms does, without its two seconds of import
    torch.set_deterministic_debug_mode("error" if deterministic else "default")
    # New tensors are otherwise filled with NaN before they are written; benchmarks/step.py tells what that costs
    fill.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.backends.cudnn.benchmark = not deterministic
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    torch.backends.cudnn.allow_tf32 = precision == "tf32"


def place(network: nn.Module, device: torch.device) -> nn.Module:
    """Move a network to a device; on a CUDA device the channels of convolutions come last in memory, as it wants."""
    network = network.to(device)
    return network.to(memory_format=torch.channels_last) if device.type == "cuda" else network


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy a tensor from the CPU to a device, without waiting for the copy where the device is a CUDA device.

    A copy from ordinary memory would wait for all work that the device has been given; one from page-locked memory
    joins it.
    """
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def has_room(device: torch.device, size: int) -> bool:
    """Whether so many bytes of images may stay on a device; on a CUDA device, half of what is free is for training."""
    return device.type != "cuda" or size <= torch.cuda.mem_get_info(device)[0] // 2


@contextmanager
def naming_batch_size(device: torch.device, batch_size: int, accumulate_steps: int | None = None) -> Iterator[None]:
    """Raise PipelineError that names the batch size to try if the block finds too little memory on the device.

    accumulate_steps: of a training, which can keep its updates by accumulating the gradients of smaller batches.
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
        raise PipelineError(f"device: {device} has not enough memory for batch_size: {batch_size}; {advice}") from None


def environment(device: torch.device) -> dict[str, str | int]:
    """What decides the last bits of a result besides code, data and parameters."""
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
    """The matrix library of this torch build, as its build report names it."""
    for line in torch.__config__.show().splitlines():
        if "Math Kernel Library" in line or "OpenBLAS" in line or "Accelerate" in line:
            return line.strip(" -")
    return "unknown"
