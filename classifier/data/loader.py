"""A dataset in batches, in a reproducible order.

Images are read by index from the mapped arrays that `annotate` wrote. An accelerator with room for all of them gets a
copy once; otherwise each batch is copied while the one before is computed. Images above the memory limit may have to
come from the disk, and images may be stored larger than the network takes them: a thread reads and scales them some
batches ahead. Augmentations of PER_IMAGE run in worker processes. Order, batches and numbers are the same in each case.
"""

import math
import signal
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from classifier.compute.device import has_room, to_device
from classifier.compute.distributed import ALONE, Group
from classifier.data.dataset import CustomImageDataset
from classifier.data.decoding import padding_colour
from classifier.data.transforms import MIXING, PER_IMAGE, augment, mix, one_hot, per_image_transform, to_float
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
        crop_scale=params.crop_scale,
        background=params.background_rgb,
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
    crop_scale, background: as `per_image_transform` takes them; background is (red, green, blue).
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
        crop_scale: float = 1.0,
        background: Sequence[int] = (255, 255, 255),
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
        self.image_shape = channels, height, width = dataset.image_shape()
        per_image = frozenset(augmentations) & frozenset(PER_IMAGE)
        self.per_image: Callable[[Tensor], Tensor] | None = None
        if per_image:
            colour = padding_colour(background, channels)
            self.per_image = per_image_transform(per_image, (height, width), crop_scale, colour)
        total_bytes = self.image_count * math.prod(self.image_shape)
        self.fits_memory = total_bytes <= memory_limit_gib * 2**30
        self.on_device: Tensor | None = None
        if device.type != "cpu" and self.per_image is None and self.fits_memory and has_room(device, total_bytes):
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
        for number, (index, pixels) in enumerate(zip(indices, self._pixels(order, epoch, first), strict=True), first):
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

    def _pixels(self, order: Tensor, epoch: int, first: int) -> Iterator[Tensor]:
        """uint8 pixels on the device of what `_parts` names."""
        if self.on_device is not None:
            for index in self._parts(to_device(order, self.device), first):
                yield self.on_device.index_select(0, index)
            return
        parts = self._parts(order, first)
        if self.per_image is not None:
            pixels = self._transformed(order, epoch, first)
        else:
            is_quick = self.fits_memory and not self.dataset.is_scaled
            pixels = map(self._read, parts) if is_quick else _read_ahead(self._read, parts)
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

    def _transformed(self, order: Tensor, epoch: int, first: int) -> Iterator[Tensor]:
        """Pixels on the CPU, in page-locked memory for a CUDA device, each image changed by a draw of its own.

        The draw is a function of the seed, the epoch and the image's place in the epoch.
        """
        self._transformed_batches.batch_sampler.batches = (  # type: ignore[union-attr]
            [(epoch, place, index) for place, index in zip(places.tolist(), indices.tolist(), strict=True)]
            for places, indices in zip(
                self._parts(torch.arange(self.image_count), first), self._parts(order, first), strict=True
            )
        )
        yield from self._transformed_batches

    @cached_property
    def _transformed_batches(self) -> "DataLoader[Tensor]":
        """Made when the first epoch starts; its worker processes stay for the others."""
        assert self.per_image is not None  # noqa: S101
        return DataLoader(
            _Transformed(self.dataset, self.per_image, self.seed),
            batch_sampler=_Sampler(),
            num_workers=self.workers,
            persistent_workers=self.workers > 0,
            worker_init_fn=_leave_signals,
            generator=torch.Generator(),  # or it would draw from the global one, which dropout draws from
            pin_memory=self.device.type == "cuda",
        )


class _Sampler:
    """The batches of the epoch that is next, for a DataLoader."""

    batches: Iterable[list[tuple[int, int, int]]] = ()

    def __iter__(self) -> Iterator[list[tuple[int, int, int]]]:
        return iter(self.batches)


class _Transformed(Dataset[Tensor]):
    """The images of a dataset by (epoch, place in the epoch, index), each transformed by a draw of its own."""

    def __init__(self, dataset: CustomImageDataset, transform: Callable[[Tensor], Tensor], seed: int) -> None:
        self.dataset = dataset
        self.transform = transform
        self.seed = seed

    def __getitem__(self, key: tuple[int, int, int]) -> Tensor:
        epoch, place, index = key
        # torchvision draws from the global generator; the numbers of _generator with 1 are drawn for whole batches
        with torch.random.fork_rng(devices=[]):
            torch.set_rng_state(_generator(self.seed, epoch, 2, place).get_state())
            return self.transform(self.dataset.read_stored([index])[0])


def _leave_signals(_: int) -> None:
    """Leave a signal to the whole process group, as Ctrl-C is, to the main process, which then ends the workers."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


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
