"""Export stage: the trained network in formats that other programs read, each proven to compute the same.

Reads   models/model_weights.pth, metrics/train.json, metrics/test.json, data/images.zip, data/annotations/
Writes  models/export/: model.<format> for each of export_formats, manifest.json
"""

import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

from classifier import files
from classifier.annotations import class_names
from classifier.dataset import CustomImageDataset
from classifier.device import environment, seed_everything, select_device, set_threads
from classifier.errors import run_main
from classifier.exchange import check_files, write
from classifier.networks import build_network
from classifier.params import UNTRACKED, Params, load_params
from classifier.tracking import Tracker
from classifier.training import load_weights

CHECKED_IMAGES = 256


def main() -> None:
    params = load_params()
    tracker = Tracker()
    device = select_device("cpu")  # the files are for any machine
    set_threads(params.threads)
    seed_everything(params.seed)

    names = class_names(files.verified(files.ANNOTATIONS))
    images = files.verified(files.IMAGES)
    test_set = CustomImageDataset(files.ANNOTATIONS / "test.csv", images, classes=len(names))
    network = build_network(params.network, test_set.image_shape(), len(names))
    load_weights(network, files.verified(files.WEIGHTS), device)
    pixels = test_set.pixels(range(min(CHECKED_IMAGES, len(test_set))))

    with files.atomic(files.EXPORT) as folder:
        folder.mkdir()
        models = [folder / f"model.{suffix}" for suffix in params.export_formats]
        for model in models:
            write(network, pixels[:2], model)
        for name, difference in check_files(models, network, pixels).items():
            print(f"{name}: logits within {difference:.1e} of the trained network's on {len(pixels)} test images")
        files.write_json(folder / "manifest.json", manifest(params, models, list(pixels.shape[1:]), names))

    with tracker.weights(params, environment(device)), files.temporary_folder(files.EXPORT) as folder:
        tracker.log_evaluation(test_set.md5(), if_missing=True)  # where DVC had the evaluation in its run cache
        tracker.log_files(files.EXPORT / "manifest.json")
        onnx = files.EXPORT / "model.onnx"
        if not onnx.exists():  # not among the formats asked for, but what the registered model computes with
            onnx = folder / "model.onnx"
            write(network, pixels[:2], onnx)
        tracker.register(params.registered_model, onnx, files.EXPORT / "manifest.json")


def manifest(params: Params, models: list[Path], image_shape: list[int], names: list[str]) -> dict[str, Any]:
    """What the exported files are and what made them: nothing that differs from one rebuild to the next."""
    md5s = files.locked_md5s()
    return {
        "input": {"name": "pixels", "shape": ["batch", *image_shape], "dtype": "float32", "range": [0, 1]},
        "output": {"name": "logits", "shape": ["batch", len(names)], "dtype": "float32"},
        "classes": names,
        "files": {
            model.name: {
                "sha256": files.hash_file(model, "sha256"),
                "bytes": model.stat().st_size,
                "trusted_source_only": model.suffix != ".onnx",  # torch reads parts of both as pickles
            }
            for model in models
        },
        "md5": {str(path): md5s.get(str(path)) for path in (files.RAW, files.IMAGES, files.ANNOTATIONS)}
        | {str(files.WEIGHTS): files.hash_file(files.WEIGHTS)},
        "parameters": params.model_dump(exclude=set(UNTRACKED)),
        "metrics": {"train": files.read_json(files.TRAIN_METRICS), "test": files.read_json(files.TEST_METRICS)},
        "versions": {"python": platform.python_version()}
        | {package: version(package) for package in ("torch", "torchvision", "numpy", "onnx")},
    }


if __name__ == "__main__":
    run_main(main)
