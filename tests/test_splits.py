"""Checks of labelled images, the validation split, and the counts of the real data."""

import hashlib
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from classifier.pipeline.errors import PipelineError
from classifier.preparation.splits import (
    Duplicates,
    assign_splits,
    check_classes,
    check_labels,
    class_sizes,
    find_duplicates,
    group_numbers,
    hold_out,
)
from classifier.sources import LabelledImages, fashion_mnist

NAMES = [f"class {label}" for label in range(10)]
BALANCED = np.repeat(np.arange(10), 30)
SKEWED = np.repeat(np.arange(3), [100, 50, 10])


def labelled(count: int, seed: int = 0) -> LabelledImages:
    generator = np.random.default_rng(seed)
    return LabelledImages(generator.integers(0, 256, (count, 4, 4), dtype=np.uint8), np.arange(count) % 10)


@pytest.mark.parametrize(("val_size", "count"), [(50, 50), (0.2, 60), (0.1, 30), (0, 0), (0.0, 0), (290, 290)])
def test_val_size_is_a_count_or_a_fraction(val_size: int | float, count: int) -> None:
    held_out = hold_out(BALANCED, NAMES, val_size, seed=42, key="val_size")
    assert held_out.dtype == bool
    assert held_out.shape == BALANCED.shape
    assert held_out.sum() == count
    assert set(np.bincount(BALANCED[held_out], minlength=10)) == {count // 10}


def test_split_keeps_the_shares_of_the_classes() -> None:
    assert np.bincount(SKEWED[hold_out(SKEWED, NAMES, 0.2, seed=1, key="val_size")]).tolist() == [20, 10, 2]


def test_split_is_a_function_of_the_seed() -> None:
    first, again, other = (hold_out(BALANCED, NAMES, 50, seed, "val_size") for seed in (1, 1, 2))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


def test_split_is_pinned() -> None:
    """Another version of scikit-learn that drew other images would change everyone's validation figures."""
    assert np.flatnonzero(hold_out(BALANCED, NAMES, 10, seed=42, key="val_size")).tolist() == [
        6,
        39,
        66,
        110,
        126,
        175,
        207,
        226,
        266,
        278,
    ]


@pytest.mark.parametrize("val_size", [300, 301, 295, 5, 0.01, 0.999])
def test_impossible_val_size(val_size: int | float) -> None:
    count = round(300 * val_size) if isinstance(val_size, float) else val_size
    with pytest.raises(PipelineError, match=f"val_size: {count} images"):
        hold_out(BALANCED, NAMES, val_size, seed=0, key="val_size")


def test_a_fraction_that_is_not_one_image() -> None:
    with pytest.raises(PipelineError, match=r"val_size: 0\.001 of 300 images is none; 0 holds out none"):
        hold_out(BALANCED, NAMES, 0.001, seed=0, key="val_size")


def test_class_with_a_single_image() -> None:
    with pytest.raises(
        PipelineError, match=r"val_size: 5 images cannot be held out of 31: there is only one image of class boot"
    ):
        hold_out(np.array([0] * 30 + [1]), ["hat", "boot"], 5, seed=0, key="val_size")


def test_split_never_takes_all_training_images_of_a_class() -> None:
    with pytest.raises(PipelineError, match=r"leave no training image of class boot"):
        hold_out(np.array([0] * 998 + [1] * 2), ["hat", "boot"], 990, seed=0, key="val_size")


def duplicates(**splits: list[tuple[str, int]]) -> Duplicates:
    """Of images given as pixels and label, by split."""
    digests = np.array([pixels.encode() for images in splits.values() for pixels, _ in images]).astype("V1")
    labels = np.array([label for images in splits.values() for _, label in images])
    names = [f"{split}/{index}" for split, images in splits.items() for index in range(len(images))]
    ends = np.cumsum([0, *map(len, splits.values())])
    rows = {split: np.arange(start, end) for split, (start, end) in zip(splits, pairwise(ends), strict=True)}
    return find_duplicates(digests, rows, labels, names, ["hat", "bag", "coat", "shoe"])


def test_duplicates_are_counted_in_pairs() -> None:
    found = duplicates(
        train=[("a", 0), ("b", 1), ("a", 0), ("a", 0), ("c", 2)], val=[("d", 3)], test=[("a", 0), ("b", 1), ("b", 1)]
    )
    # a thrice in train: 3 pairs; b twice in test: 1; across: a 3 x 1, b 1 x 2
    assert (found.within, found.across, found.in_several_classes) == (4, 5, [])
    assert found.in_several_splits == [
        ["train/0 (train)", "train/2 (train)", "train/3 (train)", "test/0 (test)"],
        ["train/1 (train)", "test/1 (test)", "test/2 (test)"],
    ]


def test_duplicates_of_several_classes_are_counted() -> None:
    found = duplicates(train=[("a", 0), ("a", 1), ("b", 0), ("b", 0)], test=[("c", 1)])
    assert found == (2, 0, [], [["train/0 (hat)", "train/1 (bag)"]])


def test_without_duplicates_there_are_none() -> None:
    assert duplicates(train=[("a", 0), ("b", 0)], val=[("c", 0)], test=[("d", 0)]) == (0, 0, [], [])


def test_right_labels_pass() -> None:
    check_labels("train", labelled(20), classes=10)
    check_classes(labelled(20).labels, fashion_mnist.CLASS_NAMES)


@pytest.mark.parametrize(
    ("data", "complaint"),
    [
        (LabelledImages(labelled(5).images, np.arange(4)), "train: 5 images, but 4 labels"),
        (LabelledImages([], np.arange(0)), "train: no images"),
        (labelled(5)._replace(labels=np.array([0, 1, 10, 3, -1])), r"2 labels .* 0\.\.9: images 2 \(label 10\), 4 \(l"),
        (labelled(50)._replace(labels=np.full(50, 77)), r"train: 50 labels are not in 0\.\.9"),
        (labelled(5)._replace(labels=np.full(5, np.nan)), "train: labels are float64, not whole numbers"),
    ],
    ids=str,
)
def test_wrong_labels_are_named(data: LabelledImages, complaint: str) -> None:
    with pytest.raises(PipelineError, match=complaint):
        check_labels("train", data, classes=10)


def test_class_without_images_is_named() -> None:
    with pytest.raises(PipelineError, match=r"train: no image of class 1 \(boot\), 3 \(hat\)"):
        check_classes(np.array([0, 2, 2]), ["bag", "boot", "coat", "hat"])


# The splits


def assign(
    labels: dict[str, np.ndarray], val_size: int | float, test_size: int | float, seed: int = 42, **more: Any
) -> dict[str, np.ndarray]:
    """The rows of the splits, where those of the source follow each other."""
    ends = np.cumsum([0, *map(len, labels.values())])
    rows = {split: np.arange(start, end) for split, (start, end) in zip(labels, pairwise(ends), strict=True)}
    everything = np.concatenate(list(labels.values()))
    return assign_splits(rows, everything, NAMES, val_size=val_size, test_size=test_size, seed=seed, **more)


def sizes(val_size: int | float, test_size: int | float, **labels: np.ndarray) -> dict[str, tuple[str, int]]:
    """Where the source has the images of each split, and how many they are."""
    origins = np.repeat(list(labels), list(map(len, labels.values())))
    splits = assign(labels, val_size, test_size)
    return {split: (",".join(np.unique(origins[rows])) or "train", len(rows)) for split, rows in splits.items()}


def test_splits_that_the_source_has_are_taken_and_the_others_cut_from_train() -> None:
    few = np.arange(10)
    assert sizes(0.1, 0.2, train=BALANCED) == {"train": ("train", 216), "val": ("train", 24), "test": ("train", 60)}
    assert sizes(0.1, 0.2, train=BALANCED, test=few) == {
        "train": ("train", 270), "val": ("train", 30), "test": ("test", 10),
    }  # fmt: skip
    assert sizes(0.1, 0.2, train=BALANCED, val=few) == {
        "train": ("train", 240), "val": ("val", 10), "test": ("train", 60),
    }  # fmt: skip
    assert sizes(0.1, 0.2, train=BALANCED, val=few, test=few)["train"] == ("train", 300)
    assert sizes(0, 0.2, train=BALANCED)["val"] == ("train", 0)


def test_no_image_is_in_two_splits_and_none_is_lost() -> None:
    splits = assign({"train": BALANCED}, 0.1, 0.2)
    assert sorted(np.concatenate(list(splits.values())).tolist()) == list(range(300))
    for split, count in {"train": 216, "val": 24, "test": 60}.items():
        assert np.bincount(BALANCED[splits[split]]).tolist() == pytest.approx([count / 10] * 10, abs=1)


def test_the_test_images_do_not_depend_on_val_size() -> None:
    tests = [assign({"train": BALANCED}, val_size, 0.2)["test"] for val_size in (0, 0.1, 60)]
    assert np.array_equal(tests[0], tests[1])
    assert np.array_equal(tests[0], tests[2])


GROUPS = np.arange(300) % 60  # five images each, of several classes


def test_a_group_is_in_one_split() -> None:
    splits = assign({"train": BALANCED}, 0.1, 0.2, groups=GROUPS)
    assert sorted(np.concatenate(list(splits.values())).tolist()) == list(range(300))
    members = [set(GROUPS[rows]) for rows in splits.values()]
    assert not any(one & other for one, other in combinations(members, 2))
    assert [len(rows) for rows in splits.values()] == pytest.approx([216, 24, 60], abs=6)
    assert np.bincount(BALANCED[splits["test"]]).tolist() == pytest.approx([6] * 10, abs=3)
    again = assign({"train": BALANCED}, 0.1, 0.2, groups=GROUPS)
    assert all(np.array_equal(splits[split], again[split]) for split in splits)


def test_a_group_that_the_data_has_in_two_splits_is_refused() -> None:
    groups = np.concatenate([GROUPS, [7] * 10])
    with pytest.raises(
        PipelineError, match=r"group: 1 groups are in both (train|val) and test, as the data has its own"
    ):
        assign({"train": BALANCED, "test": np.arange(10)}, 0.1, 0.2, groups=groups)


def test_fewer_groups_than_parts_are_refused() -> None:
    with pytest.raises(PipelineError, match="4 groups cannot be divided into 5 parts"):
        assign({"train": BALANCED}, 0.1, 0.2, groups=GROUPS % 4)


@pytest.mark.parametrize("groups", [None, GROUPS])
def test_the_folds_share_the_training_images_and_leave_the_test_alone(groups: np.ndarray | None) -> None:
    folds = [assign({"train": BALANCED}, 0.1, 0.2, groups=groups, folds=5, fold=fold) for fold in range(5)]
    assert all(np.array_equal(splits["test"], folds[0]["test"]) for splits in folds)
    held_out = np.concatenate([splits["val"] for splits in folds])
    assert len(held_out) == len(set(held_out.tolist())) == 300 - len(folds[0]["test"])
    for splits in folds:
        assert sorted(np.concatenate(list(splits.values())).tolist()) == list(range(300))
        assert np.bincount(BALANCED[splits["val"]], minlength=10).tolist() == pytest.approx([5] * 10, abs=4)


def test_folds_take_validation_images_of_the_source_for_training_too() -> None:
    splits = assign({"train": BALANCED, "val": np.arange(10), "test": np.arange(10)}, 0.1, 0.2, folds=2, fold=1)
    assert sorted(np.concatenate([splits["train"], splits["val"]]).tolist()) == list(range(310))
    assert splits["test"].tolist() == list(range(310, 320))


def test_groups_are_found_in_names() -> None:
    names = ["a/p1_1.jpg", "a/p2_1.jpg", "b/p1_2.jpg"]
    for pattern in (r"p\d+", r"/(p\d+)_", r"(?P<other>[ab])/(?P<group>p\d+)"):
        assert group_numbers(names, pattern).tolist() == [0, 1, 0]
    with pytest.raises(PipelineError, match=r"group: p\(1\) is not in 1 of 3 names: a/p2_1\.jpg"):
        group_numbers(names, "p(1)")


def test_of_a_count_at_most_a_fifth_is_taken_and_that_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    assert sizes(48, 60, train=BALANCED) == {"train": ("train", 192), "val": ("train", 48), "test": ("train", 60)}
    assert capsys.readouterr().out == ""
    assert sizes(5000, 61, train=BALANCED)["val"] == ("train", 48)
    assert capsys.readouterr().out == (
        "test_size: of 300 images, a fifth is held out and not 61\n"
        "val_size: of 240 images, a fifth is held out and not 5,000\n"
    )


def test_without_test_images_nothing_can_be_evaluated() -> None:
    with pytest.raises(PipelineError, match="test_size: 0 leaves no image to test on"):
        sizes(0.1, 0, train=BALANCED)


def test_counts_of_fashion_mnist(fashion_mnist_dir: Path) -> None:
    """The copy published since 31 August 2017 has the ten train/test duplicates of issue 44 replaced."""
    splits = fashion_mnist.read(fashion_mnist_dir)
    train, test = splits["train"], splits["test"]
    for split, data in splits.items():
        check_labels(split, data, classes=10)
    assert np.asarray(train.images).shape == (60_000, 28, 28)
    assert np.asarray(test.images).shape == (10_000, 28, 28)
    assert np.bincount(train.labels).tolist() == [6000] * 10
    assert np.bincount(test.labels).tolist() == [1000] * 10
    held_out = hold_out(train.labels, NAMES, 5000, seed=42, key="val_size")
    assert np.bincount(train.labels[held_out]).tolist() == [500] * 10
    assert np.bincount(train.labels[~held_out]).tolist() == [5500] * 10
    images = [image.tobytes() for data in splits.values() for image in np.asarray(data.images)]
    digests = np.array([hashlib.sha256(image).digest() for image in images]).astype("V32")
    rows = {"train": np.arange(60_000), "test": np.arange(60_000, 70_000)}
    labels = np.concatenate([train.labels, test.labels])
    assert find_duplicates(digests, rows, labels, [""] * 70_000, NAMES) == (0, 0, [], [])


@pytest.mark.parametrize(
    ("counts", "told"),
    [
        ([40, 40], "training images of each class: 40"),
        ([3000, 1500], "training images by class: 1,500 (dog) to 3,000 (cat)"),
        ([3, 10], "training images by class: 3 (cat) to 10 (dog); balance in params.yaml can make up for it"),
    ],
)
def test_the_sizes_of_the_classes_are_told(counts: list[int], told: str) -> None:
    assert class_sizes(np.repeat([0, 1], counts), ["cat", "dog"]) == told
