"""A dataset in batches, in a reproducible order.

Images are read by index from the mapped arrays that `annotate` wrote. An accelerator with room for all of them gets a
copy once; otherwise each batch is copied while the one before is computed. Images above the memory limit may have to
come from the disk: a thread reads them some batches ahead. Order, batches and numbers are the same in each case.
"""

import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from classifier.compute.device import has_room, to_device
from classifier.compute.distributed import ALONE, Group
from classifier.data.dataset import CustomImageDataset
from classifier.data.transforms import MIXING, augment, mix, one_hot, to_float
from classifier.pipeline.errors import PipelineError

if TYPE_CHECKING:  # benchmarks.accelerator runs where pydantic is not installed
    from classifier.pipeline.params import Params

READ_AHEAD = 4  # batches


def batches_of(
    dataset: CustomImageDataset, params: "Params", device: torch.device, group: Group = ALONE, **training: Any
) -> "Batches":
    """A dataset in its own order, in batches as params.yaml has them; `training` is what only training has."""
    return Batches(
        dataset,
        params.batch_size,
        device,
        memory_limit_gib=params.memory_limit_gib,
        workers=params.workers,
        group=group,
        **training,
    )


def training_batches(
    dataset: CustomImageDataset, names: list[str], params: "Params", device: torch.device, group: Group = ALONE
) -> "Batches":
    """A dataset in batches to train on: in the order, with the targets, balanced and augmented as params.yaml says.

    names: of the classes. Raises PipelineError if classes are to be balanced and one has no image.
    """
    class_weights = None if params.balance == "none" else dataset.class_weights(names)
    if params.target_transform == "one_hot":
        dataset.target_transform = partial(one_hot, classes=len(names))
    return batches_of(
        dataset,
        params,
        device,
        group,
        seed=params.seed,
        shuffle=params.shuffle,
        weights=class_weights[dataset.labels] if class_weights is not None and params.balance == "sampler" else None,
        augmentations=params.augment,
    )


def epoch_order(count: int, seed: int, epoch: int, shuffle: bool, weights: Tensor | None = None) -> Tensor:
    """The order of the images in an epoch, (count,) int64: a function of (seed, epoch), drawn on the CPU.

    weights: (count,) float64; with them images are drawn with replacement, in proportion to their weights.
    """
    if not shuffle:
        return torch.arange(count)
    generator = _generator(seed, epoch)
    if weights is None:
        return torch.randperm(count, generator=generator)
    # torch.multinomial, which says the same in one line, takes 2^24 images at most.
    ends = weights.cumsum(0)
    drawn = torch.rand(count, dtype=torch.float64, generator=generator) * ends[-1:]
    return torch.searchsorted(ends, drawn, right=True).clamp_(max=count - 1)  # the product may be rounded to the end


def _generator(*key: int) -> torch.Generator:
    """A CPU generator for a key such as (seed, epoch): other keys give unrelated numbers."""
    state = np.random.SeedSequence(key).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(state >> 1))


class Batches:
    """A dataset in batches on a device: pixels (B, C, H, W) float32 in [0, 1], and targets.

    `dataset.transform` is not used here: pixels are scaled, and augmented if asked, a batch at a time.
    weights: of the images, (N,) float64, as `epoch_order` takes them: an epoch is then N images drawn by them.
    group: the processes that share the work: of each batch there is this one's part, `group.part`.
    Raises PipelineError if there are weights, but no `shuffle`.
    """

    def __init__(
        self,
        dataset: CustomImageDataset,
        batch_size: int,
        device: torch.device,
        *,
        seed: int = 0,
        shuffle: bool = False,
        weights: Tensor | None = None,
        augmentations: Sequence[str] = (),
        memory_limit_gib: float,
        workers: int,
        group: Group = ALONE,
    ) -> None:
        if weights is not None and not shuffle:
            raise PipelineError(
                "balance: sampler draws the images of an epoch at random; set shuffle: true, or balance: loss"
            )
        self.dataset = dataset
        self.batch_size = batch_size
        self.device = device
        self.seed = seed
        self.shuffle = shuffle
        self.weights = weights
        self.augmentations = augmentations
        self.workers = workers
        self.group = group
        self.image_count = len(dataset)
        self.targets = dataset.targets().to(device)
        self.image_shape = dataset.image_shape()
        total_bytes = self.image_count * math.prod(self.image_shape)
        self.fits_memory = total_bytes <= memory_limit_gib * 2**30
        self.on_device: Tensor | None = None
        if device.type != "cpu" and self.fits_memory and has_room(device, total_bytes):
            self.on_device = dataset.read(range(self.image_count)).to(device)

    def __len__(self) -> int:
        """The number of batches in an epoch; the last one may be smaller."""
        return -(-self.image_count // self.batch_size)

    def count(self, number: int) -> int:
        """How many images a batch has, in all processes."""
        return min(self.batch_size, self.image_count - number * self.batch_size)

    def epoch(self, epoch: int = 0, first: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """This process's part of the batches of an epoch from number `first` on.

        Each batch is a function of (seed, epoch, number) alone, whatever the number of processes.
        """
        order = epoch_order(self.image_count, self.seed, epoch, self.shuffle, self.weights)
        indices = self._parts(to_device(order, self.device), first)
        for number, (index, pixels) in enumerate(zip(indices, self._pixels(order, first), strict=True), first):
            images, targets = to_float(pixels), self.targets[index]
            if self.augmentations:
                generator = _generator(self.seed, epoch, 1, number)
                images = augment(images, self.augmentations, generator, (self.count(number), self._places(number)))
                images, targets = mix(images, targets, self.augmentations, generator, self.dataset.classes)
            before = len(images) - len(self.group.part(self.count(number)))
            yield images[before:], targets[before:]

    def _places(self, number: int) -> slice | Tensor:
        """The places of this process's images in a batch; before them, where images are mixed, what the first is."""
        count = self.count(number)
        own = self.group.part(count)
        if len(own) == count or not any(name in MIXING for name in self.augmentations):
            return slice(own.start, own.stop)
        return torch.tensor([(own.start - 1) % count, *own])

    def _parts(self, order: Tensor, first: int) -> Iterator[Tensor]:
        """Which images of an epoch's order this process takes for each batch from number `first` on, int64."""
        for number in range(first, len(self)):
            places = self._places(number)
            if isinstance(places, Tensor):
                places = to_device(places, order.device)
            yield order[number * self.batch_size :][: self.batch_size][places]

    def _pixels(self, order: Tensor, first: int) -> Iterator[Tensor]:
        """uint8 pixels on the device of what `_parts` names."""
        if self.on_device is not None:
            for index in self._parts(to_device(order, self.device), first):
                yield self.on_device.index_select(0, index)
            return
        parts = self._parts(order, first)
        pixels = map(self._read, parts) if self.fits_memory else _read_ahead(self._read, parts)
        if self.device.type == "cuda":
            yield from copied_ahead(pixels, self.device)
        else:
            yield from (batch.to(self.device) for batch in pixels)

    def _read(self, index: Tensor) -> Tensor:
        """Pixels on the CPU, in page-locked memory for a CUDA device."""
        if self.device.type != "cuda":
            return self.dataset.read(index.numpy())
        batch = torch.empty((len(index), *self.image_shape), dtype=torch.uint8, pin_memory=True)
        return self.dataset.read(index.numpy(), out=batch)


def _read_ahead(read: Callable[[Tensor], Tensor], parts: Iterable[Tensor]) -> Iterator[Tensor]:
    """What `read` returns for each part, in order; a thread is up to READ_AHEAD parts ahead."""
    waiting: deque[Future[Tensor]] = deque()
    with ThreadPoolExecutor(1) as pool:
        for part in parts:
            waiting.append(pool.submit(read, part))
            if len(waiting) > READ_AHEAD:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def copied_ahead(batches: Iterable[Tensor], device: torch.device) -> Iterator[Tensor]:
    """Batches from page-locked memory on a CUDA device, each copied while the device works on the one before."""
    stream = torch.cuda.Stream(device)
    ahead: tuple[Tensor, torch.cuda.Event] | None = None
    for batch in batches:
        with torch.cuda.stream(stream):
            following = batch.to(device, non_blocking=True), stream.record_event()
        if ahead:
            yield _arrived(*ahead)
        ahead = following
    if ahead:
        yield _arrived(*ahead)


def _arrived(batch: Tensor, copied: torch.cuda.Event) -> Tensor:
    """A batch whose copy the device ends before it works on it, and whose memory stays until it has done so."""
    current = torch.cuda.current_stream(batch.device)
    current.wait_event(copied)
    batch.record_stream(current)
    return batch
