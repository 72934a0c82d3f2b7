"""A model file that may be anybody's: checked, and bounded in what it can ask for, before an image is given to it.

A manifest beside it says what the file is, and vouches for nothing: whoever writes one file can write both. Formats
that hold code are opened if this repository has exported the file, or if the user says so.
"""

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from classifier.pipeline.errors import PipelineError
from classifier.pipeline.outputs import hash_file, read_json
from classifier.pipeline.paths import EXPORT

CODE = (".pth", ".pt2")  # suffixes of formats that are, or may hold, pickles
BATCH = 256  # images that a model is given at once
LARGEST_MANIFEST = 2**24  # bytes
LARGEST_SIDE = 4096  # pixels of an image, as of image_size
MOST_CLASSES = 100_000
# Of an ONNX file. Protobuf reads no more; a network of classifier/networks stays far below the others.
LARGEST_ONNX = 2**31 - 1  # bytes
MOST_NODES = 100_000
LARGEST_VALUE = 2**28  # elements of a tensor that does not grow with the batch
LARGEST_VALUE_OF_IMAGE = 2**26  # elements for each image of one that does
# Operators that make more elements than they are given: how many must be known before the file is run
GROWING = frozenset(
    ("CenterCropPad", "Col2Im", "ConstantOfShape", "Expand", "EyeLike", "GridSample", "MaxUnpool", "OneHot", "Pad",
     "RandomNormal", "RandomUniform", "Range", "Resize", "Tile", "Upsample")
)  # fmt: skip


class Model(NamedTuple):
    """An opened file: logits (N, classes) of pixels (N, C, H, W) float32 in [0, 1]; classes by label; (C, H, W)."""

    logits: Callable[[np.ndarray], np.ndarray]
    classes: list[str]
    image_shape: tuple[int, int, int]


class Manifest(NamedTuple):
    """What a manifest says: the classes by label, (C, H, W), and by name the SHA-256 of each file."""

    classes: list[str]
    image_shape: tuple[int, int, int]
    hashes: dict[str, str]


def open_model_file(path: Path, *, may_be_missing: bool = False, trust: bool = False) -> Model:
    """Open a model file that is what the manifest beside it says, and gives a logit for each class.

    may_be_missing: take an ONNX file of which the manifest does not speak, as in the registry, where it is also if it
    is not among the formats that were exported.
    trust: also open files that may hold code and that this repository does not know.
    Raises PipelineError if there is no such file, it is not what the manifest says, or its answers are no logits.
    """
    source = path.with_name("manifest.json")
    if not path.is_file():
        raise PipelineError(f"{path}: no such model file")
    if not source.is_file():
        raise PipelineError(
            f"{source}: missing; it tells the model's classes, so copy it from where {path.name} is from"
        )
    manifest = read_manifest(source)
    recorded = manifest.hashes.get(path.name)
    if recorded is None and not may_be_missing:
        raise PipelineError(f"{path}: not among the files of {source}, which are {', '.join(manifest.hashes)}")
    if recorded not in (None, hash_file(path, "sha256")):
        raise PipelineError(
            f"{path}: not the file that {source} speaks of: its SHA-256 is another. It is not opened, because a model "
            f"file can hold code. `dvc checkout --force {EXPORT}` brings back both as they were exported; copy both "
            "where they are copies."
        )
    if path.suffix in CODE and not trust:
        from classifier.provenance.lineage import is_exported_here

        if not is_exported_here(path):
            raise PipelineError(
                f"{path}: not opened: it can hold code, and neither dvc.lock nor the registry of this repository knows "
                "its SHA-256. Use a .onnx or .safetensors file, or --trust if you know where it is from."
            )
    try:
        logits = _opened_onnx(path, manifest) if path.suffix == ".onnx" else _opened(path)
        answer = np.asarray(logits(np.zeros((1, *manifest.image_shape), np.float32)))
    except PipelineError:
        raise
    except Exception as error:  # a broken file makes the libraries raise anything
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise PipelineError(f"{path}: broken, or no model of images {manifest.image_shape}: {reason}") from None
    if answer.shape != (1, len(manifest.classes)):
        raise PipelineError(
            f"{path}: gives logits {answer.shape} for one image, but {source} has {len(manifest.classes)} classes; "
            "take both files from the same export"
        )
    return Model(logits, manifest.classes, manifest.image_shape)


def read_manifest(path: Path) -> Manifest:
    """Read a manifest that `export` wrote. Raises PipelineError if it is another file."""
    if path.stat().st_size > LARGEST_MANIFEST:
        raise PipelineError(f"{path}: larger than {LARGEST_MANIFEST:,} bytes, so not a manifest that export wrote")
    content = read_json(path)
    try:
        classes, shape, files = content["classes"], content["input"]["shape"], content["files"]
        channels, height, width = shape[1:]
        hashes = {name: file["sha256"] for name, file in files.items()}
        fault = _fault_in_manifest(classes, (channels, height, width), hashes)
    except (KeyError, TypeError, ValueError, AttributeError):
        fault = "it lacks classes, the shape of an image, or files"
    if fault:
        raise PipelineError(f"{path}: not a manifest that export wrote: {fault}; take the one beside the exported file")
    return Manifest(classes, (channels, height, width), hashes)


def _fault_in_manifest(classes: Any, shape: tuple[Any, ...], hashes: dict[Any, Any]) -> str:
    if not (isinstance(classes, list) and all(isinstance(name, str) and name for name in classes)):
        return "its classes are not a list of names"
    if not 0 < len(classes) <= MOST_CLASSES or len(set(classes)) < len(classes):
        return f"its classes are none, more than {MOST_CLASSES:,}, or not all different"
    if not all(type(size) is int and 0 < size <= LARGEST_SIDE for size in shape) or shape[0] not in (1, 3):
        return f"images cannot be {shape[0]!r:.20} x {shape[1]!r:.20} x {shape[2]!r:.20}"
    if not all(isinstance(sha256, str) for sha256 in hashes.values()):
        return "a SHA-256 is no text"
    return ""


def _opened(path: Path) -> Callable[[np.ndarray], np.ndarray]:
    from classifier.export.formats import open_model  # which imports torch

    return open_model(path)


def _opened_onnx(path: Path, manifest: Manifest) -> Callable[[np.ndarray], np.ndarray]:
    """Open an ONNX file whose values are bounded, and that is alone: no other file, no code, no loop."""
    import onnx
    import onnxruntime

    if path.stat().st_size > LARGEST_ONNX:
        raise PipelineError(f"{path}: larger than {LARGEST_ONNX:,} bytes, which no ONNX file may be")
    model = onnx.load_model_from_string(path.read_bytes())
    if fault := _fault_in_graph(model, manifest):
        raise PipelineError(f"{path}: not opened: {fault}")
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # what is wrong is told once, by whoever calls
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return lambda pixels: np.asarray(session.run(["logits"], {"pixels": pixels})[0])


def _fault_in_graph(model: Any, manifest: Manifest) -> str:
    """Return what is wrong with an ONNX model, or nothing."""
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
        return "it does not take pixels alone and give logits alone"
    dimensions = inputs[0].type.tensor_type.shape.dim
    if len(dimensions) != 4 or dimensions[0].HasField("dim_value"):
        return "its pixels are not (batch, channels, height, width), of any batch"
    if [dimension.dim_value for dimension in dimensions[1:]] != list(manifest.image_shape):
        return f"its images are not {' x '.join(map(str, manifest.image_shape))}, as the manifest says"
    dimensions[0].dim_value = BATCH
    inferred = onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True, data_prop=True).graph
    dimensions[0].dim_param = "batch"
    shapes = {value.name: _shape(value) for value in (*inferred.value_info, *inferred.output)}
    for node in graph.node:
        for name in node.output:
            shape = shapes.get(name)
            if shape is None:
                if node.op_type in GROWING:
                    return f"how large {node.op_type} makes {name!r:.60} cannot be told"
                continue
            limit = BATCH * LARGEST_VALUE_OF_IMAGE if shape[:1] == [BATCH] else LARGEST_VALUE
            if math.prod(shape) > limit:
                return f"{name!r:.60} has {' x '.join(map(str, shape))} elements"
    return ""


def _tensors(graph: Any) -> Iterator[Any]:
    """Yield all tensors that a graph without graphs in it holds."""
    attributes = [attribute for node in graph.node for attribute in node.attribute]
    sparse = [*graph.sparse_initializer, *(part for a in attributes for part in (a.sparse_tensor, *a.sparse_tensors))]
    yield from graph.initializer
    for attribute in attributes:
        yield from (attribute.t, *attribute.tensors)
    for tensor in sparse:
        yield from (tensor.values, tensor.indices)


def _shape(value: Any) -> list[int] | None:
    """The dimensions of a value; None if one of them is not known."""
    tensor = value.type.tensor_type
    if not tensor.HasField("shape") or not all(dimension.HasField("dim_value") for dimension in tensor.shape.dim):
        return None
    return [dimension.dim_value for dimension in tensor.shape.dim]
