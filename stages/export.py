"""Export stage: the trained network in formats that other programs read, each proven to compute the same.

int8 does not: its accuracy is measured instead, and must not fall by more than int8_max_drop.

Reads   models/model_weights.pth, metrics/train.json, metrics/test.json, metrics/classes.csv, data/images.zip,
        data/annotations/
Writes  models/export/: model.<format> for each of export_formats, manifest.json, README.md
"""

from functools import partial
from typing import Any

import pandas as pd

from classifier.compute.device import choose_kernels, environment, seed_everything, select_device, set_threads
from classifier.data.dataset import load_splits
from classifier.data.loader import batches_of
from classifier.data.lockfile import verified
from classifier.export.calibration import calibrate
from classifier.export.formats import write_checked
from classifier.export.manifest import manifest
from classifier.export.model_card import model_card, next_steps
from classifier.export.quantization import write_int8
from classifier.pipeline import paths
from classifier.pipeline.annotations import class_names
from classifier.pipeline.errors import run_main
from classifier.pipeline.outputs import atomic, temporary_folder, write_json
from classifier.pipeline.params import UNTRACKED, load_params
from classifier.tracking.tracker import Tracker
from classifier.training.inference import trained_network

SPLITS = ("train", "val", "test")
CHECKED_IMAGES = 256


def main() -> None:
    params = load_params()
    tracker = Tracker()
    device = select_device("cpu")  # the files are for any machine
    set_threads(params.threads)
    choose_kernels(deterministic=True, precision="float32")
    seed_everything(params.seed)

    names = class_names(verified(paths.ANNOTATIONS))
    splits = dict(zip(SPLITS, load_splits(SPLITS, len(names)), strict=True))
    scores = pd.read_csv(verified(paths.CLASS_METRICS), dtype={"class": str}, keep_default_na=False)
    scores["class"] = names  # which are quoted there, for spreadsheets
    shape = splits["test"].image_shape()
    network = trained_network(params.network, shape, len(names), device, test_flip=params.test_flip)
    to_batches = partial(batches_of, params=params, device=device)
    facts: dict[str, Any] = {}  # that only some exports have
    if params.temperature_scaling:
        network, facts["calibration"] = calibrate(network, splits["val"], splits["test"], to_batches)

    with temporary_folder(paths.EXPORT) as aside:
        with atomic(paths.EXPORT) as folder:
            folder.mkdir()
            models = [folder / paths.exported_name(name) for name in params.export_formats if name != "int8"]
            # Also where it is not asked for: the registered model computes with it, and int8 is made from it
            onnx = (folder if "onnx" in params.export_formats else aside) / paths.exported_name("onnx")
            pixels = splits["test"].pixels(range(min(CHECKED_IMAGES, len(splits["test"]))))
            write_checked(network, params.network, len(names), pixels, models, also=onnx)
            if "int8" in params.export_formats:
                models.append(folder / paths.exported_name("int8"))
                facts["int8"] = write_int8(
                    models[-1], onnx, splits, to_batches, seed=params.seed, max_drop=params.int8_max_drop
                )
            about = manifest(models, shape, names, params.model_dump(exclude=set(UNTRACKED))) | facts
            write_json(folder / "manifest.json", about)
            card = model_card(about, scores, {split: dataset.labels.numpy() for split, dataset in splits.items()})
            (folder / "README.md").write_text(card, encoding="utf-8")

        with tracker.weights(params, environment(device)):
            # Where DVC had the evaluation in its run cache
            tracker.log_evaluation(splits["test"].md5(), if_missing=True)
            tracker.log_files(paths.EXPORT / "manifest.json")
            registered = (aside if onnx.parent == aside else paths.EXPORT) / onnx.name
            tracker.register(params.registered_model, registered, paths.EXPORT / "manifest.json")
    print(next_steps([path.name for path in models]))


if __name__ == "__main__":
    run_main(main)
