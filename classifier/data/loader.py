"""A dataset in batches, in a reproducible order.

Images are decoded once into one uint8 tensor (N, C, H, W), which is moved to the device once, if it has room, and
batched by index. Above the memory limit they are decoded anew in every epoch by worker processes instead: the same
order, the same batches, the same numbers. What is not on a CUDA device is copied there a batch ahead.
"""

import math
import signal
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from classifier.compute.device import has_room, to_device
from classifier.compute.distributed import ALONE, Group
from classifier.data.dataset import CustomImageDataset
from classifier.data.transforms import MIXING, augment, mix, one_hot, to_float
from classifier.pipeline.annotations import faulty_rows
from classifier.pipeline.errors import PipelineError

if TYPE_CHECKING:  # benchmarks.accelerator runs where pydantic is not installed
    from classifier.pipeline.params import Params


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

    names: of the classes. Raises PipelineError if classes are to be balanced and one has no image, before images are
    decoded.
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
        shape = (self.image_count, *self.image_shape)
        fits = math.prod(shape) <= memory_limit_gib * 2**30
        self.pixels = group.shared(shape, dataset.decode_all) if fits else None
        if self.pixels is not None and has_room(device, math.prod(shape)):
            self.pixels = self.pixels.to(device)

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
        """uint8 pixels on the device of what `_parts` names, from memory or from the worker processes."""
        if self.pixels is not None and self.pixels.device == self.targets.device:
            for index in self._parts(to_device(order, self.device), first):
                yield self.pixels.index_select(0, index)  # on a CPU several times as quick as pixels[index]
            return
        pixels = self._picked(order, first) if self.pixels is not None else self._decoded(order, first)
        if self.device.type == "cuda":
            yield from copied_ahead(pixels, self.device)
        else:
            yield from (batch.to(self.device) for batch in pixels)

    def _picked(self, order: Tensor, first: int) -> Iterator[Tensor]:
        """Pixels on the CPU, page-locked, of images that are in its memory because the device has no room for all."""
        assert self.pixels is not None  # noqa: S101
        for index in self._parts(order, first):
            batch = torch.empty((len(index), *self.image_shape), dtype=torch.uint8, pin_memory=True)
            yield torch.index_select(self.pixels, 0, index, out=batch)

    def _decoded(self, order: Tensor, first: int) -> Iterator[Tensor]:
        """Pixels on the CPU, page-locked for a CUDA device, decoded by the worker processes."""
        if first == len(self):
            return
        loader = DataLoader(
            _Pixels(self.dataset, self.image_shape),
            batch_sampler=(index.tolist() for index in self._parts(order, first)),  # made when they are asked for
            num_workers=self.workers,
            collate_fn=partial(_stack, self.image_shape),
            worker_init_fn=_leave_signals,
            generator=torch.Generator(),  # or it would draw from the global one, which dropout draws from
            pin_memory=self.device.type == "cuda",
        )
        faults: list[tuple[int, str]] = []
        for pixels in loader:
            if isinstance(pixels, list):
                if not faults:
                    print("An image cannot be used: looking through the others of this epoch", flush=True)
                faults += pixels
            elif not faults:
                yield pixels
        if faults:
            raise faulty_rows(self.dataset.annotations, sorted(faults))


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


class _Pixels(Dataset[Tensor | tuple[int, str]]):
    """The decoded images of a dataset without labels, for worker processes; for an unusable one, its row and why.

    An error is handed over, not raised: a DataLoader would wrap the worker's traceback into its message.
    """

    def __init__(self, dataset: CustomImageDataset, shape: tuple[int, int, int]) -> None:
        self.dataset = dataset
        self.shape = shape

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Tensor | tuple[int, str]:
        try:
            return self.dataset.decode_as(self.shape, index)
        except PipelineError as error:
            return self.dataset.rows[index], str(error)


def _leave_signals(_: int) -> None:
    """A signal to the whole process group, as Ctrl-C is, is answered by the main process, which then ends these."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def _stack(shape: tuple[int, int, int], images: list[Tensor | tuple[int, str]]) -> Tensor | list[tuple[int, str]]:
    """One uint8 tensor (B, C, H, W), or what is wrong with its images."""
    pixels = torch.empty((len(images), *shape), dtype=torch.uint8)
    faults = []
    for place, image in enumerate(images):
        if isinstance(image, tuple):
            faults.append(image)
        else:
            pixels[place] = image
    return faults or pixels
