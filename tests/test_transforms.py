"""Scaling, one-hot targets, and what each augmentation does."""

import pickle

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional
from torchvision import transforms
from torchvision.transforms import v2

from classifier.transforms import (
    CROP_PADDING,
    ERASE_AREA,
    ERASE_PROBABILITY,
    accept_tensors,
    augment,
    one_hot,
    to_float,
)

AUGMENTATIONS = [["crop"], ["flip"], ["erase"], ["crop", "flip", "erase"]]


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def pictures(count: int, channels: int = 1, size: int = 28) -> Tensor:
    """Random images without a black pixel, so that padding can be told from the picture."""
    return torch.rand((count, channels, size, size), generator=seeded(99)) * 0.9 + 0.1


def test_scaling_is_exact() -> None:
    """x / 255, rounded once, for every byte; the same bits as torchvision's ToTensor."""
    values = torch.arange(256, dtype=torch.uint8)
    scaled = to_float(values)
    assert scaled.dtype == torch.float32
    assert scaled.tolist() == [float(np.float32(x / 255)) for x in range(256)]
    assert torch.equal(scaled.view(1, 16, 16), transforms.ToTensor()(values.view(16, 16, 1).numpy()))
    assert values.tolist() == list(range(256))  # left as it was


@pytest.mark.parametrize("shape", [(), (1,), (7,), (0,)])
def test_one_hot_is_torchs(shape: tuple[int, ...]) -> None:
    labels = torch.randint(0, 10, shape, generator=seeded())
    assert torch.equal(one_hot(labels, 10), functional.one_hot(labels, 10).float())


def test_one_hot_of_an_int_is_the_tutorials_lambda() -> None:
    tutorial = transforms.Lambda(
        lambda y: torch.zeros(10, dtype=torch.float).scatter_(dim=0, index=torch.tensor(y), value=1)
    )
    for label in range(10):
        assert torch.equal(one_hot(label, 10), tutorial(label))


def test_one_hot_gives_the_loss_of_class_numbers() -> None:
    logits, labels = torch.randn((64, 10), generator=seeded()), torch.randint(0, 10, (64,), generator=seeded())
    by_number, by_row = (functional.cross_entropy(logits, target) for target in (labels, one_hot(labels, 10)))
    torch.testing.assert_close(by_number, by_row, rtol=1e-6, atol=0)


def test_one_hot_refuses_labels_out_of_range() -> None:
    with pytest.raises(RuntimeError, match="out of bounds"):
        one_hot(10, 10)


@pytest.mark.parametrize(
    "transform",
    [
        transforms.ToTensor(),
        transforms.Compose([transforms.ToTensor()]),
        transforms.Compose([transforms.Compose([transforms.ToTensor()])]),
        v2.Compose([transforms.ToTensor()]),
        transforms.Compose([transforms.ToPILImage(), transforms.ToTensor()]),
        transforms.Compose([v2.ToDtype(torch.float32, scale=True), transforms.ToTensor()]),
        v2.Compose([v2.ToImage(), v2.ToDtype(torch.float32, scale=True)]),
        v2.ToDtype(torch.float32, scale=True),
    ],
    ids=["ToTensor", "Compose", "nested", "v2 with v1", "through PIL", "scaled already", "v2", "ToDtype"],
)
def test_torchvision_transforms_take_tensors(transform: object) -> None:
    image = torch.arange(256, dtype=torch.uint8).view(1, 16, 16)
    accepted = accept_tensors(transform)
    assert callable(accepted)
    # torchvision's v2 is a rounding away from x / 255
    torch.testing.assert_close(torch.as_tensor(accepted(image)), to_float(image), rtol=2e-7, atol=0)
    pickle.dumps(accepted)  # worker processes get it this way where they are not forked


def test_other_transforms_are_left_alone() -> None:
    flip = v2.RandomHorizontalFlip()
    assert accept_tensors(flip) is flip


@pytest.mark.parametrize("names", AUGMENTATIONS, ids="+".join)
def test_augment_is_a_function_of_the_generator(names: list[str]) -> None:
    images = pictures(32, channels=3)
    before, global_state = images.clone(), torch.get_rng_state()
    first, again, other = (augment(images, names, seeded(seed)) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(images, before)
    assert torch.equal(torch.get_rng_state(), global_state)
    assert first.shape == images.shape
    assert first.dtype == torch.float32
    assert 0 <= first.min() <= first.max() <= 1


def test_augment_order_is_fixed_and_nothing_is_nothing() -> None:
    images = pictures(16)
    assert torch.equal(
        augment(images, ["erase", "crop", "flip"], seeded()), augment(images, ["crop", "flip", "erase"], seeded())
    )
    assert torch.equal(augment(images, [], seeded()), images)


def test_crop_shifts_within_the_padding() -> None:
    images = pictures(600, channels=1, size=12)
    cropped = augment(images, ["crop"], seeded())
    reach = range(-CROP_PADDING, CROP_PADDING + 1)
    padded = functional.pad(images, [CROP_PADDING] * 4)
    matches = torch.zeros((len(images), len(reach), len(reach)), dtype=torch.bool)
    for row in range(len(reach)):
        for column in range(len(reach)):
            shifted = padded[:, :, row : row + 12, column : column + 12]
            matches[:, row, column] = (shifted == cropped).flatten(1).all(1)
    assert matches.flatten(1).sum(1).tolist() == [1] * len(images)  # each image is one shift of itself
    uses = matches.sum(0)
    assert uses.min() > 0  # 81 shifts, 7 times each: none is left out, none is preferred
    assert uses.max() < 24


def test_flip_mirrors_about_half_of_the_images() -> None:
    images = pictures(1000)
    flipped = augment(images, ["flip"], seeded())
    mirrored = (flipped == images.flip(3)).flatten(1).all(1)
    kept = (flipped == images).flatten(1).all(1)
    assert torch.equal(mirrored, ~kept)
    assert 440 < mirrored.sum() < 560


@pytest.mark.parametrize("channels", [1, 3])
def test_erase_puts_noise_into_a_rectangle(channels: int) -> None:
    size, count = 28, 1000
    images = torch.full((count, channels, size, size), 2.0)  # no noise is 2
    erased = augment(images, ["erase"], seeded())
    changed = erased != 2
    assert (changed == changed[:, :1]).all()  # every channel alike
    areas = []
    for mask in changed[:, 0]:
        rows, columns = mask.any(1), mask.any(0)
        assert torch.equal(mask, rows[:, None] & columns[None, :])
        for line in (rows, columns):  # without a gap
            assert line.nonzero().diff(dim=0).eq(1).all()
        areas.append(int(mask.sum()))
    drawn = [area for area in areas if area]
    assert abs(len(drawn) / count - ERASE_PROBABILITY) < 0.05
    # The sides are cut to whole pixels, by less than one each.
    assert min(drawn) < ERASE_AREA[0] * size**2 * 2
    assert ERASE_AREA[1] * size**2 * 0.8 < max(drawn) < ERASE_AREA[1] * size**2 * 1.15
    noise = erased[changed]
    assert abs(noise.mean() - 0.5) < 0.01
    assert 0 <= noise.min() <= noise.max() < 1


def test_each_image_has_its_own_draw() -> None:
    same = pictures(1).expand(64, -1, -1, -1)
    augmented = augment(same, ["crop", "flip", "erase"], seeded())
    assert len(augmented.flatten(1).unique(dim=0)) > 48
