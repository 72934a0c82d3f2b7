"""Pretrained weights to start from: a file, or torchvision's weights for one of its networks.

They may come from a network for other images or classes, whose first and last layers have other shapes.
"""

import os
import re
import socket
from http.client import HTTPException
from pathlib import Path
from ssl import SSLError
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.parse import urlparse

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from classifier.pipeline.errors import PipelineError
from classifier.pipeline.outputs import hash_file
from classifier.training.inference import read_weights

FILES = (".pth", ".safetensors")
PATIENCE_SECONDS = 20  # socket timeout for the server of torchvision's weights
HASH = re.compile(r"-([0-9a-f]{8,})\.")  # names of torchvision's files contain the first digits of their SHA-256
LISTED = 3  # tensor names in a message


def load_pretrained(network: nn.Module, name: str, weights: str) -> str:
    """Load pretrained weights into the network; return the SHA-256 of their file.

    name: of the network, as torchvision calls it.
    weights: a path that ends in .pth or .safetensors, or a name of torchvision such as IMAGENET1K_V1 or DEFAULT, whose
        file is downloaded to torch's cache folder if it is not there.
    Tensors must have the names and shapes of the network's. A tensor of the first or last layer may have another shape:
    the network then keeps its own and a line is printed. If a first convolution has one channel and the file's has
    several, the weights are summed over channels.
    Raises PipelineError, and leaves the network unchanged, if the file cannot be found, read or downloaded, or does not
    fit.
    """
    path = Path(weights) if weights.endswith(FILES) else _torchvision_file(name, weights)
    own = network.state_dict()
    given = _read_tensors(path)
    fitting = _fitting(own, given, _end_layers(network), path)
    network.load_state_dict(own | fitting)
    print(f"Loaded {len(fitting)} of {len(own)} tensors from {path}", flush=True)
    for key in own:
        if key not in fitting:
            print(f"  {key} is newly initialised: {_shape(own[key])}, not {_shape(given[key])}", flush=True)
        elif fitting[key] is not given[key]:
            print(f"  {key} is summed over channels: {_shape(own[key])}, from {_shape(given[key])}", flush=True)
    return hash_file(path, "sha256")


def _read_tensors(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a file by name, on the CPU. Raises PipelineError if it holds anything else."""
    content: Any
    if path.suffix == ".safetensors" and os.path.isfile(path):  # noqa: PTH113, see read_weights
        try:
            content = load_file(path)
        except Exception as error:  # safetensors raises several types
            reason = " ".join(str(error).split())[:300]
            raise PipelineError(f"weights: {path} cannot be read as a complete .safetensors file: {reason}") from None
    else:
        content = read_weights(path, torch.device("cpu"))
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise PipelineError(f"weights: {path} does not hold tensors by name, as network.state_dict() returns them")
    if invalid := [key for key, value in content.items() if not _is_usable(value)]:
        raise PipelineError(f"weights: {path} does not hold a dense tensor of finite numbers in {_abridged(invalid)}")
    return content


def _is_usable(value: object) -> bool:
    """Return whether a value is a dense CPU tensor of finite numbers whose storage holds all its elements."""
    return (
        isinstance(value, Tensor)
        and value.layout == torch.strided
        and value.device.type == "cpu"
        and value.dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64)
        and value.numel() * value.itemsize <= value.untyped_storage().nbytes()  # not one number expanded to 2**60
        and bool(value.isfinite().all())
    )


def _end_layers(network: nn.Module) -> set[str]:
    """Return the names of the first and last layers with weights: their shapes depend on the images and classes."""
    matrices = [name for name, parameter in network.named_parameters() if parameter.ndim > 1]  # not normalisation
    return {name.rpartition(".")[0] for name in (matrices[0], matrices[-1])}


def _fitting(own: dict[str, Tensor], given: dict[str, Tensor], ends: set[str], path: Path) -> dict[str, Tensor]:
    """Return the given tensors that the network can load.

    ends: names of layers whose shapes may differ. Raises PipelineError if names differ, or shapes of other layers.
    """
    faults = []
    if missing := [key for key in own if key not in given]:
        faults.append(f"it lacks {_abridged(missing)}")
    if unknown := [key for key in given if key not in own]:
        faults.append(f"it has unknown tensors {_abridged(unknown)}")
    shared = [key for key in own if key in given]
    differing = [key for key in shared if own[key].shape != given[key].shape]
    if wrong := [key for key in differing if key.rpartition(".")[0] not in ends]:
        shapes = [f"{key} of {_shape(given[key])}, not {_shape(own[key])}" for key in wrong]
        faults.append(f"it has {_abridged(shapes)}")
    if wrong := [key for key in shared if own[key].is_floating_point() != given[key].is_floating_point()]:
        faults.append(f"it has {_abridged([f'{key} of {given[key].dtype}' for key in wrong])}")
    if faults:
        raise PipelineError(f"weights: {path} does not fit the network: {'; '.join(faults)}")
    fitting = {key: given[key] for key in own if key not in differing}
    for key in differing:
        if own[key].ndim == given[key].ndim == 4 and own[key].shape == given[key][:, :1].shape:
            fitting[key] = given[key].sum(1, keepdim=True)
    return fitting


def _torchvision_file(network: str, name: str) -> Path:
    """Return the path of torchvision's weights with this name, downloaded if torch's cache folder lacks them.

    Raises PipelineError if torchvision has no such weights, or if the file cannot be downloaded or is corrupt.
    """
    from torchvision.models import get_model_weights  # the import takes two seconds

    files = f"a file that ends in {' or '.join(FILES)}"
    try:
        offered = get_model_weights(network).__members__
    except ValueError:
        raise PipelineError(f"weights: {name!r} is not {files}, and torchvision has no weights for {network}") from None
    if name not in offered:
        raise PipelineError(f"weights: {name!r} is not one of {', '.join(offered)} for {network}, or {files}")
    url: str = offered[name].value.url
    path = Path(torch.hub.get_dir()) / "checkpoints" / Path(urlparse(url).path).name
    if not path.exists():
        _download(url, path)
    expected = HASH.search(path.name)
    if expected and not hash_file(path, "sha256").startswith(expected[1]):
        raise PipelineError(f"weights: {path} differs from {url}; remove it, then run the command again")
    return path


def _download(url: str, path: Path) -> None:
    """Download one of torchvision's files. Raises PipelineError, with a way to provide the file by hand, on failure."""
    path.parent.mkdir(parents=True, exist_ok=True)
    expected = HASH.search(path.name)
    patience = socket.getdefaulttimeout()
    socket.setdefaulttimeout(PATIENCE_SECONDS)  # torch sets no timeout
    print(f"Downloading {url}", flush=True)
    try:
        torch.hub.download_url_to_file(url, str(path), hash_prefix=expected and expected[1])
    except (URLError, SSLError, TimeoutError, ConnectionError, HTTPException, RuntimeError) as error:
        # torch raises RuntimeError for a wrong hash; `run_main` reports other OSErrors, which come from the disk
        if isinstance(error, HTTPError):
            error.close()  # it holds the open connection
        reason = " ".join(str(error).split())
        raise PipelineError(
            f"weights: {url} cannot be downloaded: {reason}. Download it by other means, then put it into "
            f"{path.parent}, or set its path in params.yaml: `weights: path/to/{path.name}`"
        ) from None
    finally:
        socket.setdefaulttimeout(patience)


def _shape(tensor: Tensor) -> str:
    return " x ".join(map(str, tensor.shape)) or "a number"


def _abridged(names: list[str]) -> str:
    """Return the first LISTED names, escaped and shortened for a message: a file may contain any names."""
    rest = len(names) - LISTED
    shown = [(name if name.isprintable() else ascii(name))[:100] for name in names[:LISTED]]
    return ", ".join(shown) + (f" and {rest} more" if rest > 0 else "")
