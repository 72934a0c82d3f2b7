"""The registered model: images in, class names and probabilities out.

MLflow keeps a copy of this file with every version, so it imports nothing of the project: whoever loads
`models:/fashion-mnist@champion` needs MLflow and the packages below, and no checkout.
"""

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import onnxruntime
import pandas as pd
from mlflow.pyfunc.model import PythonModel, PythonModelContext
from PIL import Image, ImageOps

# As decode_image in classifier/decoding.py has them, which also refuses 16 bits of colours and large tiles of TIFFs
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
LARGEST_PIXELS = 89_478_485
BATCH = 256  # images that go through the network at once: it bounds the memory


class ImageClassifier(PythonModel):  # type: ignore[misc]
    """An exported ONNX file and its manifest, as an MLflow model."""

    _skip_type_hint_validation = True  # MLflow's checks by type hint would allow one type of input only

    def load_context(self, context: PythonModelContext) -> None:
        manifest = json.loads(Path(context.artifacts["manifest"]).read_text(encoding="utf-8"))
        self.class_names: list[str] = manifest["classes"]
        self.image_shape = tuple(manifest["input"]["shape"][1:])  # (C, H, W)
        self.session = onnxruntime.InferenceSession(context.artifacts["model"], providers=["CPUExecutionProvider"])

    def predict(self, context, model_input, params=None):  # type: ignore[no-untyped-def]
        """A row an image: `class` and its `probability`, then the probability of every class as `P(name)`.

        model_input: images as an array (N, C, H, W), or (N, H, W) where they are grey, of integers from 0
        to 255 or floats from 0 to 1; or a list of image files, given as paths or as Pillow images.
        Raises ValueError for images of another shape or range.
        """
        pixels = self._pixels(model_input)
        batches = [pixels[start : start + BATCH] for start in range(0, max(len(pixels), 1), BATCH)]
        logits = np.concatenate([self.session.run(["logits"], {"pixels": batch})[0] for batch in batches])
        exponentials = np.exp(logits.astype(np.float64) - logits.max(axis=1, keepdims=True))
        probabilities = exponentials / exponentials.sum(axis=1, keepdims=True)
        answers = probabilities.argmax(axis=1)
        table = {
            "class": [self.class_names[answer] for answer in answers],
            "probability": probabilities.max(axis=1),
        }
        columns = {f"P({name})": probabilities[:, label] for label, name in enumerate(self.class_names)}
        return pd.DataFrame(table | columns)

    def _pixels(self, images: Any) -> np.ndarray:
        """Pixels (N, C, H, W) float32 in [0, 1]."""
        if isinstance(images, Sequence) and len(images) and isinstance(images[0], str | Path | Image.Image):
            images = np.stack([self._decoded(image) for image in images])
        images = np.asarray(images)
        channels, height, width = self.image_shape
        if images.ndim == 3 and channels == 1:
            images = images[:, np.newaxis]
        if images.shape[1:] != self.image_shape:
            raise ValueError(f"images of shape {images.shape}; this model takes (N, {channels}, {height}, {width})")
        lowest, highest = (images.min(), images.max()) if images.size else (0, 0)
        largest = 255 if np.issubdtype(images.dtype, np.integer) else 1
        if not 0 <= lowest <= highest <= largest:  # false also where one is not a number
            raise ValueError(f"{images.dtype} pixels from {lowest} to {highest}; give integers 0..255 or floats 0..1")
        return np.asarray(images / largest, dtype=np.float32)

    def _decoded(self, source: str | Path | Image.Image) -> np.ndarray:
        """One image as (C, H, W) uint8, upright, in the model's number of channels."""
        name = "image" if isinstance(source, Image.Image) else source
        try:
            if isinstance(source, Image.Image):
                image = source
            else:
                image = Image.open(io.BytesIO(Path(source).read_bytes()), formats=FORMATS)
            if image.width * image.height > LARGEST_PIXELS:
                raise ValueError(f"more than {LARGEST_PIXELS:,} pixels")
            if image.mode.startswith(("I", "F")):
                raise ValueError("its channels have more than 8 bits; convert it to 8 bits")
            pixels = np.asarray(ImageOps.exif_transpose(image).convert("L" if self.image_shape[0] == 1 else "RGB"))
        except Exception as error:  # hostile data makes decoders raise anything
            raise ValueError(f"{name}: not a usable image: {error}") from None
        pixels = pixels[np.newaxis] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)
        if pixels.shape != self.image_shape:
            raise ValueError(f"{name}: shape {pixels.shape}; this model takes {self.image_shape}")
        return pixels


mlflow.models.set_model(ImageClassifier())
