"""The exported formats: how each is written, and how each is read back.

Every file takes pixels (N, C, H, W) float32 in [0, 1] for any N, and gives logits (N, classes).
`python -m classifier.exchange FILE` reads a file in a process that knows nothing of the training: it takes pixels, as
numpy.save writes them, and gives the logits of all images in one batch, then of the first image alone.
"""

import io
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from classifier.errors import PipelineError

# Largest difference between two logits that counts as the same. Formats differ by the order in which they sum, which
# float32 rounds at about 1e-6 of a logit.
TOLERANCE = 1e-4
UNKNOWN_FORMAT = "{}: the formats are .pth, .pt2 and .onnx"


def write(network: nn.Module, pixels: Tensor, path: Path) -> None:
    """Write the network, on the CPU and in evaluation mode, in the format that the file's suffix names.

    pixels: (N, C, H, W) float32 with N >= 2, an example: with one image the batch size would be fixed to 1.
    """
    network.cpu().eval()
    example = pixels.cpu().clone()  # of its own: torch.export.save stores all that lies behind a view
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


def read_logits(path: Path, pixels: np.ndarray) -> np.ndarray:
    """Logits (N, classes) float32 that an exported file gives for pixels (N, C, H, W) float32, on the CPU.

    A .pth file is a pickle and a .pt2 file may hold one, which can run any code: read only what you exported yourself.
    """
    return open_model(path)(pixels)


def open_model(path: Path) -> Callable[[np.ndarray], np.ndarray]:
    """Open an exported file once, for many calls with pixels as `read_logits` takes them; the same caution applies."""
    if path.suffix == ".onnx":
        import onnxruntime

        session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        return lambda pixels: np.asarray(session.run(["logits"], {"pixels": pixels})[0])
    if path.suffix == ".pt2":
        network = torch.export.load(path).module()
    elif path.suffix == ".pth":
        network = torch.load(path, weights_only=False)
    else:
        raise PipelineError(UNKNOWN_FORMAT.format(path))

    def logits(pixels: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            return np.asarray(network(torch.from_numpy(pixels)).numpy())

    return logits


def check_files(paths: Sequence[Path], network: nn.Module, pixels: Tensor) -> dict[str, float]:
    """Read each file back in a process of its own and compare its logits with the network's.

    pixels: (N, C, H, W) float32. Returns the largest difference by file name. Raises PipelineError if a file
    cannot be read, or differs by more than TOLERANCE.
    """
    network.cpu().eval()
    with torch.inference_mode():
        expected = torch.cat([network(pixels), network(pixels[:1])]).numpy()
    readers = {
        path: subprocess.Popen(
            [sys.executable, "-m", "classifier.exchange", path],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        for path in paths
    }
    given = _npy(pixels.numpy())
    answers = {path: reader.communicate(given) for path, reader in readers.items()}  # none is left running
    differences = {}
    for path, reader in readers.items():
        output, complaint = answers[path]
        if reader.returncode != 0:
            reason = (complaint.decode(errors="replace").strip() or f"exit code {reader.returncode}").splitlines()[-1]
            raise PipelineError(f"{path.name}: cannot be read back: {reason}")
        logits = np.load(io.BytesIO(output))
        if logits.shape != expected.shape:
            raise PipelineError(f"{path.name}: gives {logits.shape[1]} logits an image, not {expected.shape[1]}")
        differences[path.name] = difference = float(np.abs(logits - expected).max())
        if not difference <= TOLERANCE:  # also when it is not a number
            raise PipelineError(
                f"{path.name}: its logits differ from the trained network's by {difference:.2g} on "
                f"{len(pixels)} test images; at most {TOLERANCE:.0e} is allowed"
            )
    return differences


def _npy(array: np.ndarray) -> bytes:
    content = io.BytesIO()
    np.save(content, array)
    return content.getvalue()


def main() -> None:
    path = Path(sys.argv[1])
    output = os.dup(1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # for what libraries print
    pixels = np.load(io.BytesIO(sys.stdin.buffer.read()))
    logits = np.concatenate([read_logits(path, pixels), read_logits(path, pixels[:1])])
    with os.fdopen(output, "wb") as file:
        file.write(_npy(logits))


if __name__ == "__main__":
    main()
