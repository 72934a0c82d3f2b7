"""Labelled images of a source before they are written: the checks, the splits, and duplicates."""

import re
import warnings
from collections import defaultdict
from collections.abc import Mapping, Sequence
from itertools import combinations, islice
from typing import NamedTuple

import numpy as np

from classifier.pipeline.annotations import LISTED_FAULTS, repeated
from classifier.pipeline.errors import PipelineError
from classifier.sources import LabelledImages

RARE_FACTOR = 3  # by which the largest class is larger than the smallest before that is told
SHOWN_GROUPS = 5  # of duplicates
LARGEST_SHARE = 5  # a count of images to hold out takes at most one in so many: the default is made for 60,000


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
    rows: Mapping[str, np.ndarray],
    labels: np.ndarray,
    names: Sequence[str],
    *,
    val_size: int | float,
    test_size: int | float,
    seed: int,
    groups: np.ndarray | None = None,
    folds: int = 0,
    fold: int = 0,
) -> dict[str, np.ndarray]:
    """Return the rows of train, val and test: those that the source has for them, else some held out of its train.

    rows: (n,) int64 by split of the source, "train" at least. labels: (N,) int64 of all rows. names: of the classes.
    val_size, test_size: counts, or fractions; of a count, at most one in LARGEST_SHARE is taken. Test is held out
    first, so that it does not depend on the others. groups: (N,) int64; a group never spans two splits. folds: instead
    of `val_size`, val is the `fold`-th of so many equal parts of train and val.
    Raises PipelineError as `hold_out` does, if no test image is left, and for groups that the source has in two splits.
    """
    rest = np.sort(np.concatenate([rows["train"], *([rows["val"]] if folds and "val" in rows else [])]))
    splits = {split: rows[split] for split in ("val", "test") if split in rows and not (folds and split == "val")}
    for split, key, size in [("test", "test_size", test_size), ("val", "val_size", val_size)]:
        if split in splits:
            continue
        of_rest = None if groups is None else groups[rest]
        if split == "val" and folds:
            held_out = fold_mask(labels[rest], folds, fold, seed, of_rest)
        else:
            if isinstance(size, int) and size > len(rest) // LARGEST_SHARE:
                print(f"{key}: of {len(rest):,} images, a fifth is held out and not {size:,}", flush=True)
                size = len(rest) // LARGEST_SHARE
            held_out = hold_out(labels[rest], names, size, seed, key, of_rest)
        splits[split] = rest[held_out]
        rest = rest[~held_out]
    if len(splits["test"]) == 0:
        raise PipelineError(f"test_size: {test_size} leaves no image to test on; the source has no test split")
    splits = {"train": rest, "val": splits["val"], "test": splits["test"]}
    if groups is not None:
        for one, other in combinations(splits, 2):
            if len(shared := np.intersect1d(groups[splits[one]], groups[splits[other]])):
                raise PipelineError(
                    f"group: {len(shared)} groups are in both {one} and {other}, as the data has its own splits; give "
                    "each group one split, or set group: to empty"
                )
    return splits


def find_duplicates(
    sha256: np.ndarray,
    splits: Mapping[str, np.ndarray],
    labels: np.ndarray,
    names: Sequence[str],
    classes: Sequence[str],
) -> Duplicates:
    """Find the images whose pixels are the same.

    sha256: of the pixels of all rows, (N,) V32. splits: rows, (n,) int64 by split. labels: (N,) int64; names: of the N
    images. classes: the names of the classes.
    """
    again = repeated(bytes(digest) for rows in splits.values() for digest in sha256[rows])
    seen: dict[bytes, list[tuple[str, int]]] = defaultdict(list)
    for split, rows in splits.items():
        for row, digest in zip(rows.tolist(), sha256[rows], strict=True):
            if hash(bytes(digest)) in again:
                seen[bytes(digest)].append((split, row))
    within = across = 0
    in_several_splits, in_several_classes = [], []
    for places in seen.values():
        if len(places) == 1:
            continue
        counts = [sum(split == other for other, _ in places) for split in splits]
        pairs = len(places) * (len(places) - 1) // 2
        same_split = sum(count * (count - 1) // 2 for count in counts)
        within += same_split
        across += pairs - same_split
        if pairs > same_split:
            in_several_splits.append([f"{names[row]} ({split})" for split, row in places])
        if len({int(labels[row]) for _, row in places}) > 1:
            in_several_classes.append([f"{names[row]} ({classes[labels[row]]})" for _, row in places])
    return Duplicates(within, across, in_several_splits, in_several_classes)


def hold_out(
    labels: np.ndarray, names: Sequence[str], size: int | float, seed: int, key: str, groups: np.ndarray | None = None
) -> np.ndarray:
    """Choose images to hold out of training: a mask over the training images, stratified by class.

    labels: (N,) int64. names: of the classes, by label. size: a count of images, or a fraction of N. key: its name in
    params.yaml. groups: (N,) int64, of which each is held out whole, so that the size is met only about.
    Returns (N,) bool, True for those held out. Raises PipelineError if that cannot be stratified, or would leave
    no training image of a class; a rare class may be missing from the images held out.
    """
    count = round(size * len(labels)) if isinstance(size, float) else size
    held_out = np.zeros(len(labels), bool)
    if size and count == 0:
        raise PipelineError(f"{key}: {size} of {len(labels)} images is none; 0 holds out none")
    if count == 0:
        return held_out
    if groups is not None:
        held_out = fold_mask(labels, max(2, round(len(labels) / count)), 0, seed, groups)
    else:
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
        raise PipelineError(f"{key}: {held_out.sum()} images of {len(labels)} leave no training image of class {told}")
    return held_out


def fold_mask(labels: np.ndarray, folds: int, fold: int, seed: int, groups: np.ndarray | None = None) -> np.ndarray:
    """Choose the `fold`-th of `folds` parts of the images, stratified by class: (N,) bool.

    labels, groups: (N,) int64. The parts of all folds are disjoint, and a group is in one of them.
    Raises PipelineError if there are fewer images, or groups, than folds.
    """
    from sklearn.model_selection import StratifiedGroupKFold, StratifiedKFold

    parts = len(labels) if groups is None else len(np.unique(groups))
    if parts < folds:
        what = "images" if groups is None else "groups"
        raise PipelineError(f"{parts} {what} cannot be divided into {folds} parts; give more, or larger or fewer parts")
    kind = StratifiedKFold if groups is None else StratifiedGroupKFold
    with warnings.catch_warnings(action="ignore"):  # of classes with fewer images than folds
        divided = kind(folds, shuffle=True, random_state=seed).split(np.zeros(len(labels)), labels, groups)
        _, chosen = next(islice(divided, fold, None))
    mask = np.zeros(len(labels), bool)
    mask[chosen] = True
    return mask


def group_numbers(names: Sequence[str], pattern: str) -> np.ndarray:
    """Return the number of each image's group, (N,) int64, by what the pattern finds in its name.

    pattern: a regular expression; the group is what its part called `group` holds, or its first part, or all of it.
    Raises PipelineError that lists names in which it finds nothing.
    """
    search = re.compile(pattern)
    key: str | int = "group" if "group" in search.groupindex else min(search.groups, 1)
    known: dict[str, int] = {}
    numbers = np.empty(len(names), np.int64)
    without = []
    for place, name in enumerate(names):
        if (found := search.search(name)) and found[key] is not None:
            numbers[place] = known.setdefault(found[key], len(known))
        else:
            without.append(name)
    if without:
        raise PipelineError(
            f"group: {pattern} is not in {len(without)} of {len(names)} names: {', '.join(without[:LISTED_FAULTS])}"
        )
    return numbers
