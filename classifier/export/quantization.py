"""int8: the network as an ONNX file that computes with 8-bit integers, and what that costs in accuracy.

It is not held to the tolerance of the other formats, for it answers otherwise by design: its accuracy is measured.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from classifier.data.dataset import CustomImageDataset
from classifier.data.loader import Batches, batches_of
from classifier.export.onnx_file import open_onnx
from classifier.pipeline.errors import PipelineError
from classifier.pipeline.params import Params

CALIBRATION_IMAGES = 512
BATCH = 64  # images that go through the network at once: it bounds the memory


def write_int8(path: Path, onnx_file: Path, splits: Mapping[str, CustomImageDataset], params: Params) -> dict[str, Any]:
    """Write the float ONNX file's network in 8-bit integers; return what that costs, for the manifest.

    splits: CALIBRATION_IMAGES of `train`, chosen by the seed, tell how large the activations become; on `val`, or on
    `test` if it is empty, accuracies are measured, see `accuracy_cost`.
    """
    train_set = splits["train"]
    chosen = np.random.default_rng(params.seed).permutation(len(train_set))[:CALIBRATION_IMAGES]
    quantize(onnx_file, train_set.pixels(chosen).numpy(), path)
    split, called = ("val", "validation") if len(splits["val"]) else ("test", "test")
    batches = batches_of(splits[split], params, torch.device("cpu"))
    cost = accuracy_cost(path, onnx_file, batches, called, params.int8_max_drop)
    print(
        f"{path.name}: right for {cost['accuracy']:.2%} of {cost['images']} {called} images, "
        f"the float network for {cost['float_accuracy']:.2%}"
    )
    return cost


def quantize(onnx_file: Path, pixels: np.ndarray, path: Path) -> None:
    """Write the network of a float ONNX file with 8-bit weights and activations, in the QDQ form.

    pixels: (N, C, H, W) float32 in [0, 1], images that tell how large the activations become.
    Weights have a scale for each output channel and keep to 7 bits: with 8, processors without VNNI instructions cut
    sums off and answer otherwise. What the last layer gives stays float: logits of 256 steps would often be equal.
    """
    import onnx
    from onnxruntime.quantization import QuantType, quantize_static

    model = onnx.load(onnx_file)
    # torch's export has already done what the pre-processing would; without this note a warning asks for it
    onnx.helper.set_model_props(model, {"onnx.quant.pre_process": "onnxruntime.quant"})
    quantize_static(
        model,
        path,
        _Images(pixels),
        per_channel=True,
        reduce_range=True,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
        extra_options={"OpTypesToExcludeOutputQuantization": ["Gemm", "MatMul"]},
    )


class _Images:
    """Pixels in the batches in which onnxruntime asks for them."""

    def __init__(self, pixels: np.ndarray) -> None:
        self.batches = iter([pixels[start : start + BATCH] for start in range(0, len(pixels), BATCH)])

    def get_next(self) -> dict[str, np.ndarray] | None:
        batch = next(self.batches, None)
        return None if batch is None else {"pixels": batch}


def accuracy_cost(int8: Path, float32: Path, batches: Batches, split: str, max_drop: float) -> dict[str, Any]:
    """The accuracies of both ONNX files on the same images and the bytes that int8 saves, for the manifest.

    split: what the images are called. Raises PipelineError if int8 costs more than `max_drop`, a fraction.
    """
    images = batches.image_count
    right, right_float = _count_right(int8, batches), _count_right(float32, batches)
    if (right_float - right) / images > max_drop:
        raise PipelineError(
            f"int8: right for {right / images:.2%} of {images} {split} images, the float network for "
            f"{right_float / images:.2%}; int8_max_drop allows {max_drop:.2%} less. Raise int8_max_drop, or take int8 "
            "out of export_formats."
        )
    return {
        "images": images,
        "split": split,
        "accuracy": right / images,
        "float_accuracy": right_float / images,
        "bytes_saved": float32.stat().st_size - int8.stat().st_size,
    }


def _count_right(path: Path, batches: Batches) -> int:
    logits = open_onnx(path)
    answers = [logits(pixels.numpy()).argmax(1) for pixels, _ in batches.epoch()]
    return int((np.concatenate(answers) == batches.dataset.labels.numpy()).sum())
