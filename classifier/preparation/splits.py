"""Labelled images of a source before they are written: the checks, the splits, and duplicates."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from classifier.pipeline.annotations import LISTED_FAULTS, repeated
from classifier.pipeline.errors import PipelineError
from classifier.sources import LabelledImages

RARE_FACTOR = 3  # by which the largest class is larger than the smallest before that is told
SHOWN_GROUPS = 5  # of duplicates
LARGEST_SHARE = 5  # a count of images to hold out takes at most one in so many: the default is made for 60,000


class Share(NamedTuple):
    """Images of one of the source's splits: which, by their places there."""

    origin: str
    indices: np.ndarray  # (n,) int64


class Duplicates(NamedTuple):
    """Pairs of images with the same pixels, within one split and in two, and groups of such images.

    In the groups, the name of an image has that of its split behind it, or of its class.
    """

    within: int
    across: int
    in_several_splits: list[list[str]]
    in_several_classes: list[list[str]]

    def lines(self) -> list[str]:
        """How many duplicates there are, and which leak across splits or carry conflicting labels."""
        lines = [f"same pixels: {self.within} pairs within a split, {self.across} across splits"]
        for what, groups in [("splits", self.in_several_splits), ("classes", self.in_several_classes)]:
            lines += [f"  in several {what}: {' = '.join(group)}" for group in groups[:SHOWN_GROUPS]]
            if len(groups) > SHOWN_GROUPS:
                lines.append(f"  in several {what}: {len(groups) - SHOWN_GROUPS} more")
        return lines


def check_labels(split: str, data: LabelledImages, classes: int) -> None:
    """Raise PipelineError unless every image of a split has a label, a whole number in 0..classes-1.

    The first twenty images at fault are listed, with their count.
    """
    if len(data.images) != len(data.labels):
        raise PipelineError(f"{split}: {len(data.images)} images, but {len(data.labels)} labels")
    if len(data.images) == 0:
        raise PipelineError(f"{split}: no images")
    if not np.issubdtype(data.labels.dtype, np.integer):
        raise PipelineError(f"{split}: labels are {data.labels.dtype}, not whole numbers")
    wrong = np.flatnonzero((data.labels < 0) | (data.labels >= classes))
    if wrong.size:
        rows = ", ".join(f"{row} (label {data.labels[row]})" for row in wrong[:LISTED_FAULTS])
        raise PipelineError(f"{split}: {wrong.size} labels are not in 0..{classes - 1}: images {rows}")


def class_sizes(labels: np.ndarray, names: Sequence[str]) -> str:
    """What is said of the (N,) labels of the training images: how many each class has, and if some have few."""
    counts = np.bincount(labels, minlength=len(names))
    least, most = int(counts.argmin()), int(counts.argmax())
    if counts[least] == counts[most]:
        return f"training images of each class: {counts[most]:,}"
    told = f"training images by class: {counts[least]:,} ({names[least]}) to {counts[most]:,} ({names[most]})"
    unlike = counts[most] > RARE_FACTOR * counts[least]
    return told + ("; balance in params.yaml can make up for it" if unlike else "")


def check_classes(labels: np.ndarray, names: list[str]) -> None:
    """Raise PipelineError if a class has no training image: it could not be learnt."""
    absent = sorted(set(range(len(names))) - set(labels.tolist()))
    if absent:
        raise PipelineError(f"train: no image of class {', '.join(f'{label} ({names[label]})' for label in absent)}")


def assign_splits(
    labels: Mapping[str, np.ndarray], names: Sequence[str], val_size: int | float, test_size: int | float, seed: int
) -> dict[str, Share]:
    """Which images train, val and test consist of: those that the source has for it, else some cut from its train.

    labels: (N,) int64 by split of the source, "train" at least. names: of the classes, by label. val_size, test_size:
    counts, or fractions; of a count, at most one in LARGEST_SHARE is taken. Test is cut first, so that it does not
    depend on val_size. Raises PipelineError as `hold_out` does, and if no test image is left.
    """
    of_class = labels["train"]
    rest = np.arange(len(of_class))
    shares = {split: Share(split, np.arange(len(labels[split]))) for split in ("val", "test") if split in labels}
    for split, key, size in [("test", "test_size", test_size), ("val", "val_size", val_size)]:
        if split not in shares:
            if isinstance(size, int) and size > len(rest) // LARGEST_SHARE:
                print(f"{key}: of {len(rest):,} images, a fifth is held out and not {size:,}", flush=True)
                size = len(rest) // LARGEST_SHARE
            held_out = hold_out(of_class[rest], names, size, seed, key)
            shares[split] = Share("train", rest[held_out])
            rest = rest[~held_out]
    if len(shares["test"].indices) == 0:
        raise PipelineError(f"test_size: {test_size} leaves no image to test on; the source has no test split")
    return {"train": Share("train", rest), "val": shares["val"], "test": shares["test"]}


def find_duplicates(
    digests: Mapping[str, Sequence[bytes] | np.ndarray],
    labels: Mapping[str, np.ndarray],
    names: Mapping[str, Sequence[str]],
    classes: Sequence[str],
) -> Duplicates:
    """Find the images whose pixels are the same.

    By split: digests of the images' pixels, as bytes objects or (N,) of a dtype of bytes such as V32, their labels
    (N,) int64, and their names. classes: the names of the classes.
    """
    again = repeated(bytes(digest) for of_split in digests.values() for digest in of_split)
    seen: dict[bytes, list[tuple[str, int]]] = defaultdict(list)
    for split, of_split in digests.items():
        for index, digest in enumerate(of_split):
            if hash(bytes(digest)) in again:
                seen[bytes(digest)].append((split, index))
    within = across = 0
    in_several_splits, in_several_classes = [], []
    for places in seen.values():
        if len(places) == 1:
            continue
        counts = [sum(split == other for other, _ in places) for split in digests]
        pairs = len(places) * (len(places) - 1) // 2
        same_split = sum(count * (count - 1) // 2 for count in counts)
        within += same_split
        across += pairs - same_split
        if pairs > same_split:
            in_several_splits.append([f"{names[split][index]} ({split})" for split, index in places])
        if len({int(labels[split][index]) for split, index in places}) > 1:
            of_class = [f"{names[split][index]} ({classes[labels[split][index]]})" for split, index in places]
            in_several_classes.append(of_class)
    return Duplicates(within, across, in_several_splits, in_several_classes)


def hold_out(labels: np.ndarray, names: Sequence[str], size: int | float, seed: int, key: str) -> np.ndarray:
    """Choose images to hold out of training: a mask over the training images, stratified by class.

    labels: (N,) int64. names: of the classes, by label. size: a count of images, or a fraction of N. key: its name in
    params.yaml.
    Returns (N,) bool, True for those held out. Raises PipelineError if that cannot be stratified, or would leave
    no training image of a class; a rare class may be missing from the images held out.
    """
    count = round(size * len(labels)) if isinstance(size, float) else size
    held_out = np.zeros(len(labels), bool)
    if size and count == 0:
        raise PipelineError(f"{key}: {size} of {len(labels)} images is none; 0 holds out none")
    if count == 0:
        return held_out

    from sklearn.model_selection import train_test_split  # a second of import, not needed where nothing is cut

    try:
        _, chosen = train_test_split(np.arange(len(labels)), test_size=count, random_state=seed, stratify=labels)
    except ValueError as error:  # fewer images than classes, or a class with a single image
        single = [names[label] for label, images in enumerate(np.bincount(labels)) if images == 1]
        reason = f"there is only one image of class {', '.join(single)}" if single else str(error)
        raise PipelineError(f"{key}: {count} images cannot be held out of {len(labels)}: {reason}") from None
    held_out[chosen] = True
    if lost := sorted(set(labels.tolist()) - set(labels[~held_out].tolist())):
        told = ", ".join(names[label] for label in lost)
        raise PipelineError(f"{key}: {count} images of {len(labels)} leave no training image of class {told}")
    return held_out
