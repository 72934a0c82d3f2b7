"""Untrusted model files are refused with one message before any of their code runs."""

import hashlib
import json
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from hostile import RunsCodeWhenUnpickled
from onnx import TensorProto, helper, numpy_helper

from classifier.export.formats import write, write_weights
from classifier.networks import build_network
from classifier.pipeline.errors import PipelineError
from classifier.provenance.model_file import open_model_file

SHAPE, CLASSES = (1, 4, 6), ["cat", "dog"]
WEIGHTS = np.ones((24, 2), np.float32)


def manifest(path: Path, **changes: Any) -> None:
    """Write a manifest that matches a file except for the changes."""
    content = {
        "classes": CLASSES,
        "input": {"shape": ["batch", *SHAPE]},
        "files": {path.name: {"sha256": hashlib.sha256(path.read_bytes()).hexdigest()}},
    }
    path.with_name("manifest.json").write_text(json.dumps(content | changes))


def graph_of(
    *more: onnx.NodeProto, outputs: tuple[Any, ...] = ("batch", 2), weights: np.ndarray = WEIGHTS, last: str = "product"
) -> onnx.ModelProto:
    """Build an ONNX model of one matrix product and `more` operators; the output `last` becomes the logits."""
    nodes = [
        helper.make_node("Flatten", ["pixels"], ["flat"]),
        helper.make_node("MatMul", ["flat", "weights"], ["product"]),
        *more,
        helper.make_node("Identity", [last], ["logits"]),
    ]
    graph = helper.make_graph(
        nodes, "graph",
        [helper.make_tensor_value_info("pixels", TensorProto.FLOAT, ["batch", *SHAPE])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, outputs)],
        [numpy_helper.from_array(weights, "weights")],
    )  # fmt: skip
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def write_onnx(folder: Path, model: onnx.ModelProto, **changes: Any) -> Path:
    path = folder / "model.onnx"
    path.write_bytes(model.SerializeToString())
    manifest(path, **changes)
    return path


def test_a_model_answers_for_any_batch(tmp_path: Path) -> None:
    model = open_model_file(write_onnx(tmp_path, graph_of()))
    assert (model.classes, model.image_shape) == (CLASSES, SHAPE)
    assert model.logits(np.ones((3, *SHAPE), np.float32)).tolist() == [[24, 24]] * 3


@pytest.mark.slow
def test_a_network_of_ours_is_within_the_bounds(tmp_path: Path) -> None:
    network = build_network("cnn", (1, 28, 28), 10).eval()
    classes = [str(number) for number in range(10)]
    path = tmp_path / "model.onnx"
    write(network, torch.rand(2, 1, 28, 28), path)
    manifest(path, classes=classes, input={"shape": ["batch", 1, 28, 28]})
    assert open_model_file(path).classes == classes


def constant(name: str, value: list[int]) -> onnx.NodeProto:
    return helper.make_node("Constant", [], [name], value=numpy_helper.from_array(np.array(value, np.int64)))


def huge(*operators: onnx.NodeProto) -> onnx.ModelProto:
    """Build a model that adds the sum of a huge tensor."""
    total = helper.make_node("ReduceSum", ["huge"], ["sum"], keepdims=0)
    return graph_of(*operators, total, helper.make_node("Add", ["product", "sum"], ["added"]), last="added")


def with_external_data(place: str) -> onnx.ModelProto:
    tensor = numpy_helper.from_array(WEIGHTS, "weights")
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="../../etc/passwd")
    model = graph_of()
    if place == "initializer":
        model.graph.initializer[0].CopyFrom(tensor)
    else:
        del model.graph.initializer[0]
        model.graph.node.insert(0, helper.make_node("Constant", [], ["weights"], value=tensor))
    return model


def with_branch() -> onnx.ModelProto:
    branch = helper.make_graph(
        [helper.make_node("Identity", ["product"], ["out"])], "branch", [],
        [helper.make_tensor_value_info("out", TensorProto.FLOAT, None)],
    )  # fmt: skip
    condition = helper.make_node("Constant", [], ["yes"], value=helper.make_tensor("yes", TensorProto.BOOL, [], [True]))
    chosen = helper.make_node("If", ["yes"], ["chosen"], then_branch=branch, else_branch=branch)
    return graph_of(condition, chosen, last="chosen")


HOSTILE: dict[str, tuple[Callable[[], onnx.ModelProto | None], str]] = {
    "garbage": (lambda: None, "damaged, or not a model for images"),
    "data elsewhere": (lambda: with_external_data("initializer"), "its data is in another file"),
    "data elsewhere, of an operator": (lambda: with_external_data("operator"), "its data is in another file"),
    "a huge constant": (
        lambda: huge(constant("size", [200_000, 100_000]), helper.make_node("ConstantOfShape", ["size"], ["huge"])),
        "'huge' has 200000 x 100000 elements",
    ),
    "a constant expanded": (
        lambda: huge(constant("size", [9, 10**9]), constant("one", [1]),
                     helper.make_node("Cast", ["one"], ["float"], to=TensorProto.FLOAT),
                     helper.make_node("Expand", ["float", "size"], ["huge"])),
        "'huge' has 9 x 1000000000 elements",
    ),
    "a size that is computed": (
        lambda: huge(helper.make_node("Cast", ["pixels"], ["whole"], to=TensorProto.INT64),
                     helper.make_node("ReduceMax", ["whole"], ["most"], keepdims=0),
                     constant("shape", [1]), helper.make_node("Reshape", ["most", "shape"], ["size"]),
                     helper.make_node("ConstantOfShape", ["size"], ["huge"])),
        "the size of 'huge', an output of ConstantOfShape, is unknown",
    ),
    "a branch": (with_branch, "it has loops or branches"),
    "a foreign operator": (
        lambda: graph_of(helper.make_node("Any", ["product"], ["any"], domain="com.evil"), last="any"),
        "it has operators of com.evil",
    ),
    "a scalar": (
        lambda: graph_of(helper.make_node("ReduceSum", ["product"], ["all"], keepdims=0), last="all", outputs=()),
        r"returns logits \(\) for one image, but .*manifest\.json has 2 classes",
    ),
    "more logits": (
        lambda: graph_of(weights=np.ones((24, 3), np.float32), outputs=("batch", 3)),
        r"returns logits \(1, 3\) for one image, but .*manifest\.json has 2 classes",
    ),
    "fewer logits": (
        lambda: graph_of(weights=np.ones((24, 1), np.float32), outputs=("batch", 1)),
        r"returns logits \(1, 1\) for one image, but .*manifest\.json has 2 classes",
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_hostile_or_contradictory_onnx_file_is_refused(tmp_path: Path, kind: str) -> None:
    make, complaint = HOSTILE[kind]
    model = make()
    path = write_onnx(tmp_path, model or graph_of())
    if model is None:
        path.write_bytes(b"\x08garbage" * 99)
        manifest(path)
    with pytest.raises(PipelineError, match=complaint):
        open_model_file(path)


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"classes": [0, 1]}, "its classes are not a list of names"),
        ({"classes": {"0": "cat", "1": "dog"}}, "its classes are not a list of names"),
        ({"classes": ["cat", ""]}, "its classes are not a list of names"),
        ({"classes": ["cat", "cat"]}, "1 to 100,000 different classes"),
        ({"classes": []}, "it must have 1 to 100,000 different classes"),
        ({"input": {"shape": ["batch", 1, 4, 10**6]}}, "images cannot be 1 x 4 x 1000000"),
        ({"input": {"shape": ["batch", 1, 4, "6"]}}, "images cannot be 1 x 4 x '6'"),
        ({"input": {"shape": ["batch", 2, 4, 6]}}, "images cannot be 2 x 4 x 6"),
        ({"input": {"shape": ["batch", 3, 4, 6]}}, "its images are not 3 x 4 x 6 as in the manifest"),
        ({"files": {"model.onnx": {"sha256": 1}}}, "a SHA-256 is not a string"),
    ],
)
def test_a_manifest_that_is_at_fault_is_named(tmp_path: Path, changes: dict[str, Any], complaint: str) -> None:
    path = write_onnx(tmp_path, graph_of(), **changes)
    with pytest.raises(PipelineError, match=complaint):
        open_model_file(path)


@pytest.mark.parametrize("nested", ["[" * 200_000, '{"classes":' * 200_000])
def test_a_manifest_that_is_nested_deeply_is_refused(tmp_path: Path, nested: str) -> None:
    path = write_onnx(tmp_path, graph_of())
    path.with_name("manifest.json").write_text(nested)
    with pytest.raises(PipelineError, match=r"manifest\.json: not valid JSON"):
        open_model_file(path)


def test_a_manifest_of_any_size_is_not_read(tmp_path: Path) -> None:
    path = write_onnx(tmp_path, graph_of())
    with path.with_name("manifest.json").open("r+b") as file:
        file.truncate(2**40)
    with pytest.raises(PipelineError, match=r"manifest\.json: larger than"):
        open_model_file(path)


# Formats that can contain code


def write_pickle(path: Path, ran: Path) -> None:
    path.write_bytes(pickle.dumps(RunsCodeWhenUnpickled(ran)))


def write_archive(path: Path, ran: Path) -> None:
    """Write a zip with a pickle, as torch does for both formats."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("model/data.pkl", pickle.dumps(RunsCodeWhenUnpickled(ran)))
        archive.writestr("model/version", "3\n")


@pytest.mark.parametrize("make", [write_pickle, write_archive])
@pytest.mark.parametrize("name", ["model.pth", "model.pt2"])
def test_a_file_that_a_manifest_vouches_for_runs_no_code(
    tmp_path: Path, make: Callable[[Path, Path], None], name: str
) -> None:
    path, ran = tmp_path / name, tmp_path / "ran"
    make(path, ran)
    manifest(path)
    with pytest.raises(PipelineError, match=r"not opened: it can contain code, and neither dvc\.lock nor the registry"):
        open_model_file(path)
    assert not ran.exists()


@pytest.mark.parametrize("name", ["model.pth", "model.pt2", "model.safetensors"])
@pytest.mark.parametrize("content", [b"junk" * 99, pickle.dumps({"a": 1}), b""])
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")  # torch's, about what it cannot read
def test_a_broken_file_that_is_trusted_is_told(tmp_path: Path, name: str, content: bytes) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    manifest(path)
    with pytest.raises(PipelineError, match=rf"{name}: damaged, or not"):
        open_model_file(path, trust=True)


@pytest.mark.parametrize("name", ["model.pth", "model.safetensors"])
def test_a_trusted_file_and_one_without_code_answer(tmp_path: Path, name: str) -> None:
    network = build_network("mlp", SHAPE, 2).eval()
    path = tmp_path / name
    if name == "model.safetensors":
        write_weights(network, "mlp", SHAPE, 2, path)
    else:
        write(network, torch.rand(2, *SHAPE), path)
    manifest(path)
    assert open_model_file(path, trust=name == "model.pth").classes == CLASSES
