"""The exported formats: how each is written, and how each is read back.

Every file takes pixels (N, C, H, W) float32 in [0, 1] for any N, and gives logits (N, classes). The int8 format is an
ONNX file too; classifier/export/quantization.py writes it.
`python -m classifier.export.formats FILES` reads them in a process that knows nothing of the training: it takes pixels,
as numpy.save writes them, and gives for each file the logits of all images in one batch, then of the first image alone.
"""

import importlib
import io
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from classifier.export.onnx_file import open_onnx
from classifier.networks import Mirrored, build_network
from classifier.pipeline.errors import PipelineError, exit_without_collecting
from classifier.pipeline.params import modules_in
from classifier.progress import progress

# Largest difference between two logits that counts as the same; of logits beyond 10, as after a training that has gone
# wrong, the share of the largest. Formats differ by the order in which they sum, which float32 rounds at about 1e-6 of
# a logit.
TOLERANCE, OF_LARGEST = 1e-4, 1e-5
# What reading imports, a second of it: the process that reads does so while the files are being written.
LIBRARIES = {".pt2": "torch.export.pt2_archive", ".onnx": "onnxruntime"}
UNKNOWN_FORMAT = "{}: the formats are .pth, .pt2, .onnx and .safetensors"


class TemperatureScaled(nn.Module):
    """A network whose logits are divided by the temperature, which classifier/export/calibration.py finds."""

    def __init__(self, network: nn.Module, temperature: float) -> None:
        super().__init__()
        self.network = network
        self.temperature = temperature

    def forward(self, pixels: Tensor) -> Tensor:
        """(N, C, H, W) float32 in [0, 1] to logits (N, classes)."""
        logits: Tensor = self.network(pixels) / self.temperature
        return logits


def write_checked(
    network: nn.Module, name: str, classes: int, pixels: Tensor, paths: Sequence[Path], also: Path
) -> None:
    """Write a network of classifier/networks to each path, in the format of its suffix, and print how it reads back.

    pixels: (N, C, H, W) float32, images on which each file's logits are compared with the network's.
    also: a path to write to that need not be among the others.
    Raises PipelineError if a file cannot be read, or its logits differ by more than TOLERANCE says.
    """
    _, *shape = pixels.shape
    paths = list(dict.fromkeys([*paths, also]))
    with checking(paths) as check, progress("export", "step", len(paths) + 1) as bar:
        for path in paths:
            bar.set_description(f"writing {path.name}")
            if path.suffix == ".safetensors":
                write_weights(network, name, (shape[0], shape[1], shape[2]), classes, path)
            else:
                write(network, pixels, path)
            bar.update()
        bar.set_description("reading all files back")
        for file, difference in check(network, pixels).items():
            print(f"{file}: logits within {difference:.1e} of the trained network's on {len(pixels)} test images")


def write(network: nn.Module, pixels: Tensor, path: Path) -> None:
    """Write the network, on the CPU and in evaluation mode, in the format that the suffix names: .pth, .pt2 or .onnx.

    pixels: (N, C, H, W) float32 with N >= 1, of which the first is the example that torch.export wants.
    """
    network.cpu().eval()
    example = pixels[:1].cpu().repeat(2, 1, 1, 1)  # with one image the batch size would be fixed to 1
    content = io.BytesIO()  # torch itself, writing to a full disk, aborts the process
    if path.suffix == ".pth":  # a pickle: reading it runs code, so for files of trusted origin only
        torch.save(network, content)
    elif path.suffix == ".pt2":
        torch.export.save(_program(network, example), content)
    elif path.suffix == ".onnx":
        model = torch.onnx.export(
            _program(network, example),
            dynamo=True,
            verbose=False,
            input_names=["pixels"],
            output_names=["logits"],
            dynamic_shapes=({0: "batch"},),
        )
        assert model is not None  # noqa: S101, it is with dynamo=True
        content.write(model.model_proto.SerializeToString())
    else:
        raise PipelineError(UNKNOWN_FORMAT.format(path))
    path.write_bytes(content.getbuffer())


def _program(network: nn.Module, example: Tensor) -> torch.export.ExportedProgram:
    """The network as a graph for any batch size, without the places in the source that each node remembers.

    Those are absolute paths: they would tell where the model was exported and make the bytes depend on it.
    """
    batch = torch.export.Dim("batch", min=1)
    program = torch.export.export(network, (example,), dynamic_shapes=({0: batch},))
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)
    return program


def write_weights(network: nn.Module, name: str, image_shape: tuple[int, int, int], classes: int, path: Path) -> None:
    """Write the weights of a network of classifier/networks as .safetensors, with what it takes to build it again.

    That is the metadata, of texts: `network`, its name; `image_shape`, (C, H, W) as JSON; `classes`, their number;
    `temperature`, by which its logits are to be divided, if it is scaled; and `test_flip`, `true`, if they are the mean
    of an image's and its mirror image's.
    """
    import safetensors.torch

    metadata = {"network": name, "image_shape": json.dumps(image_shape), "classes": str(classes)}
    if isinstance(network, TemperatureScaled):
        metadata["temperature"] = repr(network.temperature)
        network = network.network
    if isinstance(network, Mirrored):
        metadata["test_flip"] = "true"
        network = network.network
    tensors = {key: value.cpu().clone().contiguous() for key, value in network.state_dict().items()}
    content = safetensors.torch.save(tensors)
    # The metadata is put into the header here: the package writes it in another order every time. A file is the
    # length of its header in eight bytes, the header, JSON filled up to a multiple of eight, and the tensors.
    start = 8 + int.from_bytes(content[:8], "little")
    header = json.dumps({"__metadata__": metadata} | json.loads(content[8:start]), separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    path.write_bytes(len(header).to_bytes(8, "little") + header + content[start:])


def read_logits(path: Path, pixels: np.ndarray) -> np.ndarray:
    """Logits (N, classes) float32 that an exported file gives for pixels (N, C, H, W) float32, on the CPU.

    A .pth file is a pickle and a .pt2 file may hold one, which can run any code: read only what you exported yourself.
    A .safetensors file holds numbers alone. Raises PipelineError if one is not as `write_weights` writes it.
    """
    return open_model(path)(pixels)


def open_model(path: Path) -> Callable[[np.ndarray], np.ndarray]:
    """Open an exported file once, for many calls with pixels as `read_logits` takes them; the same caution applies."""
    if path.suffix == ".onnx":
        return open_onnx(path)
    if path.suffix == ".pt2":
        network: nn.Module = torch.export.load(path).module()
    elif path.suffix == ".pth":
        network = torch.load(path, weights_only=False)
    elif path.suffix == ".safetensors":
        network = _read_weights(path).eval()
    else:
        raise PipelineError(UNKNOWN_FORMAT.format(path))

    def logits(pixels: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            return np.asarray(network(torch.from_numpy(pixels)).numpy())

    return logits


def _read_weights(path: Path) -> nn.Module:
    """The network that `write_weights` wrote. Raises PipelineError if the file is another or broken."""
    from safetensors import safe_open

    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118, it is no dict
        name = metadata["network"]
        if name not in modules_in("networks"):  # before it is imported
            raise ValueError(f"its network {name!r} is not one of {', '.join(modules_in('networks'))}")
        image_shape, classes = tuple(json.loads(metadata["image_shape"])), int(metadata["classes"])
        temperature = float(metadata.get("temperature", 1))
        if not 0 < temperature < math.inf:
            raise ValueError(f"its temperature is {temperature}")
        if (test_flip := metadata.get("test_flip", "false")) not in ("true", "false"):
            raise ValueError(f"its test_flip is {test_flip}")
        with torch.device("meta"):  # without memory: a hostile file may name any size
            expected = {
                key: value.shape for key, value in build_network(name, image_shape, classes).state_dict().items()
            }
        if {key: value.shape for key, value in tensors.items()} != expected:
            raise ValueError(f"its tensors are not those of {name} for images {image_shape} and {classes} classes")
    except Exception as error:  # of many kinds: hostile metadata goes through the network's own code
        reason = f"it has no {error}" if isinstance(error, KeyError) else " ".join(str(error).split())[:300]
        raise PipelineError(f"{path}: broken, or not a file that export wrote: {reason}") from None
    network = build_network(name, image_shape, classes)
    network.load_state_dict(tensors)
    return TemperatureScaled(Mirrored(network) if test_flip == "true" else network, temperature)


@contextmanager
def checking(paths: Sequence[Path]) -> Iterator[Callable[[nn.Module, Tensor], dict[str, float]]]:
    """Have a process that reads these files back, which may be written yet: it takes seconds to be ready.

    Gives a function of the network that was exported and pixels (N, C, H, W) float32, which compares what each file
    makes of them with the network's logits, and returns the largest difference by file name. It raises PipelineError if
    a file cannot be read, or differs by more than TOLERANCE says.
    """
    command = [sys.executable, "-m", "classifier.export.formats", *map(str, paths)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as reader:  # without pixels it ends
        yield partial(_compare, reader, paths)


def _compare(
    reader: "subprocess.Popen[bytes]", paths: Sequence[Path], network: nn.Module, pixels: Tensor
) -> dict[str, float]:
    network.cpu().eval()
    with torch.inference_mode():
        expected = torch.cat([network(pixels), network(pixels[:1])]).numpy()
    allowed = max(TOLERANCE, OF_LARGEST * float(np.abs(expected).max()))
    output, complaint = reader.communicate(_npy(pixels.numpy()))
    answers = io.BytesIO(output)
    differences = {}
    for path in paths:
        if answers.tell() == len(output):
            reason = (complaint.decode(errors="replace").strip() or f"exit code {reader.returncode}").splitlines()[-1]
            raise PipelineError(f"{path.name}: cannot be read back: {reason}")
        logits = np.load(answers)
        if logits.shape != expected.shape:
            raise PipelineError(f"{path.name}: gives {logits.shape[1]} logits an image, not {expected.shape[1]}")
        differences[path.name] = difference = float(np.abs(logits - expected).max())
        if not difference <= allowed:  # also when it is not a number
            raise PipelineError(
                f"{path.name}: its logits differ from the trained network's by {difference:.2g} on "
                f"{len(pixels)} test images; at most {allowed:.0e} is allowed"
            )
    return differences


def _npy(array: np.ndarray) -> bytes:
    content = io.BytesIO()
    np.save(content, array)
    return content.getvalue()


def main() -> None:
    exit_without_collecting()
    output = os.dup(1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # for what libraries print
    paths = [Path(name) for name in sys.argv[1:]]
    for library in {LIBRARIES[path.suffix] for path in paths if path.suffix in LIBRARIES}:
        importlib.import_module(library)
    pixels = np.load(io.BytesIO(sys.stdin.buffer.read()))
    with os.fdopen(output, "wb") as file:
        for path in paths:
            logits = np.concatenate([read_logits(path, pixels), read_logits(path, pixels[:1])])
            file.write(_npy(logits))
            file.flush()  # a broken file may end this process


if __name__ == "__main__":
    main()
