"""The registered model: images in, class names and probabilities out, in Python and through `mlflow models serve`.

MLflow keeps a copy of this file with every version, and runs it when the model is logged and when it is loaded. So it
imports nothing of the project: whoever loads `models:/fashion-mnist@champion` needs MLflow and the packages below, and
no checkout. What becomes of an image file is in a copy of classifier/data/decoding.py that the version holds too.
"""

import base64
import io
import json
from collections.abc import Callable, Sequence
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import onnxruntime
import pandas as pd
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import BAD_REQUEST
from mlflow.pyfunc.model import PythonModel, PythonModelContext
from PIL import Image, ImageOps

BATCH = 256  # images that are decoded and go through the network at once: it bounds the memory
MOST_IMAGES = 1024  # in a request; those of Python calls are not counted
LISTED_FAULTS = 20
COLUMN = "image"
REQUEST = (
    f'a list of images in base64, or of objects {{"{COLUMN}": base64}}, or a table (dataframe_split) with the column '
    f'"{COLUMN}"'
)


class UnusableImages(MlflowException, ValueError):  # type: ignore[misc]
    """What is wrong with the images of a caller, which MLflow's server answers with status 400.

    The server would put the whole request before the reason: the answer is the reason alone.
    """

    def __init__(self, reason: str) -> None:
        super().__init__(reason, error_code=BAD_REQUEST)
        self.reason = reason

    def serialize_as_json(self) -> str:
        return json.dumps({"error_code": self.error_code, "message": self.reason})


class ImageClassifier(PythonModel):  # type: ignore[misc]
    """An exported ONNX file and its manifest, as an MLflow model."""

    _skip_type_hint_validation = True  # MLflow's checks by type hint would allow one type of input only

    def load_context(self, context: PythonModelContext) -> None:
        manifest = json.loads(Path(context.artifacts["manifest"]).read_text(encoding="utf-8"))
        self.class_names: list[str] = manifest["classes"]
        self.image_shape = tuple(manifest["input"]["shape"][1:])  # (C, H, W)
        self.session = onnxruntime.InferenceSession(context.artifacts["model"], providers=["CPUExecutionProvider"])
        # Under a name of its own, and not among the imported modules: two versions can be loaded side by side
        spec = spec_from_file_location("image_classifier_decoding", context.artifacts["decoding"])
        assert spec is not None  # noqa: S101, it is for a file that ends in .py
        assert spec.loader is not None  # noqa: S101, likewise
        decoding = module_from_spec(spec)
        spec.loader.exec_module(decoding)
        self.decode_image: Callable[..., np.ndarray] = decoding.decode_image

    def predict(self, context, model_input, params=None):  # type: ignore[no-untyped-def]
        """A row an image: `class` and its `probability`, then the probability of every class as `P(name)`.

        model_input: a list of image files, given as paths or as Pillow images; or images as an array (N, C, H, W), or
        (N, H, W) where they are grey, of integers from 0 to 255 or floats from 0 to 1. A server gets image files in
        base64, as REQUEST says, at most MOST_IMAGES of them; no string in a request is taken for a path.
        Files and Pillow images are brought to the model's size and number of channels as they are for training.
        Raises ValueError that names the images that cannot be used, those without a name by their number from 1 on.
        """
        encoded = _requested(model_input)
        if encoded is not None:
            if not 0 < len(encoded) <= MOST_IMAGES:
                raise UnusableImages(f"{len(encoded)} images; send 1 to {MOST_IMAGES}")
            logits = self._logits_of_files(encoded)
        elif isinstance(model_input, Sequence) and all(isinstance(i, str | Path | Image.Image) for i in model_input):
            logits = self._logits_of_files([Path(i) if isinstance(i, str) else i for i in model_input])
        else:
            logits = self._logits(self._checked(np.asarray(model_input)))
        exponentials = np.exp(logits.astype(np.float64) - logits.max(axis=1, keepdims=True))
        probabilities = exponentials / exponentials.sum(axis=1, keepdims=True)
        answers = probabilities.argmax(axis=1)
        table = {
            "class": [self.class_names[answer] for answer in answers],
            "probability": probabilities.max(axis=1),
        }
        columns = {f"P({name})": probabilities[:, label] for label, name in enumerate(self.class_names)}
        return pd.DataFrame(table | columns)

    def _logits_of_files(self, sources: Sequence[Any]) -> np.ndarray:
        """Logits (N, classes) of image files: paths, Pillow images, or base64. N >= 1."""
        channels, *size = self.image_shape
        logits, faults = [], []
        for start in range(0, len(sources), BATCH):
            pixels = []
            for number, source in enumerate(sources[start : start + BATCH], start + 1):
                try:
                    pixels.append(self.decode_image(_content(source), tuple(size), channels))
                except (ValueError, OSError) as error:
                    name = source if isinstance(source, Path) else f"image {number}"
                    faults.append(f"{name}: not a usable image: {error}")
            if not faults:
                logits.append(self._logits(np.stack(pixels)))
        if faults:
            which = f" (the first {LISTED_FAULTS})" if len(faults) > LISTED_FAULTS else ""
            listed = "; ".join(faults[:LISTED_FAULTS])
            raise UnusableImages(f"{len(faults)} of {len(sources)} images cannot be used{which}: {listed}")
        return np.concatenate(logits)

    def _logits(self, images: np.ndarray) -> np.ndarray:
        """Logits (N, classes) of pixels (N, C, H, W), integers 0..255 or floats 0..1; N may be 0."""
        largest = np.float32(255 if np.issubdtype(images.dtype, np.integer) else 1)
        batches = [images[start : start + BATCH] for start in range(0, max(len(images), 1), BATCH)]
        return np.concatenate(
            [self.session.run(["logits"], {"pixels": batch.astype(np.float32) / largest})[0] for batch in batches]
        )

    def _checked(self, images: np.ndarray) -> np.ndarray:
        """The array as (N, C, H, W), if it can be that and its values are those of pixels."""
        channels, height, width = self.image_shape
        if images.ndim == 3 and channels == 1:
            images = images[:, np.newaxis]
        if images.shape[1:] != self.image_shape:
            raise UnusableImages(
                f"images of shape {images.shape}; this model takes (N, {channels}, {height}, {width}), or {REQUEST}"
            )
        lowest, highest = (images.min(), images.max()) if images.size else (0, 0)
        largest = 255 if np.issubdtype(images.dtype, np.integer) else 1
        if not 0 <= lowest <= highest <= largest:  # false also where one is not a number
            raise UnusableImages(
                f"{images.dtype} pixels from {lowest} to {highest}; give integers 0..255 or floats 0..1"
            )
        return images


def _requested(given: Any) -> Sequence[Any] | None:
    """The images of a request in what MLflow's server makes of its JSON; None for what only a Python call can give.

    A list of strings comes as an array, and as a list only from Python; objects come as a list or a table.
    """
    if isinstance(given, pd.DataFrame | dict):
        if COLUMN not in given:
            raise UnusableImages(f'no column "{COLUMN}"; send {REQUEST}')
        given = np.atleast_1d(np.asarray(given[COLUMN], dtype=object))
    elif isinstance(given, list | tuple) and all(isinstance(row, dict) for row in given):
        return given
    if not isinstance(given, np.ndarray) or given.dtype.kind not in "OSU":
        return None
    if given.ndim != 1:
        raise UnusableImages(f"text of shape {given.shape}; send {REQUEST}")
    return list(given)


def _content(source: Any) -> bytes:
    """The bytes of an image file that is given as a path, as a Pillow image, or in base64."""
    if isinstance(source, Path):
        return source.read_bytes()
    if isinstance(source, Image.Image):
        file = io.BytesIO()
        ImageOps.exif_transpose(source).save(file, "TIFF", compression="raw")  # it has nearly all modes of Pillow's
        return file.getvalue()
    if isinstance(source, dict):
        source = source.get(COLUMN)
    if isinstance(source, np.ndarray) and source.ndim == 0:  # what the server makes of a string in an object
        source = source.item()
    if not isinstance(source, str):
        raise ValueError(f'no string of base64 under "{COLUMN}"')
    try:
        return base64.b64decode("".join(source.split()), validate=True)  # encoders break lines
    except ValueError as error:
        raise ValueError(f"not base64: {error}") from None


mlflow.models.set_model(ImageClassifier())
