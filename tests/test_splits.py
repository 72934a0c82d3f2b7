"""Checks of labelled images, the validation split, and the counts of the real data."""

from pathlib import Path

import numpy as np
import pytest

from classifier.errors import PipelineError
from classifier.sources import LabelledImages, fashion_mnist
from classifier.splits import check_classes, check_split, count_duplicates, hold_out

BALANCED = np.repeat(np.arange(10), 30)
SKEWED = np.repeat(np.arange(3), [100, 50, 10])


def labelled(count: int, seed: int = 0) -> LabelledImages:
    generator = np.random.default_rng(seed)
    return LabelledImages(generator.integers(0, 256, (count, 4, 4), dtype=np.uint8), np.arange(count) % 10)


@pytest.mark.parametrize(("val_size", "count"), [(50, 50), (0.2, 60), (0.1, 30), (0, 0), (0.0, 0), (290, 290)])
def test_val_size_is_a_count_or_a_fraction(val_size: int | float, count: int) -> None:
    held_out = hold_out(BALANCED, val_size, seed=42)
    assert held_out.dtype == bool
    assert held_out.shape == BALANCED.shape
    assert held_out.sum() == count
    assert set(np.bincount(BALANCED[held_out], minlength=10)) == {count // 10}


def test_split_keeps_the_shares_of_the_classes() -> None:
    assert np.bincount(SKEWED[hold_out(SKEWED, 0.2, seed=1)]).tolist() == [20, 10, 2]


def test_split_is_a_function_of_the_seed() -> None:
    first, again, other = (hold_out(BALANCED, 50, seed) for seed in (1, 1, 2))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


def test_split_is_pinned() -> None:
    """Another version of scikit-learn that drew other images would change everyone's validation figures."""
    assert np.flatnonzero(hold_out(BALANCED, 10, seed=42)).tolist() == [6, 39, 66, 110, 126, 175, 207, 226, 266, 278]


@pytest.mark.parametrize("val_size", [300, 301, 295, 5, 0.01, 0.999])
def test_impossible_val_size(val_size: int | float) -> None:
    with pytest.raises(PipelineError, match=f"val_size: {val_size} images"):
        hold_out(BALANCED, val_size, seed=0)


def test_class_with_a_single_image() -> None:
    with pytest.raises(PipelineError, match="val_size: 5 images cannot be held out of 31"):
        hold_out(np.array([0] * 30 + [1]), 5, seed=0)


def test_split_never_takes_all_training_images_of_a_class() -> None:
    with pytest.raises(PipelineError, match=r"leave no training image of class \[1\]"):
        hold_out(np.array([0] * 998 + [1] * 2), 990, seed=0)


def test_duplicates_are_counted_in_pairs() -> None:
    a, b, c, d = labelled(4).images
    train = LabelledImages(np.stack([a, b, a, a, c]), np.zeros(5, np.int64))
    test = LabelledImages(np.stack([a, b, b, d]), np.ones(4, np.int64))
    # a thrice in train: 3 pairs; b twice in test: 1; across: a 3 x 1, b 1 x 2
    assert count_duplicates(train, test) == (3, 1, 5)
    assert count_duplicates(labelled(50, seed=1), labelled(50, seed=2)) == (0, 0, 0)


def test_same_bytes_in_another_shape_are_no_duplicate() -> None:
    image = np.zeros((4, 6), np.uint8)
    data = [LabelledImages([image.reshape(shape)], np.zeros(1, np.int64)) for shape in ((4, 6), (6, 4))]
    assert count_duplicates(*data) == (0, 0, 0)


def test_right_split_passes() -> None:
    check_split("train", labelled(20), classes=10, train=labelled(20))
    check_split("test", labelled(3), classes=10, train=labelled(20))
    check_classes(labelled(20).labels, fashion_mnist.CLASS_NAMES)


@pytest.mark.parametrize(
    ("data", "complaint"),
    [
        (LabelledImages(labelled(5).images, np.arange(4)), "train: 5 images, but 4 labels"),
        (LabelledImages([], np.arange(0)), "train: no images"),
        (labelled(5)._replace(labels=np.array([0, 1, 10, 3, -1])), r"2 labels .* 0\.\.9: images 2 \(label 10\), 4 \(l"),
        (labelled(50)._replace(labels=np.full(50, 77)), "train: 50 labels are not in 0..9"),
        (
            LabelledImages([np.zeros((4, 4), np.uint8), np.zeros((4, 4, 3), np.uint8)], np.zeros(2, np.int64)),
            r"train: 1 images have another shape than the first, \(4, 4\), or .*: images 1 \(4, 4, 3\) uint8$",
        ),
        (
            labelled(5)._replace(images=np.full((5, 4, 4), 300, np.uint16)),
            r"5 images have .* pixels that are not uint8: images 0 \(4, 4\) uint16, 1 ",
        ),
        (labelled(5)._replace(labels=np.full(5, np.nan)), "train: labels are float64, not whole numbers"),
        *(
            (LabelledImages(np.zeros((2, *shape), np.uint8), np.zeros(2, np.int64)), "image 0 has shape .* not .height")
            for shape in [(0, 4), (4, 0, 3), (4, 4, 2), (4,), (4, 4, 3, 3)]
        ),
    ],
    ids=str,
)
def test_wrong_split_is_named(data: LabelledImages, complaint: str) -> None:
    with pytest.raises(PipelineError, match=complaint):
        check_split("train", data, classes=10, train=data)


def test_test_images_have_the_shape_of_the_training_images() -> None:
    other = LabelledImages([np.zeros((4, 6, 3), np.uint8)], np.zeros(1, np.int64))
    with pytest.raises(PipelineError, match=r"test: 1 images have another shape .*: images 0 \(4, 6, 3\) uint8"):
        check_split("test", other, classes=10, train=labelled(5))


def test_all_images_of_another_shape_are_counted_and_twenty_listed() -> None:
    mixed = [np.zeros((4, 4 if index % 2 == 0 else 5), np.uint8) for index in range(100)]
    data = LabelledImages(mixed, np.zeros(100, np.int64))
    with pytest.raises(
        PipelineError, match=r"train: 50 images .*: images 1 \(4, 5\) uint8, 3 \(4, 5\) uint8, "
    ) as caught:
        check_split("train", data, classes=10, train=data)
    assert str(caught.value).count("(4, 5)") == 20


def test_class_without_images_is_named() -> None:
    with pytest.raises(PipelineError, match=r"train: no image of class 1 \(boot\), 3 \(hat\)"):
        check_classes(np.array([0, 2, 2]), ["bag", "boot", "coat", "hat"])


def test_counts_of_fashion_mnist(fashion_mnist_dir: Path) -> None:
    """The copy published since 31 August 2017 has the ten train/test duplicates of issue 44 replaced."""
    splits = fashion_mnist.read(fashion_mnist_dir)
    train, test = splits["train"], splits["test"]
    for split, data in splits.items():
        check_split(split, data, classes=10, train=train)
    assert np.asarray(train.images).shape == (60_000, 28, 28)
    assert np.asarray(test.images).shape == (10_000, 28, 28)
    assert np.bincount(train.labels).tolist() == [6000] * 10
    assert np.bincount(test.labels).tolist() == [1000] * 10
    held_out = hold_out(train.labels, 5000, seed=42)
    assert np.bincount(train.labels[held_out]).tolist() == [500] * 10
    assert np.bincount(train.labels[~held_out]).tolist() == [5500] * 10
    assert count_duplicates(train, test) == (0, 0, 0)
