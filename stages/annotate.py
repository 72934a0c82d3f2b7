"""Annotate stage: turn original files into an archive of images of one shape and a table for each split.

Reads   data/raw/
Writes  data/images.zip (or a folder of zips), data/annotations/{train,val,test,classes}.csv, data/originals.csv
"""

from collections.abc import Iterator
from itertools import accumulate

import numpy as np

from classifier.data.lockfile import locked_md5s, verified
from classifier.pipeline.annotations import Names, write_csv
from classifier.pipeline.archive import write_images
from classifier.pipeline.errors import printable
from classifier.pipeline.outputs import atomic
from classifier.pipeline.params import load_params
from classifier.pipeline.paths import ANNOTATIONS, IMAGES, LOCK, ORIGINALS, RAW
from classifier.preparation.preprocessing import common_shape, file_names, own_names, prepare, write_originals
from classifier.preparation.splits import assign_splits, check_classes, check_labels, class_sizes, find_duplicates
from classifier.sources import LabelledImages, load_source


def main() -> None:
    params = load_params()
    source = load_source(params.source)
    raw = verified(RAW, locked_md5s(LOCK))
    names = source.class_names(raw)
    splits: dict[str, LabelledImages] = source.read(raw)
    for split, data in splits.items():
        check_labels(split, data, len(names))
    given = {split: data.labels for split, data in splits.items()}
    shares = assign_splits(given, names, params.val_size, params.test_size, params.split_seed)
    labels = {split: splits[share.origin].labels[share.indices] for split, share in shares.items()}
    check_classes(labels["train"], names)

    shape = common_shape(splits, params.image_size, params.channels)
    starts = dict(zip(splits, accumulate((len(data.labels) for data in splits.values()), initial=0), strict=False))
    digests = np.empty(
        sum(len(data.labels) for data in splits.values()), "V32"
    )  # of all images, in the order of `splits`

    def files() -> Iterator[tuple[str, bytes]]:
        for place, image in enumerate(prepare(splits, shape)):
            digests[place] = image.digest
            yield image.name, image.png

    with atomic(IMAGES) as path:
        write_images(path, files())

    # Names of images do not depend on their split, so the splits do not affect images.zip
    names_of = {split: file_names(split, data) for split, data in splits.items()}
    chosen = {split: Names(names_of[share.origin][place] for place in share.indices) for split, share in shares.items()}
    with atomic(ANNOTATIONS) as folder:
        folder.mkdir()
        for split in shares:
            write_csv(folder / f"{split}.csv", {"file": chosen[split], "label": labels[split]})
        write_csv(folder / "classes.csv", {"label": range(len(names)), "name": names})
    with atomic(ORIGINALS) as path:
        write_originals(path, splits)

    counts = ", ".join(f"{len(files_of_split):,} {split}" for split, files_of_split in chosen.items())
    print(f"{counts} images in {len(names)} classes, each {' x '.join(map(str, shape))} (channels x height x width)")
    print(printable(class_sizes(labels["train"], names)))
    of_split = {split: digests[starts[share.origin] + share.indices] for split, share in shares.items()}
    own = {split: own_names(split, data) for split, data in splits.items()}
    known_by = {split: Names(own[share.origin][place] for place in share.indices) for split, share in shares.items()}
    for line in find_duplicates(of_split, labels, known_by, names).lines():
        print(printable(line), flush=True)
