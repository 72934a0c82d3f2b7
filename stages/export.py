"""Export stage: write the trained network in formats for other programs, and check that each computes the same.

int8 does not compute the same: its accuracy may drop by at most int8_max_drop.

Reads   models/model_weights.pth, metrics/train.json, metrics/test.json, metrics/classes.csv, data/images/,
        data/annotations/
Writes  models/export/: model.<format> for each of export_formats, manifest.json, README.md
"""

from functools import partial
from typing import Any

import pandas as pd

from classifier.compute.device import choose_kernels, environment, seed_everything, select_device, set_threads
from classifier.data.dataset import load_splits
from classifier.data.loader import batches_of
from classifier.data.lockfile import locked_md5s, verified
from classifier.export.calibration import calibrate
from classifier.export.formats import write_checked
from classifier.export.manifest import manifest
from classifier.export.model_card import model_card, next_steps
from classifier.export.quantization import write_int8
from classifier.pipeline import paths
from classifier.pipeline.annotations import class_names
from classifier.pipeline.outputs import atomic, hash_file, read_json, temporary_folder, write_json
from classifier.pipeline.params import UNTRACKED, load_params
from classifier.tracking.tracker import Tracker
from classifier.training.inference import trained_network

SPLITS = ("train", "val", "test")
CHECKED_IMAGES = 256


def main() -> None:
    params = load_params()
    md5s = locked_md5s(paths.LOCK)
    data = (paths.IMAGES, paths.ANNOTATIONS)
    tracker = Tracker(params.experiment, md5s, paths.PARAMS, data, paths.WEIGHTS)
    device = select_device("cpu")  # the files must not depend on an accelerator
    set_threads(params.threads)
    choose_kernels(deterministic=True, precision="float32")
    seed_everything(params.seed)

    images, annotations = (verified(path, md5s) for path in data)
    names = class_names(annotations)
    splits = dict(zip(SPLITS, load_splits(SPLITS, annotations, images, len(names), params.image_sides), strict=True))
    metrics = {
        "train": read_json(verified(paths.TRAIN_METRICS, md5s)),
        "test": read_json(verified(paths.TEST_METRICS, md5s)),
    }
    scores = pd.read_csv(verified(paths.CLASS_METRICS, md5s), dtype={"class": str}, keep_default_na=False)
    scores["class"] = names  # the file quotes some for spreadsheets
    shape = splits["test"].image_shape()
    weights = verified(paths.WEIGHTS, md5s)
    network = trained_network(weights, params.network, shape, len(names), device, test_flip=params.test_flip)
    to_batches = partial(batches_of, params=params, device=device)
    facts: dict[str, Any] = {}  # of the manifest, for some parameters
    if params.temperature_scaling:
        network, facts["calibration"] = calibrate(network, splits["val"], splits["test"], to_batches)

    with temporary_folder(paths.EXPORT) as aside:
        with atomic(paths.EXPORT) as folder:
            folder.mkdir()
            models = [folder / paths.exported_name(name) for name in params.export_formats if name != "int8"]
            # Always written: the registered model runs it, and int8 is quantized from it
            onnx = (folder if "onnx" in params.export_formats else aside) / paths.exported_name("onnx")
            pixels = splits["test"].pixels(range(min(CHECKED_IMAGES, len(splits["test"]))))
            write_checked(network, params.network, len(names), pixels, models, also=onnx)
            if "int8" in params.export_formats:
                models.append(folder / paths.exported_name("int8"))
                facts["int8"] = write_int8(
                    models[-1], onnx, splits, to_batches, seed=params.seed, max_drop=params.int8_max_drop
                )
            made_from = {path: md5s.get(str(path)) for path in (paths.RAW, *data)} | {weights: hash_file(weights)}
            parameters = params.model_dump(exclude=set(UNTRACKED))
            decoding = {
                "fit": params.fit,
                "background": params.background_rgb,
                "intensity": params.intensity,
                "stored_size": splits["test"].stored_size,
            }
            about = manifest(models, shape, decoding, names, made_from, parameters, metrics) | facts
            write_json(folder / "manifest.json", about)
            card = model_card(about, scores, {split: dataset.labels.numpy() for split, dataset in splits.items()})
            (folder / "README.md").write_text(card, encoding="utf-8")

        with tracker.weights(environment(device)):
            # DVC may have taken the evaluation from its run cache
            evaluation = [paths.CLASS_METRICS, paths.PLOTS]
            tracker.log_evaluation(paths.TEST_METRICS, evaluation, splits["test"].md5(), if_missing=True)
            tracker.log_files(paths.EXPORT / "manifest.json")
            registered = (aside if onnx.parent == aside else paths.EXPORT) / onnx.name
            tracker.register(params.registered_model, registered, paths.EXPORT / "manifest.json")
    print(next_steps(paths.EXPORT, [path.name for path in models]))
