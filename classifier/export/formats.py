"""The exported formats: write, read back and check.

Every file maps pixels (N, C, H, W) float32 in [0, 1], for any N, to logits (N, classes). The int8 format, also an ONNX
file, is written by classifier/export/quantization.py.

`python -m classifier.export.formats FILES` reads files in a process that shares nothing with the training. It reads
pixels from standard input in the format of numpy.save, and writes for each file the logits of all images in one batch,
followed by those of the first image alone.
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

# Largest difference allowed between two logits, absolute, and relative to the largest logit; the larger one counts.
# The second matters for logits above 10, as after a failed training. Formats sum in different orders, and float32
# rounding then differs by about 1e-6 of a logit.
TOLERANCE, RELATIVE_TOLERANCE = 1e-4, 1e-5
# Imports that take a second; the reading process does them while the files are being written.
LIBRARIES = {".pt2": "torch.export.pt2_archive", ".onnx": "onnxruntime"}
UNKNOWN_FORMAT = "{}: the formats are .pth, .pt2, .onnx and .safetensors"


class TemperatureScaled(nn.Module):
    """Divide a network's logits by a temperature; classifier/export/calibration.py fits it."""

    def __init__(self, network: nn.Module, temperature: float) -> None:
        super().__init__()
        self.network = network
        self.temperature = temperature

    def forward(self, pixels: Tensor) -> Tensor:
        """Map pixels (N, C, H, W) float32 in [0, 1] to logits (N, classes)."""
        logits: Tensor = self.network(pixels) / self.temperature
        return logits


def write_checked(
    network: nn.Module, name: str, classes: int, pixels: Tensor, paths: Sequence[Path], also: Path
) -> None:
    """Write a network of classifier/networks to each path, in the format of its suffix, then read back and check all.

    pixels: (N, C, H, W) float32, images on which the logits of each file are compared with the network's.
    also: one more path, which may be among the others.
    Raises PipelineError if a file cannot be read, or if its logits differ by more than the tolerances.
    """
    _, *shape = pixels.shape
    paths = list(dict.fromkeys([*paths, also]))
    with start_checker(paths) as check, progress("export", "step", len(paths) + 1) as bar:
        for path in paths:
            bar.set_description(f"writing {path.name}")
            if path.suffix == ".safetensors":
                write_weights(network, name, (shape[0], shape[1], shape[2]), classes, path)
            else:
                write(network, pixels, path)
            bar.update()
        bar.set_description("checking all files")
        for file, difference in check(network, pixels).items():
            print(f"{file}: logits within {difference:.1e} of the trained network's on {len(pixels)} test images")


def write(network: nn.Module, pixels: Tensor, path: Path) -> None:
    """Write the network, on the CPU and in evaluation mode, as .pth, .pt2 or .onnx, depending on the suffix.

    pixels: (N, C, H, W) float32 with N >= 1; the first image is the example input of torch.export.
    Raises PipelineError for another suffix.
    """
    network.cpu().eval()
    example = pixels[:1].cpu().repeat(2, 1, 1, 1)  # torch.export would fix a batch size of 1
    content = io.BytesIO()  # torch.save to a file aborts the process when the disk is full
    if path.suffix == ".pth":  # a pickle: reading it can run code
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
        assert model is not None  # noqa: S101, always so with dynamo=True
        content.write(model.model_proto.SerializeToString())
    else:
        raise PipelineError(UNKNOWN_FORMAT.format(path))
    path.write_bytes(content.getbuffer())


def _program(network: nn.Module, example: Tensor) -> torch.export.ExportedProgram:
    """Export the network as a graph for any batch size, without the stack traces of its nodes.

    These contain absolute paths, which would make the bytes depend on the folder of the export and disclose it.
    """
    batch = torch.export.Dim("batch", min=1)
    program = torch.export.export(network, (example,), dynamic_shapes=({0: batch},))
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)
    return program


def write_weights(network: nn.Module, name: str, image_shape: tuple[int, int, int], classes: int, path: Path) -> None:
    """Write the weights of a network of classifier/networks as .safetensors, with metadata to build it again.

    The metadata are strings: `network`, its name; `image_shape`, (C, H, W) as JSON; `classes`, their number;
    `temperature`, the divisor of its logits, if it is scaled; and `test_flip`, `true`, if its logits are averaged over
    an image and its mirror image.
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
    # The metadata are added to the header here, because safetensors writes them in random order. A file is the length
    # of its header in eight bytes, the header, which is JSON padded to a multiple of eight bytes, and the tensors.
    start = 8 + int.from_bytes(content[:8], "little")
    header = json.dumps({"__metadata__": metadata} | json.loads(content[8:start]), separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    path.write_bytes(len(header).to_bytes(8, "little") + header + content[start:])


def read_logits(path: Path, pixels: np.ndarray) -> np.ndarray:
    """Compute an exported file's logits (N, classes) float32 for pixels (N, C, H, W) float32, on the CPU.

    A .pth file is a pickle and a .pt2 file may contain one. Unpickling can run any code: read only files from a trusted
    source. Raises PipelineError for an unknown suffix, or for a .safetensors file that `write_weights` did not write.
    """
    return open_model(path)(pixels)


def open_model(path: Path) -> Callable[[np.ndarray], np.ndarray]:
    """Open an exported file; return a function from pixels to logits. See `read_logits` for shapes and trust."""
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
    """Build the network that `write_weights` wrote. Raises PipelineError if the file is damaged or not such a file."""
    from safetensors import safe_open

    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118, `file` is not iterable
        name = metadata["network"]
        if name not in modules_in("networks"):  # before `build_network` imports it
            raise ValueError(f"its network {name!r} is not one of {', '.join(modules_in('networks'))}")
        image_shape, classes = tuple(json.loads(metadata["image_shape"])), int(metadata["classes"])
        temperature = float(metadata.get("temperature", 1))
        if not 0 < temperature < math.inf:
            raise ValueError(f"its temperature is {temperature}")
        if (test_flip := metadata.get("test_flip", "false")) not in ("true", "false"):
            raise ValueError(f"its test_flip is {test_flip}")
        with torch.device("meta"):  # allocates no memory: a hostile file may state any size
            expected = {
                key: value.shape for key, value in build_network(name, image_shape, classes).state_dict().items()
            }
        if {key: value.shape for key, value in tensors.items()} != expected:
            raise ValueError(f"its tensors are not those of {name} for images {image_shape} and {classes} classes")
    except Exception as error:  # hostile metadata can make the network's code raise anything
        reason = f"it has no {error}" if isinstance(error, KeyError) else " ".join(str(error).split())[:300]
        raise PipelineError(f"{path}: damaged, or not a file that export wrote: {reason}") from None
    network = build_network(name, image_shape, classes)
    network.load_state_dict(tensors)
    return TemperatureScaled(Mirrored(network) if test_flip == "true" else network, temperature)


@contextmanager
def start_checker(paths: Sequence[Path]) -> Iterator[Callable[[nn.Module, Tensor], dict[str, float]]]:
    """Start a process that will read these files; yield a function that compares their logits with the network's.

    The process takes seconds to start, so start it before writing the files. The function takes the network and pixels
    (N, C, H, W) float32 and returns the largest difference of logits by file name. It raises PipelineError if a file
    cannot be read, or if its logits differ by more than the tolerances.
    """
    command = [sys.executable, "-m", "classifier.export.formats", *map(str, paths)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as reader:  # it ends when its standard input is closed
        yield partial(_compare, reader, paths)


def _compare(
    reader: "subprocess.Popen[bytes]", paths: Sequence[Path], network: nn.Module, pixels: Tensor
) -> dict[str, float]:
    network.cpu().eval()
    with torch.inference_mode():
        expected = torch.cat([network(pixels), network(pixels[:1])]).numpy()
    allowed = max(TOLERANCE, RELATIVE_TOLERANCE * float(np.abs(expected).max()))
    output, errors = reader.communicate(_npy(pixels.numpy()))
    arrays = io.BytesIO(output)
    differences = {}
    for path in paths:
        if arrays.tell() == len(output):
            reason = (errors.decode(errors="replace").strip() or f"exit code {reader.returncode}").splitlines()[-1]
            raise PipelineError(f"{path.name}: cannot be read back: {reason}")
        logits = np.load(arrays)
        if logits.shape != expected.shape:
            raise PipelineError(f"{path.name}: returns {logits.shape[1]} logits an image, not {expected.shape[1]}")
        differences[path.name] = difference = float(np.abs(logits - expected).max())
        if not difference <= allowed:  # true also for NaN
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
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # discards what libraries print
    paths = [Path(name) for name in sys.argv[1:]]
    for library in {LIBRARIES[path.suffix] for path in paths if path.suffix in LIBRARIES}:
        importlib.import_module(library)
    pixels = np.load(io.BytesIO(sys.stdin.buffer.read()))
    with os.fdopen(output, "wb") as file:
        for path in paths:
            logits = np.concatenate([read_logits(path, pixels), read_logits(path, pixels[:1])])
            file.write(_npy(logits))
            file.flush()  # the next file may crash this process


if __name__ == "__main__":
    main()
