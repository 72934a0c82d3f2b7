"""Annotate stage: turn original files into image arrays of one shape and a table for each split.

Reads   data/raw/
Writes  data/images/images-00000.npy, ..., data/annotations/{train,val,test,classes}.csv
"""

from classifier.data.lockfile import locked_md5s, verified
from classifier.pipeline.annotations import Names, write_csv
from classifier.pipeline.errors import printable
from classifier.pipeline.outputs import atomic
from classifier.pipeline.params import load_params
from classifier.pipeline.paths import ANNOTATIONS, IMAGES, LOCK, RAW
from classifier.preparation.preprocessing import common_shape, first_rows, image_names, workers, write_images
from classifier.preparation.splits import assign_splits, check_classes, check_labels, class_sizes, find_duplicates
from classifier.sources import LabelledImages, load_source


def main() -> None:
    params = load_params()
    source = load_source(params.source)
    raw = verified(RAW, locked_md5s(LOCK))
    classes = source.class_names(raw)
    splits: dict[str, LabelledImages] = source.read(raw)
    for split, data in splits.items():
        check_labels(split, data, len(classes))
    given = {split: data.labels for split, data in splits.items()}
    shares = assign_splits(given, classes, params.val_size, params.test_size, params.split_seed)
    labels = {split: splits[share.origin].labels[share.indices] for split, share in shares.items()}
    check_classes(labels["train"], classes)

    with workers(splits) as pool:
        shape = common_shape(pool, splits, params.image_size, params.channels)
        with atomic(IMAGES) as folder:
            folder.mkdir()
            sha256 = write_images(pool, splits, shape, folder)

    # An image has the same row whichever split it goes to, so the arrays do not depend on how the splits are cut
    starts = first_rows(splits)
    rows = {split: starts[share.origin] + share.indices for split, share in shares.items()}
    known = {split: image_names(split, data) for split, data in splits.items()}
    names = {split: Names(known[share.origin][place] for place in share.indices) for split, share in shares.items()}
    with atomic(ANNOTATIONS) as folder:
        folder.mkdir()
        for split in shares:
            write_csv(folder / f"{split}.csv", {"file": names[split], "label": labels[split], "row": rows[split]})
        write_csv(folder / "classes.csv", {"label": range(len(classes)), "name": classes})

    counts = ", ".join(f"{len(of_split):,} {split}" for split, of_split in names.items())
    print(f"{counts} images in {len(classes)} classes, each {' x '.join(map(str, shape))} (channels x height x width)")
    print(printable(class_sizes(labels["train"], classes)))
    digests = {split: sha256[of_split] for split, of_split in rows.items()}
    for line in find_duplicates(digests, labels, names, classes).lines():
        print(printable(line), flush=True)
