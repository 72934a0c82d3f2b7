"""int8: logits close to float32, a quarter of the bytes, reproducible files, or an error."""

import subprocess
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from project import python
from small_images import CLASSES, make_images
from torch import nn

from classifier.data.dataset import CustomImageDataset
from classifier.data.loader import Batches
from classifier.export.formats import read_logits, write
from classifier.export.quantization import BATCH, accuracy_cost, quantize
from classifier.pipeline.errors import PipelineError

SIZE = 12

QUANTIZE = """
import sys
from pathlib import Path
import numpy as np
from classifier.export.quantization import quantize
folder = Path(sys.argv[1])
quantize(folder / "model.onnx", np.load(folder / "pixels.npy"), Path(sys.argv[2]))
"""


class Shift(nn.Module):
    """Normalise the input, as the networks of the product do."""

    def __init__(self) -> None:
        super().__init__()
        self.mean: torch.Tensor
        self.register_buffer("mean", torch.tensor([0.5]))

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return (pixels - self.mean) / 0.25


def trained() -> nn.Module:
    """Train a network with the layers of convolutional networks on `images` for 20 steps."""
    torch.manual_seed(0)
    network = nn.Sequential(
        Shift(),
        nn.Conv2d(1, 32, 3, padding=1, bias=False),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(32, 64, 3, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Dropout(0.2),
        nn.Linear(256, CLASSES),
    )
    optimizer = torch.optim.Adam(network.parameters(), 0.01)
    pixels = images(200)
    for _ in range(20):
        optimizer.zero_grad()
        nn.functional.cross_entropy(network(pixels), torch.arange(200) % CLASSES).backward()
        optimizer.step()
    return network.eval()


def images(count: int, seed: int = 0) -> torch.Tensor:
    """Return noise (count, 1, SIZE, SIZE) with a dark quarter, whose position is the class: 0, 1, 2, 3, 0, ..."""
    pixels = torch.rand(count, 1, SIZE, SIZE, generator=torch.Generator().manual_seed(seed))
    for index in range(count):
        row, column = divmod(index % CLASSES, 2)
        pixels[index, 0, row * 6 : row * 6 + 6, column * 6 : column * 6 + 6] /= 2
    return pixels


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with model.onnx, the pixels.npy that it is quantised with, and model.int8.onnx."""
    folder = tmp_path_factory.mktemp("quantized")
    write(trained(), images(2), folder / "model.onnx")
    np.save(folder / "pixels.npy", images(BATCH + 3).numpy())
    quantize(folder / "model.onnx", images(BATCH + 3).numpy(), folder / "model.int8.onnx")
    return folder


def test_it_answers_nearly_as_the_float_network_at_every_batch_size(exported: Path) -> None:
    pixels = images(400, seed=1).numpy()
    expected = read_logits(exported / "model.onnx", pixels)
    logits = read_logits(exported / "model.int8.onnx", pixels)
    assert logits.dtype == np.float32
    assert logits.shape == (400, CLASSES)
    assert (logits.argmax(1) == expected.argmax(1)).mean() > 0.97
    assert 0 < np.abs(logits - expected).max() < 0.1 * np.abs(expected).max()
    np.testing.assert_allclose(read_logits(exported / "model.int8.onnx", pixels[:1]), logits[:1], rtol=0, atol=1e-4)


def test_weights_are_bytes_and_logits_stay_float(exported: Path) -> None:
    small, large = ((exported / name).stat().st_size for name in ("model.int8.onnx", "model.onnx"))
    assert small < 0.6 * large  # with so few weights, scales and names take a large part
    model = onnx.load(exported / "model.int8.onnx")
    types = {tensor.name: tensor.data_type for tensor in model.graph.initializer if len(tensor.dims) > 1}
    assert set(types.values()) == {onnx.TensorProto.INT8}
    (last,) = [node for node in model.graph.node if "logits" in node.output]
    assert last.op_type == "Gemm"
    assert len(np.unique(read_logits(exported / "model.int8.onnx", images(400).numpy()))) > 256


def test_convolutions_have_a_scale_for_each_channel_and_weights_keep_to_seven_bits(exported: Path) -> None:
    """With eight bits, sums of two products saturate on processors without VNNI."""
    graph = onnx.load(exported / "model.int8.onnx").graph
    tensors = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in graph.initializer}
    weights = {name: tensor for name, tensor in tensors.items() if tensor.dtype == np.int8 and tensor.ndim > 1}
    scales = [tensors[node.input[1]] for node in graph.node if node.input[0] in weights]
    assert sorted(scale.size for scale in scales) == [CLASSES, 32, 64]
    assert all(np.abs(tensor).max() == 64 for tensor in weights.values())


@pytest.mark.slow
def test_two_processes_write_the_same_bytes(exported: Path, tmp_path: Path) -> None:
    for name in ("first", "second"):
        subprocess.run([python(), "-c", QUANTIZE, str(exported), str(tmp_path / name)], check=True)
        assert (tmp_path / name).read_bytes() == (exported / "model.int8.onnx").read_bytes()


@pytest.fixture
def batches(tmp_path: Path) -> Batches:
    dataset = CustomImageDataset(*make_images(tmp_path, 50, SIZE))
    return Batches(dataset, 8, torch.device("cpu"), memory_limit_gib=1, workers=0)


def constant(path: Path, answer: int) -> Path:
    """Write an ONNX file that predicts the same class for every image."""
    layer = nn.Linear(SIZE * SIZE, CLASSES)
    with torch.no_grad():
        layer.weight.zero_()
        layer.bias.copy_(torch.eye(CLASSES)[answer])
    write(nn.Sequential(nn.Flatten(), layer), images(2), path)
    return path


def test_the_cost_is_counted_in_images(batches: Batches, tmp_path: Path) -> None:
    """Of 50 images 13 are of class 0 and 12 of class 3."""
    better, worse = constant(tmp_path / "better.onnx", 0), constant(tmp_path / "worse.onnx", 3)
    facts = accuracy_cost(worse, better, batches, "validation", max_drop=0.02)  # exactly the drop
    saved = better.stat().st_size - worse.stat().st_size
    assert facts == {
        "images": 50, "split": "validation", "accuracy": 0.24, "float_accuracy": 0.26, "bytes_saved": saved,
    }  # fmt: skip
    assert accuracy_cost(better, worse, batches, "test", max_drop=0)["accuracy"] == 0.26
    with pytest.raises(PipelineError) as caught:
        accuracy_cost(worse, better, batches, "validation", max_drop=0.019)
    assert str(caught.value) == (
        "int8: accuracy 24.00% on 50 validation images, 26.00% in float32; int8_max_drop allows a drop of 1.90%. "
        "Raise int8_max_drop, or remove int8 from export_formats."
    )
