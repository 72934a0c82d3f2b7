"""Paths of the pipeline's files, relative to dvc.yaml."""

import os
from pathlib import Path

PARAMS = Path("params.yaml")
PIPELINE = Path("dvc.yaml")
LOCK = Path("dvc.lock")
CHECKED = Path("data/checked")
RAW = Path("data/raw")
IMAGES = Path("data/images")
ANNOTATIONS = Path("data/annotations")
REJECTED = Path("metrics/rejected.csv")
WEIGHTS = Path("models/model_weights.pth")
EXPORT = Path("models/export")
METRICS = Path("metrics")
TRAIN_METRICS = Path("metrics/train.json")
EPOCHS = Path("metrics/epochs.csv")
ENVIRONMENT = Path("metrics/environment.json")
TEST_METRICS = Path("metrics/test.json")
CLASS_METRICS = Path("metrics/classes.csv")
PREDICTIONS = Path("metrics/predictions.csv")
PLOTS = Path("metrics/plots")


def exported_name(export_format: str) -> str:
    """Return the name of the file in EXPORT for one of `export_formats`; int8 is also ONNX."""
    return f"model.{'int8.onnx' if export_format == 'int8' else export_format}"


def repository_root() -> Path:
    """Return the main checkout, also when DVC runs an experiment in a temporary copy of it."""
    if root := os.environ.get("DVC_ROOT"):
        return Path(root)
    here = Path.cwd()
    return next((folder for folder in (here, *here.parents) if (folder / ".dvc").is_dir()), here)
