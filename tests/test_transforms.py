"""Scaling, one-hot targets, and what each augmentation does, on its own and compared with torchvision."""

import pickle
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional
from torchvision import transforms
from torchvision.transforms import v2

from classifier.data.transforms import (
    COLOR_JITTER,
    CROP_PADDING,
    ERASE_AREA,
    ERASE_ASPECT,
    ERASE_PROBABILITY,
    accept_tensors,
    adjust_brightness,
    adjust_contrast,
    adjust_saturation,
    augment,
    mix,
    one_hot,
    to_float,
)

AUGMENTATIONS = [["crop"], ["flip"], ["color"], ["erase"], ["crop", "flip", "color", "erase"]]
MIXES = [["mixup"], ["cutmix"], ["mixup", "cutmix"]]


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


@pytest.mark.parametrize("names", AUGMENTATIONS, ids="+".join)
def test_no_images_are_augmented_to_no_images(names: list[str]) -> None:
    """As in a process that has no part of a small batch."""
    part = augment(pictures(2)[:0], names, seeded(), (2, slice(2, 2)))
    assert part.shape == (0, 1, 28, 28)


def test_augment_order_is_fixed_and_nothing_is_nothing() -> None:
    images = pictures(16)
    assert torch.equal(
        augment(images, ["erase", "color", "crop", "flip"], seeded()),
        augment(images, ["crop", "flip", "color", "erase"], seeded()),
    )
    assert torch.equal(augment(images, ["mixup", "cutmix"], seeded()), images)  # those of mix


def test_crop_shifts_within_the_padding() -> None:
    images = pictures(600, channels=1, size=12)
    cropped = augment(images, ["crop"], seeded())
    reach = range(-CROP_PADDING, CROP_PADDING + 1)
    padded = v2.functional.pad(images, [CROP_PADDING])
    matches = torch.zeros((len(images), len(reach), len(reach)), dtype=torch.bool)
    for row in range(len(reach)):
        for column in range(len(reach)):
            shifted = v2.functional.crop(padded, row, column, 12, 12)
            matches[:, row, column] = (shifted == cropped).flatten(1).all(1)
    assert matches.flatten(1).sum(1).tolist() == [1] * len(images)  # each image is one shift of itself
    uses = matches.sum(0)
    assert uses.min() > 0  # 81 shifts, 7 times each: none is left out, none is preferred
    assert uses.max() < 24


def test_flip_mirrors_about_half_of_the_images() -> None:
    images = pictures(1000)
    flipped = augment(images, ["flip"], seeded())
    mirrored = (flipped == v2.functional.horizontal_flip(images)).flatten(1).all(1)
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
    assert len(augment(same, ["color"], seeded()).flatten(1).unique(dim=0)) == 64


def test_erase_is_torchvisions_of_the_same_rectangle() -> None:
    """And rectangles are as tall, wide and often as those of its RandomErasing with the same settings."""
    images = pictures(1500, size=32)
    erased = augment(images, ["erase"], seeded())
    torch.manual_seed(0)
    theirs = v2.RandomErasing(ERASE_PROBABILITY, ERASE_AREA, ERASE_ASPECT, value=0)
    sides: dict[str, list[tuple[int, int]]] = {"ours": [], "theirs": []}
    for image, ours in zip(images, erased, strict=True):
        if changed := (ours != image)[0].nonzero().tolist():
            (top, left), (bottom, right) = changed[0], changed[-1]
            height, width = bottom - top + 1, right - left + 1
            noise = ours[:, top : bottom + 1, left : right + 1]
            assert torch.equal(ours, v2.functional.erase(image, top, left, height, width, noise))
            sides["ours"].append((height, width))
        black = theirs(image)[0] == 0
        if black.any():
            sides["theirs"].append((int(black.any(1).sum()), int(black.any(0).sum())))
    assert abs(len(sides["ours"]) - len(sides["theirs"])) < 100
    means = [np.mean(sides[whose], axis=0) for whose in ("ours", "theirs")]
    # Where a side would be longer than the picture, torchvision draws both anew, and here it is cut.
    assert np.abs(means[0] - means[1]).max() < 1.5


@pytest.mark.parametrize(
    ("adjust", "torchvisions"),
    [
        (adjust_brightness, v2.functional.adjust_brightness),
        (adjust_contrast, v2.functional.adjust_contrast),
        (adjust_saturation, v2.functional.adjust_saturation),
    ],
)
@pytest.mark.parametrize("channels", [1, 3])
def test_adjustments_are_torchvisions(
    adjust: Callable[[Tensor, Tensor], Tensor], torchvisions: Callable[[Tensor, float], Tensor], channels: int
) -> None:
    images = pictures(9, channels)
    images[0], images[1] = 0, 1  # black and white
    factors = torch.linspace(1 - COLOR_JITTER, 1 + COLOR_JITTER, 9).roll(4)
    expected = [torchvisions(image, float(factor)) for image, factor in zip(images, factors, strict=True)]
    torch.testing.assert_close(adjust(images, factors), torch.stack(expected), rtol=0, atol=3e-7)


@pytest.mark.parametrize("channels", [1, 3])
def test_color_is_a_jitter_of_what_there_is(channels: int) -> None:
    """Brightness, then contrast, then saturation, of which grey images have none."""
    images = pictures(500, channels, size=4)
    jittered = augment(images, ["color"], seeded())
    factors = 1 - COLOR_JITTER + 2 * COLOR_JITTER * torch.rand((3 if channels == 3 else 2, 500), generator=seeded())
    expected = adjust_contrast(adjust_brightness(images, factors[0]), factors[1])
    if channels == 3:
        expected = adjust_saturation(expected, factors[2])
    torch.testing.assert_close(jittered, expected, rtol=0, atol=1e-6)


# Mixing


def labels_of(images: Tensor) -> Tensor:
    return torch.arange(len(images)) % 10


@pytest.mark.parametrize("names", MIXES, ids="+".join)
@pytest.mark.parametrize("count", [1, 2, 33])
def test_mix_is_a_function_of_the_generator(names: list[str], count: int) -> None:
    images = pictures(count, channels=3)
    before, labels, global_state = images.clone(), labels_of(images), torch.get_rng_state()
    (first, targets), again, *others = (mix(images, labels, names, seeded(seed), 10) for seed in (1, 1, *range(2, 9)))
    assert torch.equal(first, again[0])
    assert torch.equal(targets, again[1])
    assert count == 1 or not any(torch.equal(first, other) for other, _ in others)
    assert torch.equal(images, before)
    assert torch.equal(labels, labels_of(images))
    assert torch.equal(torch.get_rng_state(), global_state)
    assert first.shape == images.shape
    assert (targets.shape, targets.dtype, first.dtype) == ((count, 10), torch.float32, torch.float32)
    torch.testing.assert_close(targets.sum(1), torch.ones(count), rtol=0, atol=1e-6)
    for mixed, _ in [(first, targets), *others]:
        assert 0 <= mixed.min() <= mixed.max() <= 1


@pytest.mark.parametrize("names", MIXES, ids="+".join)
def test_an_error_while_mixing_leaves_the_global_generator_alone(names: list[str]) -> None:
    before = torch.get_rng_state()
    with pytest.raises(ValueError, match="num_classes"):
        mix(pictures(2), torch.tensor([0, 1]), names, seeded(), classes=None)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("names", MIXES, ids="+".join)
def test_mixed_one_hot_targets_are_those_of_class_numbers(names: list[str]) -> None:
    images = pictures(16)
    labels = labels_of(images)
    by_number, by_row = (mix(images, given, names, seeded(), 10) for given in (labels, one_hot(labels, 10)))
    assert torch.equal(by_number[0], by_row[0])
    assert torch.equal(by_number[1], by_row[1])


def test_mixup_adds_what_the_targets_say() -> None:
    images = pictures(8)
    labels = labels_of(images)
    shares = []
    for seed in range(200):
        mixed, targets = mix(images, labels, ["mixup"], seeded(seed), 10)
        own, other = targets[torch.arange(8), labels], targets[torch.arange(8), labels.roll(1)]
        expected = own[:, None, None, None] * images + other[:, None, None, None] * images.roll(1, 0)
        torch.testing.assert_close(mixed, expected, rtol=0, atol=1e-6)
        assert own.unique().numel() == 1  # one share for the batch
        shares.append(float(own[0]))
    assert abs(np.mean(shares) - 0.5) < 0.05  # Beta(1, 1) is even
    assert abs(np.mean(np.array(shares) < 0.25) - 0.25) < 0.08


def test_cutmix_puts_in_a_rectangle_as_large_as_the_targets_say() -> None:
    images = pictures(8, channels=3)
    labels = labels_of(images)
    others = images.roll(1, 0)
    for seed in range(50):
        mixed, targets = mix(images, labels, ["cutmix"], seeded(seed), 10)
        inside = (mixed != images)[:, 0]
        assert (inside == inside[:1]).all()  # one rectangle for the batch
        assert torch.equal(inside[0], inside[0].any(1)[:, None] & inside[0].any(0)[None, :])
        assert torch.equal(mixed, torch.where(inside[:, None], others, images))
        share = targets[torch.arange(8), labels.roll(1)]
        torch.testing.assert_close(share, inside[0].float().mean().expand(8), rtol=0, atol=1e-6)


def test_both_mixes_take_turns_by_a_coin() -> None:
    images = pictures(4)
    drawn = [mix(images, labels_of(images), ["cutmix", "mixup"], seeded(seed), 10)[0] for seed in range(200)]
    cut = sum(((mixed == images) | (mixed == images.roll(1, 0))).all().item() for mixed in drawn)
    assert 75 < cut < 125


def test_nothing_is_mixed_unasked() -> None:
    images = pictures(4)
    labels = labels_of(images)
    mixed, targets = mix(images, labels, ["crop", "color"], seeded(), None)
    assert mixed is images
    assert targets is labels
