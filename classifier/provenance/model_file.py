"""Open model files from untrusted sources: check them, and bound the memory that they can use, before they run.

The manifest beside a file describes it but proves nothing, because whoever writes one can write both. Formats that can
contain code are opened only if this repository exported the file, or if the user trusts it.
"""

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from classifier.pipeline.errors import PipelineError
from classifier.pipeline.outputs import hash_file, read_json
from classifier.pipeline.paths import EXPORT

CODE = (".pth", ".pt2")  # suffixes of formats that are pickles or may contain them
BATCH = 256  # images in a batch
LARGEST_MANIFEST = 2**24  # bytes
LARGEST_SIDE = 4096  # pixels, the maximum of the parameter image_size
MOST_CLASSES = 100_000
# Limits of ONNX files. The first is protobuf's; the networks of classifier/networks stay far below the others.
LARGEST_ONNX = 2**31 - 1  # bytes
MOST_NODES = 100_000
LARGEST_VALUE = 2**28  # elements of a tensor whose size does not depend on the batch
LARGEST_VALUE_OF_IMAGE = 2**26  # elements for each image of a tensor whose size does
# Operators whose output can have more elements than their input: its size must be known before the file runs
GROWING = frozenset(
    ("CenterCropPad", "Col2Im", "ConstantOfShape", "Expand", "EyeLike", "GridSample", "MaxUnpool", "OneHot", "Pad",
     "RandomNormal", "RandomUniform", "Range", "Resize", "Tile", "Upsample")
)  # fmt: skip


class Model(NamedTuple):
    """An opened model file.

    logits: maps pixels (N, C, H, W) float32 in [0, 1] to logits (N, classes). classes: names by label.
    image_shape: (C, H, W). decoding: arguments of `decode_image` that bring an image file to that shape.
    """

    logits: Callable[[np.ndarray], np.ndarray]
    classes: list[str]
    image_shape: tuple[int, int, int]
    decoding: dict[str, Any] = {}  # noqa: RUF012, never changed


class Manifest(NamedTuple):
    """The content of a manifest.

    classes: names by label. image_shape: (C, H, W). decoding: arguments of `decode_image`. hashes: SHA-256 by file.
    """

    classes: list[str]
    image_shape: tuple[int, int, int]
    decoding: dict[str, Any]
    hashes: dict[str, str]


def open_model_file(path: Path, *, may_be_missing: bool = False, trust: bool = False) -> Model:
    """Open a model file after comparing it with the manifest beside it.

    may_be_missing: accept an ONNX file that the manifest does not list. Registered models have one even if onnx is not
    among export_formats.
    trust: also open files that may contain code and that this repository did not export.
    Raises PipelineError if the file is missing, differs from the manifest, exceeds the limits, or does not return a
    logit for each class.
    """
    source = path.with_name("manifest.json")
    if not path.is_file():
        raise PipelineError(f"{path}: no such model file")
    if not source.is_file():
        raise PipelineError(
            f"{source}: missing; it holds the names of the classes, so copy it from where {path.name} comes from"
        )
    manifest = read_manifest(source)
    recorded = manifest.hashes.get(path.name)
    if recorded is None and not may_be_missing:
        raise PipelineError(f"{path}: {source} does not list it; it lists {', '.join(manifest.hashes)}")
    if recorded not in (None, hash_file(path, "sha256")):
        raise PipelineError(
            f"{path}: not opened: its SHA-256 differs from {source}, and a model file can contain code. "
            f"`dvc checkout --force {EXPORT}` restores both; if these are copies, copy both again."
        )
    if path.suffix in CODE and not trust:
        from classifier.provenance.lineage import is_exported_here

        if not is_exported_here(path):
            raise PipelineError(
                f"{path}: not opened: it can contain code, and neither dvc.lock nor the registry of this repository "
                "lists its SHA-256. Use a .onnx or .safetensors file, or --trust if you trust its source."
            )
    try:
        logits = _open_onnx(path, manifest) if path.suffix == ".onnx" else _open(path)
        output = np.asarray(logits(np.zeros((1, *manifest.image_shape), np.float32)))
    except PipelineError:
        raise
    except Exception as error:  # a damaged file makes the libraries raise anything
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise PipelineError(f"{path}: damaged, or not a model for images {manifest.image_shape}: {reason}") from None
    if output.shape != (1, len(manifest.classes)):
        raise PipelineError(
            f"{path}: returns logits {output.shape} for one image, but {source} has {len(manifest.classes)} classes; "
            "copy both files from the same export"
        )
    return Model(logits, manifest.classes, manifest.image_shape, manifest.decoding)


def read_manifest(path: Path) -> Manifest:
    """Read a manifest that the export stage wrote. Raises PipelineError if it is not one."""
    if path.stat().st_size > LARGEST_MANIFEST:
        raise PipelineError(f"{path}: larger than {LARGEST_MANIFEST:,} bytes, so not a manifest that export wrote")
    content = read_json(path)
    try:
        classes, shape, files = content["classes"], content["input"]["shape"], content["files"]
        channels, height, width = shape[1:]
        hashes = {name: file["sha256"] for name, file in files.items()}
        decoding = content.get("decoding", {"fit": "crop"})  # which all images were before it was recorded
        fault = _fault_in_manifest(classes, (channels, height, width), hashes) or _fault_in_decoding(decoding)
    except (KeyError, TypeError, ValueError, AttributeError):
        fault = "it lacks the classes, the image shape or the files"
    if fault:
        raise PipelineError(f"{path}: not a manifest that export wrote: {fault}; use the one beside the exported file")
    return Manifest(classes, (channels, height, width), decoding, hashes)


def _fault_in_manifest(classes: Any, shape: tuple[Any, ...], hashes: dict[Any, Any]) -> str:
    if not (isinstance(classes, list) and all(isinstance(name, str) and name for name in classes)):
        return "its classes are not a list of names"
    if not 0 < len(classes) <= MOST_CLASSES or len(set(classes)) < len(classes):
        return f"it must have 1 to {MOST_CLASSES:,} different classes"
    if not all(type(size) is int and 0 < size <= LARGEST_SIDE for size in shape) or shape[0] not in (1, 3):
        return f"images cannot be {shape[0]!r:.20} x {shape[1]!r:.20} x {shape[2]!r:.20}"
    if not all(isinstance(sha256, str) for sha256 in hashes.values()):
        return "a SHA-256 is not a string"
    return ""


def _fault_in_decoding(decoding: dict[str, Any]) -> str:
    background, stored = decoding.get("background", [0, 0, 0]), decoding.get("stored_size") or [1, 1]
    is_right = (
        decoding.keys() <= {"fit", "background", "intensity", "stored_size"}
        and decoding.get("fit", "pad") in ("pad", "crop", "stretch")
        and decoding.get("intensity", "full") in ("full", "image")
        and len(background) == 3
        and all(type(value) is int and 0 <= value <= 255 for value in background)
        and len(stored) == 2
        and all(type(side) is int and 0 < side <= LARGEST_SIDE for side in stored)
    )
    return "" if is_right else "its decoding is not that of a version of this pipeline"


def _open(path: Path) -> Callable[[np.ndarray], np.ndarray]:
    from classifier.export.formats import open_model  # imports torch

    return open_model(path)


def _open_onnx(path: Path, manifest: Manifest) -> Callable[[np.ndarray], np.ndarray]:
    """Open an ONNX file if `_fault_in_graph` accepts it. Raises PipelineError if not."""
    import onnx
    import onnxruntime

    if path.stat().st_size > LARGEST_ONNX:
        raise PipelineError(f"{path}: larger than {LARGEST_ONNX:,} bytes, the limit of ONNX files")
    model = onnx.load_model_from_string(path.read_bytes())
    if fault := _fault_in_graph(model, manifest):
        raise PipelineError(f"{path}: not opened: {fault}")
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # the caller reports errors
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return lambda pixels: np.asarray(session.run(["logits"], {"pixels": pixels})[0])


def _fault_in_graph(model: Any, manifest: Manifest) -> str:
    """Return why an ONNX model is refused, or an empty string.

    It must use standard operators without loops, branches or external data, map pixels to logits, and stay within the
    limits for a batch of BATCH images.
    """
    import onnx

    graph = model.graph
    if len(graph.node) > MOST_NODES or model.functions:
        return f"it has more than {MOST_NODES:,} operators, or functions of its own"
    if foreign := {node.domain for node in graph.node if node.domain not in ("", "ai.onnx")}:
        return f"it has operators of {', '.join(sorted(foreign))}"
    if any(tensor.data_location == onnx.TensorProto.EXTERNAL for tensor in _tensors(graph)):
        return "its data is in another file"
    if any(attribute.HasField("g") or attribute.graphs for node in graph.node for attribute in node.attribute):
        return "it has loops or branches"
    initial = {tensor.name for tensor in graph.initializer}
    inputs = [value for value in graph.input if value.name not in initial]
    if [value.name for value in inputs] != ["pixels"] or [value.name for value in graph.output] != ["logits"]:
        return "it must have one input, pixels, and one output, logits"
    dimensions = inputs[0].type.tensor_type.shape.dim
    if len(dimensions) != 4 or dimensions[0].HasField("dim_value"):
        return "its pixels are not (batch, channels, height, width) with a dynamic batch size"
    if [dimension.dim_value for dimension in dimensions[1:]] != list(manifest.image_shape):
        return f"its images are not {' x '.join(map(str, manifest.image_shape))} as in the manifest"
    dimensions[0].dim_value = BATCH
    inferred = onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True, data_prop=True).graph
    dimensions[0].dim_param = "batch"
    shapes = {value.name: _shape(value) for value in (*inferred.value_info, *inferred.output)}
    for node in graph.node:
        for name in node.output:
            shape = shapes.get(name)
            if shape is None:
                if node.op_type in GROWING:
                    return f"the size of {name!r:.60}, an output of {node.op_type}, is unknown"
                continue
            limit = BATCH * LARGEST_VALUE_OF_IMAGE if shape[:1] == [BATCH] else LARGEST_VALUE
            if math.prod(shape) > limit:
                return f"{name!r:.60} has {' x '.join(map(str, shape))} elements"
    return ""


def _tensors(graph: Any) -> Iterator[Any]:
    """Yield all tensors of a graph that has no subgraphs."""
    attributes = [attribute for node in graph.node for attribute in node.attribute]
    sparse = [*graph.sparse_initializer, *(part for a in attributes for part in (a.sparse_tensor, *a.sparse_tensors))]
    yield from graph.initializer
    for attribute in attributes:
        yield from (attribute.t, *attribute.tensors)
    for tensor in sparse:
        yield from (tensor.values, tensor.indices)


def _shape(value: Any) -> list[int] | None:
    """Return the dimensions of a value; None if one of them is unknown."""
    tensor = value.type.tensor_type
    if not tensor.HasField("shape") or not all(dimension.HasField("dim_value") for dimension in tensor.shape.dim):
        return None
    return [dimension.dim_value for dimension in tensor.shape.dim]
