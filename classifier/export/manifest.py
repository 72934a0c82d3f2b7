"""The manifest: a machine-readable description of the exported files and of what they were made from."""

import platform
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from classifier.pipeline.outputs import hash_file

PACKAGES = ("torch", "torchvision", "numpy", "onnx", "onnxruntime", "safetensors")


def manifest(
    models: list[Path],
    image_shape: tuple[int, ...],
    decoding: Mapping[str, Any],
    names: list[str],
    md5s: Mapping[Path, str | None],
    parameters: Mapping[str, Any],
    metrics: Mapping[str, Any],
) -> dict[str, Any]:
    """Return the content of the manifest; rebuilding the same model gives the same content.

    image_shape: (C, H, W). decoding: keyword arguments of `decode_image` that prepare an image file as the training
    images were. names: of the classes. md5s: of the data and the weights. parameters: all that decide results.
    metrics: of training and test.
    """
    return {
        "input": {"name": "pixels", "shape": ["batch", *image_shape], "dtype": "float32", "range": [0, 1]},
        "decoding": dict(decoding),
        "output": {"name": "logits", "shape": ["batch", len(names)], "dtype": "float32"},
        "classes": names,
        "files": {
            model.name: {
                "sha256": hash_file(model, "sha256"),
                "bytes": model.stat().st_size,
                # torch unpickles parts of .pth and .pt2 files
                "trusted_source_only": model.suffix not in (".onnx", ".safetensors"),
            }
            for model in models
        },
        "md5": {str(path): md5 for path, md5 in md5s.items()},
        "parameters": dict(parameters),
        "metrics": dict(metrics),
        "versions": {"python": platform.python_version()} | {package: version(package) for package in PACKAGES},
    }
