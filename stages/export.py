"""Export stage: the trained network in formats that other programs read, each proven to compute the same.

int8 does not: its accuracy is measured instead, and must not fall by more than int8_max_drop.

Reads   models/model_weights.pth, metrics/train.json, metrics/test.json, metrics/classes.csv, data/images.zip,
        data/annotations/
Writes  models/export/: model.<format> for each of export_formats, manifest.json, README.md
"""

import platform
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from torch import nn

from classifier import files
from classifier.annotations import class_names
from classifier.calibration import calibrated
from classifier.card import model_card
from classifier.dataset import Batches, CustomImageDataset
from classifier.device import environment, seed_everything, select_device, set_threads
from classifier.errors import PipelineError, run_main
from classifier.exchange import checking, write, write_weights
from classifier.networks import Mirrored, build_network
from classifier.params import UNTRACKED, Params, load_params
from classifier.quantization import CALIBRATION_IMAGES, accuracy_cost, quantize
from classifier.tracking import Tracker
from classifier.training import load_weights

CHECKED_IMAGES = 256

Splits = dict[str, CustomImageDataset]


def main() -> None:
    params = load_params()
    tracker = Tracker()
    device = select_device("cpu")  # the files are for any machine
    set_threads(params.threads)
    seed_everything(params.seed)

    names = class_names(files.verified(files.ANNOTATIONS))
    images = files.verified(files.IMAGES)
    splits = {
        split: CustomImageDataset(files.ANNOTATIONS / f"{split}.csv", images, classes=len(names))
        for split in ("train", "val", "test")
    }
    scores = pd.read_csv(files.verified(files.CLASS_METRICS), dtype={"class": str}, keep_default_na=False)
    network = build_network(params.network, splits["test"].image_shape(), len(names))
    load_weights(network, files.verified(files.WEIGHTS), device)
    network = Mirrored(network) if params.test_flip else network
    batches = partial(
        Batches,
        batch_size=params.batch_size,
        device=device,
        memory_limit_gib=params.memory_limit_gib,
        workers=params.workers,
    )

    facts: dict[str, Any] = {}  # that only some exports have
    if params.temperature_scaling:
        if not len(splits["val"]):
            raise PipelineError(
                "temperature_scaling: there are no validation images to fit the temperature on; set val_size above 0, "
                "or temperature_scaling to false"
            )
        network, facts["calibration"] = calibrated(network, batches(splits["val"]), batches(splits["test"]))
        print(f"Temperature: {facts['calibration']['temperature']:.4f}")

    with files.temporary_folder(files.EXPORT) as aside:
        with files.atomic(files.EXPORT) as folder:
            folder.mkdir()
            # Also where it is not asked for: the registered model computes with it, and int8 is made from it
            onnx = (folder if "onnx" in params.export_formats else aside) / files.exported_name("onnx")
            models = write_models(params, network, splits["test"], len(names), folder, onnx)
            if "int8" in params.export_formats:
                models.append(folder / files.exported_name("int8"))
                facts["int8"] = write_int8(models[-1], onnx, params, splits, batches)
            about = manifest(params, models, splits["test"].image_shape(), names) | facts
            files.write_json(folder / "manifest.json", about)
            card = model_card(about, scores, {split: dataset.labels.numpy() for split, dataset in splits.items()})
            (folder / "README.md").write_text(card, encoding="utf-8")

        with tracker.weights(params, environment(device)):
            # Where DVC had the evaluation in its run cache
            tracker.log_evaluation(splits["test"].md5(), if_missing=True)
            tracker.log_files(files.EXPORT / "manifest.json")
            registered = (aside if onnx.parent == aside else files.EXPORT) / onnx.name
            tracker.register(params.registered_model, registered, files.EXPORT / "manifest.json")


def write_models(
    params: Params, network: nn.Module, test_set: CustomImageDataset, classes: int, folder: Path, onnx: Path
) -> list[Path]:
    """Write the network in all formats but int8, and to `onnx` in any case; check and return those asked for."""
    models = [folder / files.exported_name(name) for name in params.export_formats if name != "int8"]
    with checking(models) as check:
        pixels = test_set.pixels(range(min(CHECKED_IMAGES, len(test_set))))
        for model in dict.fromkeys([*models, onnx]):
            if model.suffix == ".safetensors":
                write_weights(network, params.network, test_set.image_shape(), classes, model)
            else:
                write(network, pixels[:2], model)
        for name, difference in check(network, pixels).items():
            print(f"{name}: logits within {difference:.1e} of the trained network's on {len(pixels)} test images")
    return models


def write_int8(
    path: Path, onnx: Path, params: Params, splits: Splits, batches: Callable[[CustomImageDataset], Batches]
) -> dict[str, Any]:
    """Write the float ONNX file's network in 8-bit integers and return what that costs, see `accuracy_cost`."""
    chosen = np.random.default_rng(params.seed).permutation(len(splits["train"]))[:CALIBRATION_IMAGES]
    quantize(onnx, splits["train"].pixels(chosen).numpy(), path)
    split, called = ("val", "validation") if len(splits["val"]) else ("test", "test")
    cost = accuracy_cost(path, onnx, batches(splits[split]), called, params.int8_max_drop)
    print(
        f"{path.name}: right for {cost['accuracy']:.2%} of {cost['images']} {called} images, "
        f"the float network for {cost['float_accuracy']:.2%}"
    )
    return cost


def manifest(params: Params, models: list[Path], image_shape: tuple[int, ...], names: list[str]) -> dict[str, Any]:
    """What the exported files are and what made them: nothing that differs from one rebuild to the next."""
    md5s = files.locked_md5s()
    packages = ("torch", "torchvision", "numpy", "onnx", "onnxruntime", "safetensors")
    return {
        "input": {"name": "pixels", "shape": ["batch", *image_shape], "dtype": "float32", "range": [0, 1]},
        "output": {"name": "logits", "shape": ["batch", len(names)], "dtype": "float32"},
        "classes": names,
        "files": {
            model.name: {
                "sha256": files.hash_file(model, "sha256"),
                "bytes": model.stat().st_size,
                # torch reads parts of the other two as pickles
                "trusted_source_only": model.suffix not in (".onnx", ".safetensors"),
            }
            for model in models
        },
        "md5": {str(path): md5s.get(str(path)) for path in (files.RAW, files.IMAGES, files.ANNOTATIONS)}
        | {str(files.WEIGHTS): files.hash_file(files.WEIGHTS)},
        "parameters": params.model_dump(exclude=set(UNTRACKED)),
        "metrics": {"train": files.read_json(files.TRAIN_METRICS), "test": files.read_json(files.TEST_METRICS)},
        "versions": {"python": platform.python_version()} | {package: version(package) for package in packages},
    }


if __name__ == "__main__":
    run_main(main)
