"""The exported formats: read in another process, they return the network's logits or raise an error."""

import json
import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from hostile import RunsCodeWhenUnpickled
from project import python
from torch import Tensor, nn

from classifier.export.formats import TOLERANCE, TemperatureScaled, read_logits, start_checker, write, write_weights
from classifier.networks import Mirrored, build_network
from classifier.pipeline.errors import PipelineError

FORMATS = ["pth", "pt2", "onnx", "safetensors"]
IMAGE_SHAPE, CLASSES = (3, 6, 6), 5
BATCH_SIZES = [1, 2, 5, 256]

READ_ALL = f"""
import sys
import numpy as np
from contextlib import nullcontext
from pathlib import Path
from classifier.export.formats import read_logits
folder = Path(sys.argv[1])
pixels = np.load(folder / "pixels.npy")
for suffix in {FORMATS}:
    for size in {BATCH_SIZES}:
        np.save(folder / f"{{suffix}}-{{size}}.npy", read_logits(folder / f"model.{{suffix}}", pixels[:size]))
"""
WRITE_ALL = f"""
import sys
from contextlib import nullcontext
from pathlib import Path
import torch
from classifier.export.formats import write, write_weights
from classifier.networks import build_network
torch.manual_seed(0)
network = build_network("mlp", {IMAGE_SHAPE}, {CLASSES})
for suffix in {FORMATS[:3]}:
    write(network, torch.rand(2, *{IMAGE_SHAPE}), Path(sys.argv[1]) / f"model.{{suffix}}")
write_weights(network, "mlp", {IMAGE_SHAPE}, {CLASSES}, Path(sys.argv[1]) / "model.safetensors")
"""


def check_files(paths: list[Path], network: nn.Module, pixels: torch.Tensor) -> dict[str, float]:
    with start_checker(paths) as check:
        return check(network, pixels)


def mlp(seed: int = 0, classes: int = CLASSES) -> nn.Module:
    torch.manual_seed(seed)
    return build_network("mlp", IMAGE_SHAPE, classes)


def some_pixels(count: int) -> Tensor:
    return torch.rand(count, *IMAGE_SHAPE, generator=torch.Generator().manual_seed(0))


def write_all(network: nn.Module, folder: Path) -> None:
    """Write the network in every format."""
    for suffix in FORMATS[:3]:
        write(network, some_pixels(2), folder / f"model.{suffix}")
    write_weights(network, "mlp", IMAGE_SHAPE, CLASSES, folder / "model.safetensors")


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("export")
    write_all(mlp(), folder)
    return folder


@pytest.fixture(autouse=True)
def quick_checks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fork the checking process from one that has imported torch."""
    monkeypatch.setattr(sys, "executable", python())


def test_every_format_gives_the_logits_at_every_batch_size(exported: Path) -> None:
    pixels = some_pixels(max(BATCH_SIZES))
    np.save(exported / "pixels.npy", pixels.numpy())
    subprocess.run([python(), "-c", READ_ALL, str(exported)], check=True)
    with torch.inference_mode():
        expected = mlp().eval()(pixels).numpy()
    for suffix in FORMATS:
        for size in BATCH_SIZES:
            logits = np.load(exported / f"{suffix}-{size}.npy")
            assert logits.dtype == np.float32
            np.testing.assert_allclose(logits, expected[:size], rtol=0, atol=TOLERANCE, err_msg=f"{suffix}, {size}")


@pytest.mark.slow
def test_every_format_gives_the_logits_of_a_mirrored_and_scaled_network(tmp_path: Path) -> None:
    scaled = TemperatureScaled(Mirrored(mlp()), 0.7)
    write_all(scaled, tmp_path)
    paths = [tmp_path / f"model.{suffix}" for suffix in FORMATS]
    differences = check_files(paths, scaled, some_pixels(7))
    assert len(differences) == len(FORMATS)
    assert differences["model.safetensors"] == 0
    with pytest.raises(PipelineError, match=r"model\.pth: its logits differ"):
        check_files(paths, scaled.network, some_pixels(7))


def test_a_network_in_training_mode_is_exported_in_evaluation_mode(tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Flatten(), nn.Linear(108, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 5))
    network.train()
    write(network, some_pixels(2), tmp_path / "model.pt2")
    pixels = some_pixels(4)
    logits = read_logits(tmp_path / "model.pt2", pixels.numpy())
    np.testing.assert_allclose(logits, network.eval()(pixels).detach().numpy(), rtol=0, atol=TOLERANCE)


def test_the_example_is_not_kept(exported: Path, tmp_path: Path) -> None:
    """A view's storage is not saved either: it would disclose the user's images."""
    write(mlp(), some_pixels(1000)[:2], tmp_path / "model.pt2")
    assert (tmp_path / "model.pt2").stat().st_size == (exported / "model.pt2").stat().st_size


def test_one_image_is_example_enough(tmp_path: Path) -> None:
    write(mlp(), some_pixels(1), tmp_path / "model.pt2")
    assert read_logits(tmp_path / "model.pt2", some_pixels(3).numpy()).shape == (3, CLASSES)


@pytest.mark.slow
def test_checking_returns_the_differences(exported: Path) -> None:
    differences = check_files([exported / "model.pth", exported / "model.onnx"], mlp(), some_pixels(7))
    assert set(differences) == {"model.pth", "model.onnx"}
    assert differences["model.pth"] == 0
    assert 0 <= differences["model.onnx"] <= TOLERANCE


def test_checking_refuses_other_weights(exported: Path) -> None:
    with pytest.raises(PipelineError, match=r"^model\.pth: its logits differ .* on 7 test images; at most 1e-04 is"):
        check_files([exported / "model.pth"], mlp(seed=1), some_pixels(7))


@pytest.mark.parametrize(("change", "is_taken"), [(0.9e-5, True), (1.2e-5, False)])
def test_large_logits_may_differ_by_more(tmp_path: Path, change: float, is_taken: bool) -> None:
    """Rounding errors grow with the logits."""
    write(TemperatureScaled(mlp(), 1e-6), some_pixels(2), tmp_path / "model.pth")
    trained = TemperatureScaled(mlp(), 1e-6 * (1 + change))
    with nullcontext() if is_taken else pytest.raises(PipelineError, match="its logits differ"):
        check_files([tmp_path / "model.pth"], trained, some_pixels(7))


@pytest.mark.slow
def test_checking_refuses_other_classes(exported: Path) -> None:
    with pytest.raises(PipelineError, match=r"^model\.pth: returns 5 logits an image, not 6$"):
        check_files([exported / "model.pth"], mlp(classes=6), some_pixels(7))


@pytest.mark.slow
def test_checking_refuses_what_is_not_a_number(tmp_path: Path) -> None:
    network = mlp()
    with torch.no_grad():
        next(network.parameters()).fill_(torch.nan)
    write(network, some_pixels(2), tmp_path / "model.pth")
    with pytest.raises(PipelineError, match=r"^model\.pth: its logits differ from the trained network's by nan"):
        check_files([tmp_path / "model.pth"], mlp(), some_pixels(7))


@pytest.mark.parametrize(
    "suffix",
    ["onnx", *(pytest.param(suffix, marks=pytest.mark.slow) for suffix in ("pt2", "pth", "safetensors"))],
)
def test_checking_refuses_half_a_file(exported: Path, tmp_path: Path, suffix: str) -> None:
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


# .safetensors: the metadata describe how to build the network, and must be consistent with the tensors


def test_weights_of_known_metadata_and_bytes(exported: Path, tmp_path: Path) -> None:
    with safetensors.safe_open(exported / "model.safetensors", "pt") as file:
        assert file.metadata() == {"network": "mlp", "image_shape": "[3, 6, 6]", "classes": "5"}
        assert set(file.keys()) == mlp().state_dict().keys()
    write_weights(
        TemperatureScaled(Mirrored(mlp()), 1 / 3), "mlp", IMAGE_SHAPE, CLASSES, tmp_path / "scaled.safetensors"
    )
    with safetensors.safe_open(tmp_path / "scaled.safetensors", "pt") as file:
        assert float(file.metadata()["temperature"]) == 1 / 3
        assert file.metadata()["test_flip"] == "true"
        assert set(file.keys()) == mlp().state_dict().keys()
    for name, tensor in safetensors.torch.load_file(exported / "model.safetensors").items():
        assert torch.equal(tensor, mlp().state_dict()[name])


def test_weights_that_share_their_memory_are_written(tmp_path: Path) -> None:
    network = mlp()
    first, *_ = network.parameters()
    network.register_buffer("same", first.detach().T)
    write_weights(network, "mlp", IMAGE_SHAPE, CLASSES, tmp_path / "model.safetensors")
    tensors = safetensors.torch.load_file(tmp_path / "model.safetensors")
    assert torch.equal(tensors["same"], first.T)


METADATA = {"network": "mlp", "image_shape": "[3, 6, 6]", "classes": "5"}


def without(key: str) -> dict[str, str]:
    return {name: value for name, value in METADATA.items() if name != key}


@pytest.mark.parametrize(
    ("metadata", "reason"),
    [
        (without("network"), "it has no 'network'"),
        (without("image_shape"), "it has no 'image_shape'"),
        (without("classes"), "it has no 'classes'"),
        (METADATA | {"test_flip": "yes"}, "its test_flip is yes"),
        (METADATA | {"network": "os"}, "its network 'os' is not one of "),
        (METADATA | {"network": "../stages/train"}, "its network '../stages/train' is not one of "),
        (METADATA | {"network": "__init__"}, "its network '__init__' is not one of "),
        (METADATA | {"classes": "6"}, "its tensors are not those of mlp for images (3, 6, 6) and 6 classes"),
        (
            METADATA | {"classes": "10000000000"},
            "its tensors are not those of mlp for images (3, 6, 6) and 10000000000",
        ),
        (METADATA | {"image_shape": "[1, 99999, 99999]"}, "its tensors are not those of mlp for images (1, 99999, 99"),
        (METADATA | {"image_shape": "[3, 6"}, "Expecting ',' delimiter"),
        (METADATA | {"image_shape": "108"}, "'int' object is not iterable"),
        (METADATA | {"image_shape": "[" * 100_000}, "maximum recursion depth exceeded"),
        (METADATA | {"image_shape": '["3", "6"]'}, ""),
        (METADATA | {"image_shape": "[-3, 6, 6]"}, ""),
        (METADATA | {"classes": "9" * 5000}, "Exceeds the limit"),
        (METADATA | {"temperature": "0"}, "its temperature is 0.0"),
        (METADATA | {"temperature": "nan"}, "its temperature is nan"),
        (METADATA | {"temperature": "warm"}, "could not convert string to float: 'warm'"),
    ],
)
def test_weights_with_other_metadata_are_refused(tmp_path: Path, metadata: dict[str, str], reason: str) -> None:
    path = tmp_path / "model.safetensors"
    safetensors.torch.save_file(mlp().state_dict(), path, metadata)
    check_refused(path, reason)


def check_refused(path: Path, reason: str) -> None:
    with pytest.raises(PipelineError) as caught:
        read_logits(path, some_pixels(2).numpy())
    line = str(caught.value)
    assert line.startswith(f"{path}: damaged, or not a file that export wrote: {reason}")
    assert "\n" not in line
    assert len(line) < len(str(path)) + 400


def edited_header(change: Callable[[dict[str, Any]], object]) -> Callable[[bytes], bytes]:
    def edit(content: bytes) -> bytes:
        start = 8 + int.from_bytes(content[:8], "little")
        header = json.loads(content[8:start])
        change(header)
        spelt = json.dumps(header).encode()
        return len(spelt).to_bytes(8, "little") + spelt + content[start:]

    return edit


@pytest.mark.parametrize(
    "edit",
    [
        lambda content: b"",
        lambda content: content[:7],
        lambda content: content[: len(content) // 2],
        lambda content: content[:-1],
        lambda content: content + b"more",
        lambda content: (2**62).to_bytes(8, "little") + content[8:],
        lambda content: content[:8] + b"\xff" + content[9:],
        edited_header(lambda header: header.pop("linear_relu_stack.0.bias")),
        edited_header(lambda header: header["linear_relu_stack.0.bias"].update(shape=[2**40])),
        edited_header(lambda header: header["linear_relu_stack.0.bias"].update(data_offsets=[0, 2**60])),
        edited_header(lambda header: header["linear_relu_stack.0.bias"].update(dtype="I8")),
        edited_header(lambda header: header.update({"more": header.pop("linear_relu_stack.0.bias")})),
        edited_header(lambda header: header.pop("__metadata__")),
        edited_header(lambda header: header.update(__metadata__={"network": ["mlp"]})),
    ],
)
def test_broken_weights_are_refused(exported: Path, tmp_path: Path, edit: Callable[[bytes], bytes]) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(edit((exported / "model.safetensors").read_bytes()))
    check_refused(path, "")


def test_a_pickle_that_is_called_weights_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    torch.save(RunsCodeWhenUnpickled(tmp_path / "ran"), path)
    check_refused(path, "")
    assert not (tmp_path / "ran").exists()


def test_missing_weights_are_told(tmp_path: Path) -> None:
    check_refused(tmp_path / "model.safetensors", "No such file or directory")


@pytest.mark.slow
def test_two_processes_write_the_same_bytes(tmp_path: Path) -> None:
    for folder in ("first", "second"):
        (tmp_path / folder).mkdir()
        subprocess.run([python(), "-c", WRITE_ALL, str(tmp_path / folder)], check=True, capture_output=True)
    for suffix in FORMATS:
        first, second = ((tmp_path / folder / f"model.{suffix}").read_bytes() for folder in ("first", "second"))
        assert first == second, suffix
