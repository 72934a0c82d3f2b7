"""int8: the network as an ONNX file that computes with 8-bit integers, and the accuracy that this costs.

Its logits differ from the network's by design, so its accuracy is measured instead of its logits compared.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from classifier.data.dataset import CustomImageDataset
from classifier.data.loader import Batches
from classifier.export.onnx_file import open_onnx
from classifier.pipeline.errors import PipelineError

CALIBRATION_IMAGES = 512
BATCH = 64  # images in a calibration batch, which bounds the memory


def write_int8(
    path: Path,
    onnx_file: Path,
    splits: Mapping[str, CustomImageDataset],
    to_batches: Callable[[CustomImageDataset], Batches],
    *,
    seed: int,
    max_drop: float,
) -> dict[str, Any]:
    """Quantize a float ONNX file to 8-bit integers; return the cost in accuracy, for the manifest.

    splits: `train`, of which CALIBRATION_IMAGES set the ranges of the activations; and `val`, or `test` if `val` is
    empty, on which the accuracies are measured. to_batches: returns a dataset in batches on the CPU.
    seed: selects the calibration images. max_drop: see `accuracy_cost`.
    """
    train_set = splits["train"]
    chosen = np.random.default_rng(seed).permutation(len(train_set))[:CALIBRATION_IMAGES]
    quantize(onnx_file, train_set.pixels(chosen).numpy(), path)
    split, label = ("val", "validation") if len(splits["val"]) else ("test", "test")
    cost = accuracy_cost(path, onnx_file, to_batches(splits[split]), label, max_drop)
    print(
        f"{path.name}: accuracy {cost['accuracy']:.2%} on {cost['images']} {label} images, "
        f"{cost['float_accuracy']:.2%} in float32"
    )
    return cost


def quantize(onnx_file: Path, pixels: np.ndarray, path: Path) -> None:
    """Write the network of a float ONNX file with 8-bit weights and activations, in QDQ format.

    pixels: (N, C, H, W) float32 in [0, 1], calibration images that set the ranges of the activations.
    Weights have a scale for each output channel and use 7 bits: with 8 bits, sums saturate on processors without VNNI
    instructions, and results differ. The output of the last layer stays float, because logits of 256 levels would
    often be equal.
    """
    import onnx
    from onnxruntime.quantization import QuantType, quantize_static

    model = onnx.load(onnx_file)
    # torch's export already infers shapes and optimises; without this property, onnxruntime warns that this is missing
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
    """A CalibrationDataReader of onnxruntime that returns pixels in batches of BATCH."""

    def __init__(self, pixels: np.ndarray) -> None:
        self.batches = iter([pixels[start : start + BATCH] for start in range(0, len(pixels), BATCH)])

    def get_next(self) -> dict[str, np.ndarray] | None:
        batch = next(self.batches, None)
        return None if batch is None else {"pixels": batch}


def accuracy_cost(int8: Path, float32: Path, batches: Batches, split: str, max_drop: float) -> dict[str, Any]:
    """Return the accuracies of both ONNX files on the same images and the bytes that int8 saves, for the manifest.

    split: name of the images' split. Raises PipelineError if the accuracy drops by more than `max_drop`, a fraction.
    """
    images = batches.image_count
    correct, float_correct = _count_correct(int8, batches), _count_correct(float32, batches)
    if (float_correct - correct) / images > max_drop:
        raise PipelineError(
            f"int8: accuracy {correct / images:.2%} on {images} {split} images, {float_correct / images:.2%} in "
            f"float32; int8_max_drop allows a drop of {max_drop:.2%}. Raise int8_max_drop, or remove int8 from "
            "export_formats."
        )
    return {
        "images": images,
        "split": split,
        "accuracy": correct / images,
        "float_accuracy": float_correct / images,
        "bytes_saved": float32.stat().st_size - int8.stat().st_size,
    }


def _count_correct(path: Path, batches: Batches) -> int:
    logits = open_onnx(path)
    predicted = [logits(pixels.numpy()).argmax(1) for pixels, _ in batches.epoch()]
    return int((np.concatenate(predicted) == batches.dataset.labels.numpy()).sum())
