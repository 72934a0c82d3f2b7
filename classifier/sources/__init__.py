"""Data sources, one module each. A module `classifier/sources/<name>.py` has three functions:

fetch(raw: Path, data_path: Path) -> None
    Bring the data into the folder `raw`, complete and verified, or raise PipelineError.
class_names(raw: Path) -> list[str]
    The name of class 0, 1, ...
read(raw: Path) -> dict[str, LabelledImages]
    The splits "train" and "test", in the order in which they are to be kept.
"""

import importlib
from collections.abc import Sequence
from types import ModuleType
from typing import NamedTuple

import numpy as np


class LabelledImages(NamedTuple):
    """images: N arrays of (H, W) or (H, W, 3) uint8, maybe read only when asked for; labels: (N,) int64."""

    images: Sequence[np.ndarray] | np.ndarray
    labels: np.ndarray


def load_source(name: str) -> ModuleType:
    """The module of a source whose name `load_params` has checked."""
    return importlib.import_module(f"classifier.sources.{name}")
