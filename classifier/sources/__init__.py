"""Data sources, one module each. A module `classifier/sources/<name>.py` has three functions:

fetch(raw: Path, data_path: Path) -> None
    Bring the data into the folder `raw`, complete and verified, or raise PipelineError.
class_names(raw: Path) -> list[str]
    The name of class 0, 1, ...
read(raw: Path) -> dict[str, LabelledImages]
    The splits that the data has, in the order in which they are to be kept: "train", and "val" and "test" unless these
    are to be cut from it.
"""

import importlib
from collections.abc import Sequence
from types import ModuleType
from typing import NamedTuple

import numpy as np


class LabelledImages(NamedTuple):
    """N images of a split, read only when they are asked for.

    images: each the bytes of an image file, or pixels as an array (H, W) or (H, W, 3) uint8. A slice of them can be
        pickled: worker processes decode the images.
    labels: (N,) int64.
    names: of the N images in the user's data, each once in all splits; None if it has no names.
    """

    images: Sequence[np.ndarray | bytes] | np.ndarray
    labels: np.ndarray
    names: Sequence[str] | None = None


def load_source(name: str) -> ModuleType:
    """The module of a source whose name `load_params` has checked."""
    return importlib.import_module(f"classifier.sources.{name}")
