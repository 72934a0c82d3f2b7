"""Export stage: the trained network in formats that other programs read, each proven to compute the same.

Reads   models/model_weights.pth, metrics/train.json, metrics/test.json, data/images.zip, data/annotations/
Writes  models/export/: model.<format> for each of export_formats, manifest.json
"""

import platform
from importlib.metadata import version

import torch

from classifier import tracking
from classifier.dataset import CustomImageDataset, class_names
from classifier.device import environment, seed_everything, select_device, set_threads
from classifier.errors import run
from classifier.exchange import check_files, write
from classifier.files import ANNOTATIONS, EXPORT, IMAGES, RAW, TEST_METRICS, TRAIN_METRICS, WEIGHTS
from classifier.files import atomic, hash_file, locked_md5s, read_json, write_json
from classifier.networks import build_network
from classifier.params import UNTRACKED, load_params
from classifier.training import load_weights
from classifier.transforms import to_float

CHECKED_IMAGES = 256


def main() -> None:
    params = load_params()
    device = select_device("cpu")  # exported files are for any machine
    set_threads(params.threads)
    seed_everything(params.seed)

    names = class_names(ANNOTATIONS)
    test_set = CustomImageDataset(ANNOTATIONS / "test.csv", IMAGES)
    image_shape = test_set.image_shape()
    network = build_network(params.network, image_shape, len(names))
    load_weights(network, WEIGHTS, device)
    pixels = torch.stack([to_float(test_set.decode(index)) for index in range(min(CHECKED_IMAGES, len(test_set)))])

    with atomic(EXPORT) as folder:
        folder.mkdir()
        paths = [folder / f"model.{suffix}" for suffix in params.export_formats]
        for path in paths:
            write(network, pixels[:2], path)
        for name, difference in check_files(paths, network, pixels).items():
            print(f"{name}: logits within {difference:.1e} of the trained network's on {len(pixels)} test images")
        md5s = locked_md5s()
        manifest = {
            "input": {"pixels": ["batch", *image_shape], "type": "float32", "range": [0, 1]},
            "output": {"logits": ["batch", len(names)], "type": "float32"},
            "classes": names,
            "files": {
                path.name: {"sha256": hash_file(path, "sha256"), "bytes": path.stat().st_size, "trusted_source_only": path.suffix == ".pth"}
                for path in paths
            },
            "md5": {str(path): md5s.get(str(path)) for path in (RAW, IMAGES, ANNOTATIONS)} | {str(WEIGHTS): hash_file(WEIGHTS)},
            "parameters": params.model_dump(exclude=set(UNTRACKED)),
            "metrics": {"train": read_json(TRAIN_METRICS), "test": read_json(TEST_METRICS)},
            "versions": {"python": platform.python_version()} | {name: version(name) for name in ("torch", "torchvision", "onnx", "numpy")},
        }
        write_json(folder / "manifest.json", manifest)

    with tracking.run_of_weights(params, environment(device)):
        tracking.log_model(network, pixels[:2], params.registered_model)
        tracking.log_files(EXPORT / "manifest.json")


if __name__ == "__main__":
    run(main)
