"""Image transforms and target transforms.

Most work on whole batches, (N, C, H, W); N may be left out where a docstring says so. Those of PER_IMAGE work on single
uint8 images, in worker processes.
"""

from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from classifier.compute.device import to_device
from classifier.data.decoding import resize_pixels

# Padding of the random crop and the erased share of the picture, as is usual for pictures of about 32 x 32
# pixels: He et al. 2015, arXiv:1512.03385, section 4.2; Zhong et al. 2017, arXiv:1708.04896, section 4.
CROP_PADDING = 4
ERASE_PROBABILITY = 0.5
ERASE_AREA = (0.02, 0.4)
ERASE_ASPECT = (0.3, 1 / 0.3)
NOISE_NUMBERS = 2**22  # in the table that noise is read from; 16 MiB
# Brightness, contrast and saturation are multiplied by 0.6 to 1.4: He et al. 2018, arXiv:1812.01187, section 2.1.
COLOR_JITTER = 0.4
# Both alphas of the Beta distribution that the shares of two pictures are drawn from, as for pictures of about 32 x 32
# pixels: 1, an even distribution. Zhang et al. 2017, arXiv:1710.09412, section 3.2; Yun et al. 2019, arXiv:1905.04899,
# section 3.1.
MIX_ALPHA = 1.0
MIXING = ("mixup", "cutmix")
PER_IMAGE = ("resized_crop", "rotate", "trivial", "randaugment")  # in the order in which they are applied
CROP_ASPECT = (3 / 4, 4 / 3)  # of resized_crop: Szegedy et al. 2014, arXiv:1409.4842, section 6
ROTATION = 15  # degrees, at most
LUMA = (0.2989, 0.587, 0.114)  # of red, green and blue in grey: ITU-R BT.601, rounded as in torchvision


def to_float(images: Tensor) -> Tensor:
    """Scale uint8 pixels of any shape from 0..255 to float32 in [0, 1], exactly x / 255.

    On CUDA devices torch multiplies by the reciprocal of a divisor that is a Python number, and rounds otherwise.
    """
    return images.to(torch.float32).div_(torch.full((), 255.0, device=images.device))


def one_hot(labels: Tensor | int, classes: int) -> Tensor:
    """Labels (N,) int64, or one label, as float32 rows (N, classes) with a single 1."""
    index = torch.as_tensor(labels).unsqueeze(-1)
    rows = torch.zeros(*index.shape[:-1], classes, dtype=torch.float32, device=index.device)
    return rows.scatter_(-1, index, 1.0)


def accept_tensors(transform: object) -> object:
    """Replace torchvision's ToTensor, which refuses tensors, by one that takes them too."""
    from torchvision import transforms  # two seconds of import, not needed by the pipeline itself
    from torchvision.transforms import v2

    if isinstance(transform, (transforms.Compose, v2.Compose)):
        return type(transform)([accept_tensors(part) for part in transform.transforms])
    return _to_tensor if isinstance(transform, transforms.ToTensor) else transform


def _to_tensor(image: Any) -> Any:
    """What ToTensor means: bytes become floats in [0, 1], floats stay as they are."""
    from torchvision.transforms.functional import to_tensor

    if not isinstance(image, Tensor):
        return to_tensor(image)
    return to_float(image) if image.dtype == torch.uint8 else image


def augment(
    images: Tensor, names: Sequence[str], generator: torch.Generator, part: tuple[int, slice | Tensor] | None = None
) -> Tensor:
    """Change float images (N, C, H, W) at random, each image by its own draw from the CPU generator.

    part: that they are only some of a batch of so many images, those at these places: each gets the draw that it gets
    in the whole batch.

    crop: shifted by up to CROP_PADDING pixels each way, black beyond the edge; flip: left to right, and vflip: top to
    bottom, each with probability 1/2; color: brightness, contrast and, of images with three channels, saturation times
    1 ± COLOR_JITTER at most; erase: a rectangle of noise. They are applied in this order whatever the order of `names`;
    the names of PER_IMAGE and MIXING are ignored.
    """
    count, places = part or (len(images), slice(None))
    if "crop" in names:
        images = _crop(images, torch.randint(0, 2 * CROP_PADDING + 1, (2, count), generator=generator)[:, places])
    if "flip" in names:
        flipped = to_device((torch.rand(count, generator=generator) < 0.5)[places], images.device)
        images = torch.where(flipped[:, None, None, None], images.flip(3), images)
    if "vflip" in names:
        flipped = to_device((torch.rand(count, generator=generator) < 0.5)[places], images.device)
        images = torch.where(flipped[:, None, None, None], images.flip(2), images)
    if "color" in names:
        operations = [adjust_brightness, adjust_contrast] + ([adjust_saturation] if images.shape[1] == 3 else [])
        factors = 1 + COLOR_JITTER * (2 * torch.rand((len(operations), count), generator=generator) - 1)
        for adjust, factor in zip(operations, to_device(factors[:, places], images.device), strict=True):
            images = adjust(images, factor)
    if "erase" in names:
        draws = torch.rand((5, count), generator=generator)[:, places]
        start = torch.randint(NOISE_NUMBERS, (count,), generator=generator)[places]
        images = _erase(images, draws, _noise(images, start))
    return images


@lru_cache(maxsize=4)
def per_image_transform(
    names: frozenset[str], size: tuple[int, int], crop_scale: float, background: tuple[int, ...]
) -> Callable[[Tensor], Tensor]:
    """Return the transform of one uint8 image (C, H, W) to (C, *size), which draws from torch's global generator.

    names: of PER_IMAGE. resized_crop: a part of `crop_scale` to all of the area, scaled to `size`; without it, the
    whole image is scaled. rotate: by up to ROTATION degrees, on the background. trivial: TrivialAugmentWide (Mueller
    and Hutter 2021, arXiv:2103.10158). randaugment: RandAugment (Cubuk et al. 2019, arXiv:1909.13719), two operations
    of magnitude 9. background: (C,) of the image's channels.
    """
    from torchvision.transforms import v2  # two seconds of import

    bilinear, fill = v2.InterpolationMode.BILINEAR, list(background)
    steps: dict[str, Callable[[Tensor], Tensor]] = {
        "resized_crop": v2.RandomResizedCrop(size, (crop_scale, 1.0), CROP_ASPECT, bilinear, antialias=True),
        "rotate": v2.RandomRotation(ROTATION, bilinear, fill=fill),
        "trivial": v2.TrivialAugmentWide(interpolation=bilinear, fill=fill),
        "randaugment": v2.RandAugment(interpolation=bilinear, fill=fill),
    }
    chosen = [step for name, step in steps.items() if name in names]
    resize = [] if "resized_crop" in names else [partial(_resized, size=size)]
    composed: Callable[[Tensor], Tensor] = v2.Compose([*resize, *chosen])
    return composed


def _resized(image: Tensor, size: tuple[int, int]) -> Tensor:
    return torch.from_numpy(resize_pixels(image.numpy(), size))


def mix(
    images: Tensor, targets: Tensor, names: Sequence[str], generator: torch.Generator, classes: int | None
) -> tuple[Tensor, Tensor]:
    """Mix each image of a batch, and its target, with the one before it in the batch, the first with the last.

    mixup: both images shine through each other; cutmix: a rectangle comes from the other; with both in `names` one of
    them, by a coin for the batch. One share is drawn for the whole batch, from the CPU generator. Batches that are not
    shuffled mix the same pairs in every epoch.
    images: (N, C, H, W) float; targets: (N,) int64 below `classes`, or (N, classes) float32 probabilities.
    Returns images and (N, classes) float32 probabilities; without one of the two names, what was given.
    """
    chosen = [name for name in MIXING if name in names]
    if not chosen:
        return images, targets
    from torchvision.transforms import v2  # two seconds of import, not needed without these two

    name = chosen[int(torch.randint(len(chosen), (), generator=generator))]
    transform = {"mixup": v2.MixUp, "cutmix": v2.CutMix}[name](alpha=MIX_ALPHA, num_classes=classes)
    # torchvision draws from the global generator, which dropout draws from: it gets ours for as long as that takes.
    # torch.manual_seed would also seed the accelerators' generators, which fork_rng does not bring back here.
    with torch.random.fork_rng(devices=[]):
        torch.set_rng_state(generator.get_state())
        images, targets = transform(images, targets)
    return images, targets


def adjust_brightness(images: Tensor, factor: Tensor) -> Tensor:
    """Images (N, C, H, W) in [0, 1] times a factor (N,), cut off at 1."""
    return (images * factor[:, None, None, None]).clamp(max=1)


def adjust_contrast(images: Tensor, factor: Tensor) -> Tensor:
    """Images (N, C, H, W) in [0, 1], each moved by its factor (N,) away from its mean grey, or towards it."""
    return _blend(images, _grey(images).mean(dim=(1, 2, 3), keepdim=True), factor)


def adjust_saturation(images: Tensor, factor: Tensor) -> Tensor:
    """Images (N, 3, H, W) in [0, 1], each pixel moved by its image's factor (N,) away from its grey, or towards it."""
    return _blend(images, _grey(images), factor)


def _grey(images: Tensor) -> Tensor:
    """(N, 1, H, W) of images with one channel or three."""
    if images.shape[1] == 1:
        return images
    red, green, blue = (images[:, channel, None] * share for channel, share in enumerate(LUMA))
    return red + green + blue


def _blend(images: Tensor, others: Tensor, factor: Tensor) -> Tensor:
    factor = factor[:, None, None, None]
    return (images * factor + others * (1 - factor)).clamp(0, 1)


def _crop(images: Tensor, offsets: Tensor) -> Tensor:
    """offsets: (2, N) int64, the first row and the first column of each image's part of the padded one."""
    count, channels, height, width = images.shape
    padded = functional.pad(images, [CROP_PADDING] * 4)
    offsets = to_device(offsets, images.device)
    rows = offsets[0, :, None] + torch.arange(height, device=images.device)  # (N, H)
    columns = offsets[1, :, None] + torch.arange(width, device=images.device)  # (N, W)
    image = torch.arange(count, device=images.device)[:, None, None, None]
    channel = torch.arange(channels, device=images.device)[None, :, None, None]
    return padded[image, channel, rows[:, None, :, None], columns[:, None, None, :]]


def _erase(images: Tensor, draws: Tensor, noise: Tensor) -> Tensor:
    """draws: (5, N) in [0, 1], of whether, how large, of which shape and where; noise: what comes there, as images."""
    _, _, height, width = images.shape
    chosen, area, aspect, top, left = draws
    area = (ERASE_AREA[0] + area * (ERASE_AREA[1] - ERASE_AREA[0])) * height * width
    low, high = (torch.tensor(ratio).log() for ratio in ERASE_ASPECT)
    aspect = torch.exp(low + aspect * (high - low))
    tall = (area * aspect).sqrt().clamp(max=height) * (chosen < ERASE_PROBABILITY)  # 0 rows of those not chosen
    wide = (area / aspect).sqrt().clamp(max=width)
    top, left = top * (height - tall), left * (width - wide)
    bounds = to_device(torch.stack([top, top + tall, left, left + wide]), images.device)[..., None]
    y, x = (torch.arange(side, device=images.device) for side in (height, width))
    rows = (y >= bounds[0]) & (y < bounds[1])  # (N, H)
    columns = (x >= bounds[2]) & (x < bounds[3])  # (N, W)
    return torch.where((rows[:, :, None] & columns[:, None, :])[:, None], noise, images)


def _noise(images: Tensor, start: Tensor) -> Tensor:
    """Numbers from [0, 1) in the shape of the images: for each a stretch of one table, from its `start` on.

    start: (N,) int64 below NOISE_NUMBERS. Drawn anew for each pixel on the CPU, as numbers that every device agrees on
    must be, noise would take longer than a training step of an accelerator.
    """
    size, device = images.shape[1:].numel(), images.device
    table = _noise_table(size, device)
    if device.type == "cpu" and len(images):  # copies of whole stretches, several times as quick there
        return torch.stack([table[first : first + size] for first in start.tolist()]).view(images.shape)
    return table[to_device(start, device)[:, None] + torch.arange(size, device=device)].view(images.shape)


@lru_cache(maxsize=4)
def _noise_table(size: int, device: torch.device) -> Tensor:
    """(NOISE_NUMBERS + size - 1,) float32 from [0, 1), the same in every process."""
    generator = torch.Generator().manual_seed(0)
    return torch.rand(NOISE_NUMBERS + size - 1, generator=generator).to(device)
