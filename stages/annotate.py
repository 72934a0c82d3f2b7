"""Annotate stage: original files in, one archive of images and one table per split out.

Reads   data/raw/
Writes  data/images.zip, data/annotations/{train,val,test,classes}.csv
"""

from collections.abc import Iterator

import numpy as np
from tqdm import tqdm

from classifier.annotations import write_csv
from classifier.archive import write_zip
from classifier.errors import run_main
from classifier.files import ANNOTATIONS, IMAGES, RAW, atomic, verified
from classifier.params import load_params
from classifier.png import encode_png
from classifier.sources import LabelledImages, load_source
from classifier.splits import check_classes, check_split, count_duplicates, hold_out


def main() -> None:
    params = load_params()
    source = load_source(params.source)
    splits: dict[str, LabelledImages] = source.read(verified(RAW))
    names = source.class_names(RAW)

    train, test = splits["train"], splits["test"]
    check_split("train", train, len(names), train)
    check_split("test", test, len(names), train)
    check_classes(train.labels, names)
    held_out = hold_out(train.labels, params.val_size, params.seed)

    pairs = count_duplicates(train, test)
    print(f"{len(train.labels):,} training and {len(test.labels):,} test images in {len(names)} classes")
    print(f"{held_out.sum():,} of the training images are held out for validation")
    print(f"same pixels: {pairs.train} pairs within train, {pairs.test} within test, {pairs.across} across the two")

    with atomic(IMAGES) as path:
        write_zip(path, _png_files(splits))
    with atomic(ANNOTATIONS) as folder:
        folder.mkdir()
        # An image keeps its file name whichever split it goes to, so images.zip does not depend on the split.
        for split, origin, rows in [("train", "train", ~held_out), ("val", "train", held_out), ("test", "test", None)]:
            labels = splits[origin].labels
            chosen = np.arange(len(labels)) if rows is None else np.flatnonzero(rows)
            files = [_file_name(origin, index) for index in chosen.tolist()]
            write_csv(folder / f"{split}.csv", {"file": files, "label": labels[chosen]})
        write_csv(folder / "classes.csv", {"label": range(len(names)), "name": names})


def _file_name(split: str, index: int) -> str:
    return f"{split}/{index:05d}.png"


def _png_files(splits: dict[str, LabelledImages]) -> Iterator[tuple[str, bytes]]:
    for split, data in splits.items():
        for index, image in enumerate(tqdm(data.images, desc=f"{split} images", unit="image", disable=None)):
            yield _file_name(split, index), encode_png(image)


if __name__ == "__main__":
    run_main(main)
