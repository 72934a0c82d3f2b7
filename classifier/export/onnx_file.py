"""Run exported ONNX files without torch, which takes seconds to import."""

from collections.abc import Callable
from pathlib import Path

import numpy as np


def open_onnx(path: Path) -> Callable[[np.ndarray], np.ndarray]:
    """Return a function that maps pixels (N, C, H, W) float32 in [0, 1] to logits (N, classes) float32."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return lambda pixels: np.asarray(session.run(["logits"], {"pixels": pixels})[0])
