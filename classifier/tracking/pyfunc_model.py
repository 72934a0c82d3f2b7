"""The registered model: from images to class names and probabilities, in Python and with `mlflow models serve`.

MLflow stores a copy of this file with each version, and runs it when the model is logged or loaded. It imports nothing
from the project, so that loading `models:/fashion-mnist@champion` needs MLflow and the packages below, but no checkout.
Each version also has a copy of classifier/data/decoding.py, which decodes image files.
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

BATCH = 256  # images decoded and classified at once; limits the memory
MOST_IMAGES = 1024  # per request; Python calls have no limit
LISTED_FAULTS = 20
COLUMN = "image"
REQUEST = (
    f'a list of images in base64, or of objects {{"{COLUMN}": base64}}, or a table (dataframe_split) with the column '
    f'"{COLUMN}"'
)


class UnusableImages(MlflowException, ValueError):  # type: ignore[misc]
    """The caller's images cannot be used. MLflow's server responds with status 400.

    The response contains the reason only, without the request that the server adds to the message.
    """

    def __init__(self, reason: str) -> None:
        super().__init__(reason, error_code=BAD_REQUEST)
        self.reason = reason

    def serialize_as_json(self) -> str:
        return json.dumps({"error_code": self.error_code, "message": self.reason})


class ImageClassifier(PythonModel):  # type: ignore[misc]
    """An exported ONNX file and its manifest, as an MLflow model."""

    # A type hint on `predict` would allow one type of input only. Without one, MLflow warns at every import; it has no
    # public setting for that.
    _skip_type_hint_validation = True

    def load_context(self, context: PythonModelContext) -> None:
        manifest = json.loads(Path(context.artifacts["manifest"]).read_text(encoding="utf-8"))
        self.class_names: list[str] = manifest["classes"]
        self.image_shape = tuple(manifest["input"]["shape"][1:])  # (C, H, W)
        self.decoding: dict[str, Any] = manifest["decoding"]
        self.session = onnxruntime.InferenceSession(context.artifacts["model"], providers=["CPUExecutionProvider"])
        # Not added to sys.modules, so that two versions can be loaded in one process
        spec = spec_from_file_location("image_classifier_decoding", context.artifacts["decoding"])
        assert spec is not None  # noqa: S101, for mypy
        assert spec.loader is not None  # noqa: S101, for mypy
        decoding = module_from_spec(spec)
        spec.loader.exec_module(decoding)
        self.decode_image: Callable[..., np.ndarray] = decoding.decode_image

    def predict(self, context, model_input, params=None):  # type: ignore[no-untyped-def]
        """Return a table with one row per image: `class`, its `probability`, and `P(name)` for each class.

        model_input: a list of paths of image files or of Pillow images; or an array (N, C, H, W), or (N, H, W) for
        grey images, of integers in [0, 255] or floats in [0, 1]. A server request has image files in base64, see
        REQUEST, at most MOST_IMAGES; strings in a request are never paths.
        Files and Pillow images are converted to the model's size and channels as for training.
        Raises UnusableImages, a ValueError, which lists unusable images by path, or else by number, starting at 1.
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
        """Return logits (N, classes) of image files: paths, Pillow images or base64. N >= 1."""
        channels, *size = self.image_shape
        logits, faults = [], []
        for start in range(0, len(sources), BATCH):
            pixels = []
            for number, source in enumerate(sources[start : start + BATCH], start + 1):
                try:
                    pixels.append(self.decode_image(_content(source), size, channels, **self.decoding))
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
        """Return logits (N, classes) of pixels (N, C, H, W), integers in [0, 255] or floats in [0, 1]; N may be 0."""
        largest = np.float32(255 if np.issubdtype(images.dtype, np.integer) else 1)
        batches = [images[start : start + BATCH] for start in range(0, max(len(images), 1), BATCH)]
        return np.concatenate(
            [self.session.run(["logits"], {"pixels": batch.astype(np.float32) / largest})[0] for batch in batches]
        )

    def _checked(self, images: np.ndarray) -> np.ndarray:
        """Return the array as (N, C, H, W). Raises UnusableImages for another shape or values out of range."""
        channels, height, width = self.image_shape
        if images.ndim == 3 and channels == 1:
            images = images[:, np.newaxis]
        if images.shape[1:] != self.image_shape:
            raise UnusableImages(
                f"images of shape {images.shape}; this model takes (N, {channels}, {height}, {width}), or {REQUEST}"
            )
        lowest, highest = (images.min(), images.max()) if images.size else (0, 0)
        largest = 255 if np.issubdtype(images.dtype, np.integer) else 1
        if not 0 <= lowest <= highest <= largest:  # also false for NaN
            raise UnusableImages(
                f"{images.dtype} pixels from {lowest} to {highest}; give integers 0..255 or floats 0..1"
            )
        return images


def _requested(given: Any) -> Sequence[Any] | None:
    """Return the images of a server request; None for input that only a Python call can have.

    MLflow's server converts a list of strings to an array, and objects to a list or a table.
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
    """Return the bytes of an image file, given as a path, a Pillow image or base64."""
    if isinstance(source, Path):
        return source.read_bytes()
    if isinstance(source, Image.Image):
        file = io.BytesIO()
        ImageOps.exif_transpose(source).save(
            file, "TIFF", compression="raw"
        )  # TIFF supports nearly all modes of Pillow
        return file.getvalue()
    if isinstance(source, dict):
        source = source.get(COLUMN)
    if isinstance(source, np.ndarray) and source.ndim == 0:  # the server converts a string in an object to this
        source = source.item()
    if not isinstance(source, str):
        raise ValueError(f'no string of base64 under "{COLUMN}"')
    try:
        return base64.b64decode("".join(source.split()), validate=True)  # some encoders insert line breaks
    except ValueError as error:
        raise ValueError(f"not base64: {error}") from None


mlflow.models.set_model(ImageClassifier())
