"""Annotate stage: turn original files into image arrays of one shape and a table for each split.

Reads   data/raw/
Writes  data/images/images-00000.npy, ..., data/annotations/{train,val,test,classes}.csv, metrics/rejected.csv
"""

from collections.abc import Collection
from itertools import chain

import numpy as np

from classifier.data.lockfile import locked_md5s, verified
from classifier.pipeline.annotations import Names, csv_cell, write_csv
from classifier.pipeline.errors import printable
from classifier.pipeline.outputs import atomic
from classifier.pipeline.params import load_params
from classifier.pipeline.paths import ANNOTATIONS, IMAGES, LOCK, RAW, REJECTED
from classifier.preparation.preprocessing import (
    LARGEST_REJECTED,
    Recipe,
    common_shape,
    count_files,
    image_names,
    rows_of,
    write_images,
)
from classifier.preparation.splits import (
    assign_splits,
    check_classes,
    check_labels,
    class_sizes,
    find_duplicates,
    group_numbers,
)
from classifier.preparation.workers import start_workers
from classifier.sources import LabelledImages, load_source


def main() -> None:
    params = load_params()
    source = load_source(params.source)
    raw = verified(RAW, locked_md5s(LOCK))
    classes = source.class_names(raw)
    data: dict[str, LabelledImages] = source.read(raw)
    for split, of_split in data.items():
        check_labels(split, of_split, len(classes))
    labels = np.concatenate([of_split.labels for of_split in data.values()])
    names = Names(chain.from_iterable(image_names(split, of_split) for split, of_split in data.items()))
    groups = group_numbers(names, params.group) if params.group else None

    def split_rows(rejected: Collection[int]) -> dict[str, np.ndarray]:
        given = {split: np.setdiff1d(rows, [*rejected]) for split, rows in rows_of(data).items()}
        splits = assign_splits(
            given, labels, classes, val_size=params.val_size, test_size=params.test_size, seed=params.split_seed,
            groups=groups, folds=params.folds, fold=params.fold,
        )  # fmt: skip
        check_classes(labels[splits["train"]], classes)
        return splits

    splits = split_rows([])  # before the images are decoded: impossible sizes are reported at once
    with start_workers(count_files(data), params.cluster) as pool:
        shape = common_shape(pool, data, params.stored_sides, params.channels, params.intensity)
        recipe = Recipe(shape, params.fit, params.background_rgb, params.intensity)
        with atomic(IMAGES) as folder:
            folder.mkdir()
            allowed = LARGEST_REJECTED if params.on_bad_image == "skip" else 0
            sha256, faults = write_images(pool, data, recipe, folder, allowed)
    if faults:
        splits = split_rows(faults)
        print(f"unusable images, left out and listed in {REJECTED}: {len(faults):,}")
    with atomic(REJECTED) as path:
        unusable = [csv_cell(names[row]) for row in sorted(faults)]
        write_csv(path, {"file": unusable, "reason": [csv_cell(faults[row]) for row in sorted(faults)]})

    # An image keeps its row whichever split it is in, so the arrays do not depend on how the splits are cut
    with atomic(ANNOTATIONS) as folder:
        folder.mkdir()
        for split, rows in splits.items():
            files = Names(names[row] for row in rows)
            write_csv(folder / f"{split}.csv", {"file": files, "label": labels[rows], "row": rows})
        write_csv(folder / "classes.csv", {"label": range(len(classes)), "name": classes})

    counts = ", ".join(f"{len(rows):,} {split}" for split, rows in splits.items())
    print(f"{counts} images in {len(classes)} classes, each {' x '.join(map(str, shape))} (channels x height x width)")
    print(printable(class_sizes(labels[splits["train"]], classes)))
    for line in find_duplicates(sha256, splits, labels, names, classes).lines():
        print(printable(line), flush=True)
