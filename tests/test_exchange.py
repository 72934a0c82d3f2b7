"""The exported formats: read back in other processes, they give the network's logits, or an error."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from classifier.errors import PipelineError
from classifier.exchange import TOLERANCE, check_files, read_logits, write
from classifier.networks import build_network

FORMATS = ["pth", "pt2", "onnx"]
IMAGE_SHAPE, CLASSES = (3, 6, 6), 5
BATCH_SIZES = [1, 2, 5, 256]

READ_ALL = f"""
import sys
import numpy as np
from pathlib import Path
from classifier.exchange import read_logits
folder = Path(sys.argv[1])
pixels = np.load(folder / "pixels.npy")
for suffix in {FORMATS}:
    for size in {BATCH_SIZES}:
        np.save(folder / f"{{suffix}}-{{size}}.npy", read_logits(folder / f"model.{{suffix}}", pixels[:size]))
"""
WRITE_ALL = f"""
import sys
from pathlib import Path
import torch
from classifier.exchange import write
from classifier.networks import build_network
torch.manual_seed(0)
network = build_network("mlp", {IMAGE_SHAPE}, {CLASSES})
for suffix in {FORMATS}:
    write(network, torch.rand(2, *{IMAGE_SHAPE}), Path(sys.argv[1]) / f"model.{{suffix}}")
"""


def mlp(seed: int = 0, classes: int = CLASSES) -> nn.Module:
    torch.manual_seed(seed)
    return build_network("mlp", IMAGE_SHAPE, classes)


def some_pixels(count: int) -> Tensor:
    return torch.rand(count, *IMAGE_SHAPE, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the network in every format."""
    folder = tmp_path_factory.mktemp("export")
    for suffix in FORMATS:
        write(mlp(), some_pixels(2), folder / f"model.{suffix}")
    return folder


def test_every_format_gives_the_logits_at_every_batch_size(exported: Path) -> None:
    pixels = some_pixels(max(BATCH_SIZES))
    np.save(exported / "pixels.npy", pixels.numpy())
    subprocess.run([sys.executable, "-c", READ_ALL, str(exported)], check=True)
    with torch.inference_mode():
        expected = mlp().eval()(pixels).numpy()
    for suffix in FORMATS:
        for size in BATCH_SIZES:
            logits = np.load(exported / f"{suffix}-{size}.npy")
            assert logits.dtype == np.float32
            np.testing.assert_allclose(logits, expected[:size], rtol=0, atol=TOLERANCE, err_msg=f"{suffix}, {size}")


def test_a_network_in_training_mode_is_exported_in_evaluation_mode(tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Flatten(), nn.Linear(108, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 5))
    network.train()
    write(network, some_pixels(2), tmp_path / "model.pt2")
    pixels = some_pixels(4)
    logits = read_logits(tmp_path / "model.pt2", pixels.numpy())
    np.testing.assert_allclose(logits, network.eval()(pixels).detach().numpy(), rtol=0, atol=TOLERANCE)


def test_the_example_is_not_kept(exported: Path, tmp_path: Path) -> None:
    """Not even what lies behind a view: the images are the user's."""
    write(mlp(), some_pixels(1000)[:2], tmp_path / "model.pt2")
    assert (tmp_path / "model.pt2").stat().st_size == (exported / "model.pt2").stat().st_size


@pytest.mark.slow
def test_check_files_returns_the_differences(exported: Path) -> None:
    differences = check_files([exported / "model.pth", exported / "model.onnx"], mlp(), some_pixels(7))
    assert set(differences) == {"model.pth", "model.onnx"}
    assert differences["model.pth"] == 0
    assert 0 <= differences["model.onnx"] <= TOLERANCE


def test_check_files_refuses_other_weights(exported: Path) -> None:
    with pytest.raises(PipelineError, match=r"^model\.pth: its logits differ .* on 7 test images; at most 1e-04 is"):
        check_files([exported / "model.pth"], mlp(seed=1), some_pixels(7))


@pytest.mark.slow
def test_check_files_refuses_other_classes(exported: Path) -> None:
    with pytest.raises(PipelineError, match=r"^model\.pth: gives 5 logits an image, not 6$"):
        check_files([exported / "model.pth"], mlp(classes=6), some_pixels(7))


@pytest.mark.slow
def test_check_files_refuses_what_is_not_a_number(tmp_path: Path) -> None:
    network = mlp()
    with torch.no_grad():
        next(network.parameters()).fill_(torch.nan)
    write(network, some_pixels(2), tmp_path / "model.pth")
    with pytest.raises(PipelineError, match=r"^model\.pth: its logits differ from the trained network's by nan"):
        check_files([tmp_path / "model.pth"], mlp(), some_pixels(7))


@pytest.mark.parametrize(
    "suffix",
    ["onnx", pytest.param("pt2", marks=pytest.mark.slow), pytest.param("pth", marks=pytest.mark.slow)],
)
def test_check_files_refuses_half_a_file(exported: Path, tmp_path: Path, suffix: str) -> None:
    content = (exported / f"model.{suffix}").read_bytes()
    (tmp_path / f"model.{suffix}").write_bytes(content[: len(content) // 2])
    with pytest.raises(PipelineError, match=rf"^model\.{suffix}: cannot be read back: \S") as caught:
        check_files([tmp_path / f"model.{suffix}"], mlp(), some_pixels(7))
    assert "\n" not in str(caught.value)


def test_unknown_formats_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.h5"
    with pytest.raises(PipelineError, match=r"model\.h5: the formats are \.pth, \.pt2, \.onnx and \.safetensors"):
        write(mlp(), some_pixels(2), path)
    assert not path.exists()
    write(mlp(), some_pixels(2), tmp_path / "model.pth")
    (tmp_path / "model.pth").rename(path)
    with pytest.raises(PipelineError, match=r"model\.h5: the formats are \.pth, \.pt2, \.onnx and \.safetensors"):
        read_logits(path, some_pixels(1).numpy())


@pytest.mark.slow
def test_two_processes_write_the_same_bytes(tmp_path: Path) -> None:
    for folder in ("first", "second"):
        (tmp_path / folder).mkdir()
        subprocess.run([sys.executable, "-c", WRITE_ALL, str(tmp_path / folder)], check=True, capture_output=True)
    for suffix in FORMATS:
        first, second = ((tmp_path / folder / f"model.{suffix}").read_bytes() for folder in ("first", "second"))
        assert first == second, suffix
