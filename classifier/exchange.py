"""The exported formats: how each is written, and how each is read back.

Every file takes pixels (N, C, H, W) float32 in [0, 1] for any N, and gives logits (N, classes).
`python -m classifier.exchange FILE PIXELS.npy LOGITS.npy` reads a file in a process that knows nothing of the
training: the logits of all images in one batch, then of the first image alone.
"""

import subprocess
import sys
import tempfile
from collections.abc import Sequence
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
    if path.suffix == ".pth":  # a pickle: reading it runs code, so for files of trusted origin only
        with path.open("wb") as file:
            torch.save(network, file)
    elif path.suffix == ".pt2":
        torch.export.save(_program(network, example), path)
    elif path.suffix == ".onnx":
        torch.onnx.export(
            _program(network, example),
            f=path,
            dynamo=True,
            verbose=False,
            external_data=False,
            input_names=["pixels"],
            output_names=["logits"],
            dynamic_shapes=({0: "batch"},),
        )
    else:
        raise PipelineError(UNKNOWN_FORMAT.format(path))


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
    if path.suffix == ".onnx":
        import onnxruntime

        session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        (logits,) = session.run(["logits"], {"pixels": pixels})
        return np.asarray(logits)
    if path.suffix == ".pt2":
        network = torch.export.load(path).module()
    elif path.suffix == ".pth":
        network = torch.load(path, weights_only=False)
    else:
        raise PipelineError(UNKNOWN_FORMAT.format(path))
    with torch.inference_mode():
        logits = network(torch.from_numpy(pixels)).numpy()
    return np.asarray(logits)


def check_files(paths: Sequence[Path], network: nn.Module, pixels: Tensor) -> dict[str, float]:
    """Read each file back in a process of its own and compare its logits with the network's.

    pixels: (N, C, H, W) float32. Returns the largest difference by file name. Raises PipelineError if a file
    cannot be read, or differs by more than TOLERANCE.
    """
    network.cpu().eval()
    with torch.inference_mode():
        expected = torch.cat([network(pixels), network(pixels[:1])]).numpy()
    with tempfile.TemporaryDirectory() as folder:
        inputs = Path(folder) / "pixels.npy"
        np.save(inputs, pixels.numpy())
        outputs = {path: Path(folder) / f"{path.name}.npy" for path in paths}
        readers = {
            path: subprocess.Popen(
                [sys.executable, "-m", "classifier.exchange", path, inputs, output],
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
            )
            for path, output in outputs.items()
        }
        complaints = {path: reader.communicate()[1] for path, reader in readers.items()}  # none is left running
        differences = {}
        for path, reader in readers.items():
            if reader.returncode != 0:
                reason = (complaints[path].strip() or f"exit code {reader.returncode}").splitlines()[-1]
                raise PipelineError(f"{path.name}: cannot be read back: {reason}")
            logits = np.load(outputs[path])
            if logits.shape != expected.shape:
                raise PipelineError(f"{path.name}: gives {logits.shape[1]} logits an image, not {expected.shape[1]}")
            differences[path.name] = difference = float(np.abs(logits - expected).max())
            if not difference <= TOLERANCE:  # also when it is not a number
                raise PipelineError(
                    f"{path.name}: its logits differ from the trained network's by {difference:.2g} on "
                    f"{len(pixels)} test images; at most {TOLERANCE:.0e} is allowed"
                )
    return differences


def main() -> None:
    path, inputs, output = map(Path, sys.argv[1:])
    pixels = np.load(inputs)
    np.save(output, np.concatenate([read_logits(path, pixels), read_logits(path, pixels[:1])]))


if __name__ == "__main__":
    main()
