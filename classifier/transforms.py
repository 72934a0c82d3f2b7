"""Image transforms and target transforms, on whole batches.

Shapes: images (N, C, H, W); N may be left out where a docstring says so.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

# Padding of the random crop and the erased share of the picture, as is usual for pictures of about 32 x 32
# pixels: He et al. 2015, arXiv:1512.03385, section 4.2; Zhong et al. 2017, arXiv:1708.04896, section 4.
CROP_PADDING = 4
ERASE_PROBABILITY = 0.5
ERASE_AREA = (0.02, 0.4)
ERASE_ASPECT = (0.3, 1 / 0.3)


def to_float(images: Tensor) -> Tensor:
    """Scale uint8 pixels of any shape from 0..255 to float32 in [0, 1], exactly x / 255."""
    return images.to(torch.float32).div_(255)


def one_hot(labels: Tensor | int, classes: int) -> Tensor:
    """Labels (N,) int64, or one label, as float32 rows (N, classes) with a single 1."""
    index = torch.as_tensor(labels).unsqueeze(-1)
    return torch.zeros(*index.shape[:-1], classes, dtype=torch.float32).scatter_(-1, index, 1.0)


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


def augment(images: Tensor, names: Sequence[str], generator: torch.Generator) -> Tensor:
    """Change float images (N, C, H, W) at random, each image by its own draw from the CPU generator.

    crop: shifted by up to CROP_PADDING pixels each way, black beyond the edge; flip: left to right, every
    second image; erase: a rectangle of noise. They are applied in this order whatever the order of `names`.
    """
    if "crop" in names:
        images = _crop(images, generator)
    if "flip" in names:
        flipped = torch.rand(len(images), generator=generator) < 0.5
        images = torch.where(flipped.to(images.device)[:, None, None, None], images.flip(3), images)
    if "erase" in names:
        images = _erase(images, generator)
    return images


def _crop(images: Tensor, generator: torch.Generator) -> Tensor:
    count, channels, height, width = images.shape
    padded = functional.pad(images, [CROP_PADDING] * 4)
    offsets = torch.randint(0, 2 * CROP_PADDING + 1, (2, count), generator=generator).to(images.device)
    rows = offsets[0, :, None] + torch.arange(height, device=images.device)  # (N, H)
    columns = offsets[1, :, None] + torch.arange(width, device=images.device)  # (N, W)
    image = torch.arange(count, device=images.device)[:, None, None, None]
    channel = torch.arange(channels, device=images.device)[None, :, None, None]
    return padded[image, channel, rows[:, None, :, None], columns[:, None, None, :]]


def _erase(images: Tensor, generator: torch.Generator) -> Tensor:
    count, _, height, width = images.shape
    chosen, area, aspect, top, left = torch.rand((5, count), generator=generator)
    area = (ERASE_AREA[0] + area * (ERASE_AREA[1] - ERASE_AREA[0])) * height * width
    low, high = (torch.tensor(ratio).log() for ratio in ERASE_ASPECT)
    aspect = torch.exp(low + aspect * (high - low))
    tall = (area * aspect).sqrt().clamp(max=height)
    wide = (area / aspect).sqrt().clamp(max=width)
    top, left = top * (height - tall), left * (width - wide)
    y, x = torch.arange(height)[None, :, None], torch.arange(width)[None, None, :]
    inside = (y >= top[:, None, None]) & (y < (top + tall)[:, None, None])
    inside = inside & (x >= left[:, None, None]) & (x < (left + wide)[:, None, None])
    inside &= (chosen < ERASE_PROBABILITY)[:, None, None]
    noise = torch.rand(images.shape, generator=generator)
    return torch.where(inside[:, None].to(images.device), noise.to(images.device), images)
