"""Several processes that train one network together, as torchrun starts them; one alone has nothing to exchange.

Each works on its part of every batch. Losses and gradients are those of the whole batch, so that training does what one
process does, but for the last bits of sums. The first process alone writes files and tells MLflow.
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

# For what the others may have to wait for: images being decoded, the first process writing a checkpoint
PATIENCE = timedelta(hours=2)


class Group:
    """One of `size` processes, of which `local_size` are on this machine; numbers count from 0."""

    def __init__(self, rank: int = 0, size: int = 1, local_rank: int = 0, local_size: int = 1) -> None:
        self.rank = rank
        self.size = size
        self.local_rank = local_rank
        self.local_size = local_size

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def part(self, count: int, rank: int | None = None) -> range:
        """Which images of a batch of `count` this process, or another, works on; there may be none for some."""
        rank = self.rank if rank is None else rank
        each, rest = divmod(count, self.size)
        start = rank * each + min(rank, rest)
        return range(start, start + each + (rank < rest))

    def in_order(self, own: Tensor, counts: Sequence[int]) -> Tensor:
        """Reassemble per-process rows in dataset order: (N, ...). counts: the images of each batch."""
        if self.size == 1:
            return own
        parts = [
            rows.split([len(self.part(count, rank)) for count in counts]) for rank, rows in enumerate(self.gather(own))
        ]
        return torch.cat([rows for of_batch in zip(*parts, strict=True) for rows in of_batch])

    def ddp_network(self, network: nn.Module) -> nn.Module:
        """The network, such that backward gives all processes the mean of their gradients.

        Batch normalisation becomes one over all processes' images. Parameters and their names stay.
        """
        if self.size == 1:
            return network
        from torch.nn.parallel import DistributedDataParallel

        for module in network.modules():
            if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d):
                module.forward = _BatchNormOverAll(module)  # type: ignore[method-assign, assignment]
        return DistributedDataParallel(network, forward_sync_buffers=False)

    def no_exchange(self, network: nn.Module) -> AbstractContextManager[None]:
        """A block whose gradients stay in this process, to be exchanged with those of a later backward."""
        return network.no_sync() if self.size > 1 else nullcontext()  # type: ignore[operator, no-any-return]

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum of the processes' tensors; the tensor given is not to be used again."""
        if self.size > 1:
            torch.distributed.all_reduce(tensor)
        return tensor

    def any(self, flag: bool) -> bool:
        """Whether one of the processes says so; on the CPU, so that no accelerator is waited for."""
        return flag if self.size == 1 else bool(self.sum(torch.tensor(float(flag))).item())

    def gather(self, value: T) -> list[T]:
        """What each process gives, in their order."""
        values: list[Any] = [value] * self.size
        if self.size > 1:
            torch.distributed.all_gather_object(values, value)
        return values

    def from_first(self, make: Callable[[], T]) -> T:
        """What the first process makes, for all."""
        made: list[Any] = [make() if self.is_first else None]
        if self.size > 1:
            torch.distributed.broadcast_object_list(made)
        return made[0]  # type: ignore[no-any-return]


ALONE = Group()


@contextmanager
def process_group() -> Iterator[Group]:
    """The processes that torchrun has started with this one.

    All but the first are silent, but for errors of their own. Raises PipelineError if another one is gone.
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
        store, *_ = next(rendezvous("env://", timeout=PATIENCE))
        if os.environ.get("GROUP_WORLD_SIZE", "1") == "1":
            # torchrun keeps the store when it starts its processes again, with the addresses of those before
            attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
            store = PrefixStore(f"attempt {attempt}", store)
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        torch.distributed.init_process_group(
            backend, store=store, rank=group.rank, world_size=group.size, timeout=PATIENCE
        )
        yield group
    except (RuntimeError, torch.distributed.DistError) as error:
        if not isinstance(error, torch.distributed.DistError) and "gloo" not in str(error).lower():
            raise
        raise PipelineError(
            f"process {group.rank}: another of the {group.size} processes has ended, see above; what is trained so far "
            "is kept: run the same command again"
        ) from None
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


class _Sum(torch.autograd.Function):
    """The sum of all processes' tensors, whose gradient is the sum of theirs."""

    @staticmethod
    def forward(_: Any, tensor: Tensor) -> Tensor:
        total = tensor.clone()
        torch.distributed.all_reduce(total)
        return total

    @staticmethod
    def backward(_: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        return _Sum.forward(_, gradient)


class _BatchNormOverAll:
    """The forward of a batch normalisation whose mean and variance in training are those of all processes' images.

    torch.nn.SyncBatchNorm, which does the same, does not run on CPUs.
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
