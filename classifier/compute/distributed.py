"""Train one network in several processes, which torchrun starts. A single process exchanges nothing.

Each process works on its part of every batch. Losses and gradients are those of the whole batch, so the result is that
of one process, except for the last bits of sums. Only the first process writes files and tracking records.
"""

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from classifier.pipeline.errors import PipelineError

T = TypeVar("T")

# The longest wait for another process, which may decode images or write a checkpoint
TIMEOUT = timedelta(hours=2)


class Group:
    """One of `size` processes, `local_size` of them on this machine. Ranks count from 0."""

    def __init__(self, rank: int = 0, size: int = 1, local_rank: int = 0, local_size: int = 1) -> None:
        self.rank = rank
        self.size = size
        self.local_rank = local_rank
        self.local_size = local_size

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def part(self, count: int, rank: int | None = None) -> range:
        """Return the indices in a batch of `count` images for process `rank`, by default this one; may be empty."""
        rank = self.rank if rank is None else rank
        each, rest = divmod(count, self.size)
        start = rank * each + min(rank, rest)
        return range(start, start + each + (rank < rest))

    def in_order(self, own: Tensor, counts: Sequence[int]) -> Tensor:
        """Reassemble per-process rows in dataset order: (N, ...). counts: the number of images of each batch."""
        if self.size == 1:
            return own
        parts = [
            rows.split([len(self.part(count, rank)) for count in counts]) for rank, rows in enumerate(self.gather(own))
        ]
        return torch.cat([rows for of_batch in zip(*parts, strict=True) for rows in of_batch])

    def ddp_network(self, network: nn.Module) -> nn.Module:
        """Wrap a network so that backward averages gradients over all processes.

        Batch normalisation uses the images of all processes. Parameters and their names do not change.
        """
        if self.size == 1:
            return network
        from torch.nn.parallel import DistributedDataParallel

        for module in network.modules():
            if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d):
                module.forward = _BatchNormOverAll(module)  # type: ignore[method-assign, assignment]
        return DistributedDataParallel(network, forward_sync_buffers=False)

    def no_exchange(self, network: nn.Module) -> AbstractContextManager[None]:
        """Return a context in which gradients accumulate in this process; a later backward exchanges them."""
        return network.no_sync() if self.size > 1 else nullcontext()  # type: ignore[operator, no-any-return]

    def sum(self, tensor: Tensor) -> Tensor:
        """Return the sum of all processes' tensors; the argument is overwritten."""
        if self.size > 1:
            torch.distributed.all_reduce(tensor)
        return tensor

    def any(self, flag: bool) -> bool:
        """Whether the flag is true in any process; computed on the CPU, so that it does not wait for an accelerator."""
        return flag if self.size == 1 else bool(self.sum(torch.tensor(float(flag))).item())

    def gather(self, value: T) -> list[T]:
        """Return the values of all processes, by rank."""
        values: list[Any] = [value] * self.size
        if self.size > 1:
            torch.distributed.all_gather_object(values, value)
        return values

    def from_first(self, make: Callable[[], T]) -> T:
        """Return in every process what `make` returns in the first one."""
        made: list[Any] = [make() if self.is_first else None]
        if self.size > 1:
            torch.distributed.broadcast_object_list(made)
        return made[0]  # type: ignore[no-any-return]


ALONE = Group()


@contextmanager
def process_group() -> Iterator[Group]:
    """Yield the group of processes that torchrun started together.

    Only the first prints to standard output. Raises PipelineError if another process has ended.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield ALONE
        return
    from torch.distributed.distributed_c10d import PrefixStore
    from torch.distributed.rendezvous import rendezvous

    numbers = (int(os.environ[key]) for key in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"))
    group = Group(*numbers)
    if not group.is_first:
        sys.stdout = Path(os.devnull).open("w")  # noqa: SIM115, until the process ends
    try:
        store, *_ = next(rendezvous("env://", timeout=TIMEOUT))
        if os.environ.get("GROUP_WORLD_SIZE", "1") == "1":
            # After a restart, torchrun keeps the store, which still holds the addresses of the earlier processes
            attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
            store = PrefixStore(f"attempt {attempt}", store)
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        torch.distributed.init_process_group(
            backend, store=store, rank=group.rank, world_size=group.size, timeout=TIMEOUT
        )
        yield group
    except (RuntimeError, torch.distributed.DistError) as error:
        if not isinstance(error, torch.distributed.DistError) and "gloo" not in str(error).lower():
            raise
        raise PipelineError(
            f"process {group.rank}: another of the {group.size} processes has ended, see above. Its last checkpoint is "
            "kept: run the same command again to resume"
        ) from None
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


class _Sum(torch.autograd.Function):
    """Sum tensors over all processes; the gradient is the sum of their gradients."""

    @staticmethod
    def forward(_: Any, tensor: Tensor) -> Tensor:
        total = tensor.clone()
        torch.distributed.all_reduce(total)
        return total

    @staticmethod
    def backward(_: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        return _Sum.forward(_, gradient)


class _BatchNormOverAll:
    """Forward of a batch normalisation that, in training, uses mean and variance of the images of all processes.

    torch.nn.SyncBatchNorm does the same, but not on CPUs.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.alone = module.forward

    def __call__(self, maps: Tensor) -> Tensor:
        norm: Any = self.module
        if not norm.training:
            result: Tensor = self.alone(maps)
            return result
        over = [dimension for dimension in range(maps.ndim) if dimension != 1]
        shape = [1 if dimension in over else -1 for dimension in range(maps.ndim)]
        values = maps if maps.dtype == torch.float64 else maps.float()
        count = _total(torch.tensor(float(maps.numel() // maps.shape[1]), device=maps.device))
        mean = _total(values.sum(over)) / count
        centred = values - mean.view(shape)
        variance = _total(centred.square().sum(over)) / count
        if norm.track_running_stats:
            with torch.no_grad():
                norm.num_batches_tracked += 1
                momentum = 1 / norm.num_batches_tracked if norm.momentum is None else norm.momentum
                norm.running_mean.lerp_(mean, momentum)
                norm.running_var.lerp_(variance * count / (count - 1), momentum)
        normalised: Tensor = centred * (variance + norm.eps).rsqrt().view(shape)
        if norm.affine:
            normalised = normalised * norm.weight.view(shape) + norm.bias.view(shape)
        return normalised.to(maps.dtype)


def _total(tensor: Tensor) -> Tensor:
    total: Tensor = _Sum.apply(tensor)
    return total
