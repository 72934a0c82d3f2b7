"""Weights to start a training from: a file, or those that torchvision offers for a network of its own.

They may be of a network for other images or classes: its first and its last layer may then be of other sizes.
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
PATIENCE_SECONDS = 20  # for each answer of the server that has torchvision's weights
HASH = re.compile(r"-([0-9a-f]{8,})\.")  # in the name of a file of torchvision's: the beginning of its SHA-256
LISTED = 3  # of the names that are at fault


def load_pretrained(network: nn.Module, name: str, weights: str) -> str:
    """Take over the weights of a file, or torchvision's of that name; return the SHA-256 of the file.

    name: of the network, by which torchvision knows its weights.
    weights: a path that ends in .pth or .safetensors, or a name such as IMAGENET1K_V1 or DEFAULT. torchvision's files
        come from the folder where torch keeps them, or are downloaded to it.
    Tensors must have the network's names and shapes. Where those of its first or last layer have another shape, the
    network keeps its own, which is printed; but of a first convolution for one channel, the sum over the file's.
    Raises PipelineError, and leaves the network as it was, if the file cannot be had or read, or does not fit.
    """
    path = Path(weights) if weights.endswith(FILES) else _of_torchvision(name, weights)
    own = network.state_dict()
    given = _read(path)
    fitting = _fitting(own, given, _ends(network), path)
    network.load_state_dict(own | fitting)
    print(f"{len(fitting)} of {len(own)} tensors are from {path}", flush=True)
    for key in own:
        if key not in fitting:
            print(f"  {key} is newly drawn: {_shape(own[key])}, not {_shape(given[key])}", flush=True)
        elif fitting[key] is not given[key]:
            print(f"  {key} is the sum over the channels: {_shape(own[key])}, of {_shape(given[key])}", flush=True)
    return hash_file(path, "sha256")


def _read(path: Path) -> dict[str, Tensor]:
    """The tensors of a file by name, on the CPU. Raises PipelineError if it is not such a file."""
    content: Any
    if path.suffix == ".safetensors" and os.path.isfile(path):  # noqa: PTH113, see read_weights
        try:
            content = load_file(path)
        except Exception as error:  # of many kinds
            reason = " ".join(str(error).split())[:300]
            raise PipelineError(f"weights: {path} cannot be read as a whole .safetensors file: {reason}") from None
    else:
        content = read_weights(path, torch.device("cpu"))
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise PipelineError(f"weights: {path} does not hold tensors by name, as network.state_dict() gives them")
    if strange := [key for key, value in content.items() if not _is_plain(value)]:
        raise PipelineError(f"weights: {path} does not hold a plain tensor of finite numbers in {_some(strange)}")
    return content


def _is_plain(value: object) -> bool:
    """Whether a value is a tensor that lies in memory as it is, with numbers to compute with."""
    return (
        isinstance(value, Tensor)
        and value.layout == torch.strided
        and value.device.type == "cpu"
        and value.dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64)
        and value.numel() * value.itemsize <= value.untyped_storage().nbytes()  # else one number could stand for 2**60
        and bool(value.isfinite().all())
    )


def _ends(network: nn.Module) -> set[str]:
    """The first and the last layer that has weights, by name: those fitted to the images and to the classes."""
    matrices = [name for name, parameter in network.named_parameters() if parameter.ndim > 1]  # not normalisation
    return {name.rpartition(".")[0] for name in (matrices[0], matrices[-1])}


def _fitting(own: dict[str, Tensor], given: dict[str, Tensor], ends: set[str], path: Path) -> dict[str, Tensor]:
    """What is to be taken over of the given tensors. Raises PipelineError if names, or other shapes, differ."""
    faults = []
    if missing := [key for key in own if key not in given]:
        faults.append(f"it lacks {_some(missing)}")
    if unknown := [key for key in given if key not in own]:
        faults.append(f"it has {_some(unknown)} besides")
    shared = [key for key in own if key in given]
    differing = [key for key in shared if own[key].shape != given[key].shape]
    if wrong := [key for key in differing if key.rpartition(".")[0] not in ends]:
        shapes = [f"{key} of {_shape(given[key])}, not {_shape(own[key])}" for key in wrong]
        faults.append(f"it has {_some(shapes)}")
    if wrong := [key for key in shared if own[key].is_floating_point() != given[key].is_floating_point()]:
        faults.append(f"it has {_some([f'{key} of {given[key].dtype}' for key in wrong])}")
    if faults:
        raise PipelineError(f"weights: {path} does not fit the network: {'; '.join(faults)}")
    fitting = {key: given[key] for key in own if key not in differing}
    for key in differing:
        if own[key].ndim == given[key].ndim == 4 and own[key].shape == given[key][:, :1].shape:
            fitting[key] = given[key].sum(1, keepdim=True)
    return fitting


def _of_torchvision(network: str, name: str) -> Path:
    """The file of torchvision's weights of that name, downloaded if torch does not have it yet.

    Raises PipelineError, with the names there are, if there are no such weights, or if they cannot be downloaded.
    """
    from torchvision.models import get_model_weights  # takes two seconds

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
        raise PipelineError(f"weights: {path} is not the file that {url} gives; remove it, then run the command again")
    return path


def _download(url: str, path: Path) -> None:
    """Download one of torchvision's files. Raises PipelineError that says what else can be done if that fails."""
    path.parent.mkdir(parents=True, exist_ok=True)
    expected = HASH.search(path.name)
    patience = socket.getdefaulttimeout()
    socket.setdefaulttimeout(PATIENCE_SECONDS)  # torch waits without end
    print(f"Downloading {url}", flush=True)
    try:
        torch.hub.download_url_to_file(url, str(path), hash_prefix=expected and expected[1])
    except (URLError, SSLError, TimeoutError, ConnectionError, HTTPException, RuntimeError) as error:
        # RuntimeError is torch's for a wrong hash; other kinds of OSError are the disk's, which `run_main` tells
        if isinstance(error, HTTPError):
            error.close()  # an answer, whose connection is open
        reason = " ".join(str(error).split())
        raise PipelineError(
            f"weights: {url} cannot be downloaded: {reason}. Fetch it in another way, then put it into {path.parent}, "
            f"or give its path in params.yaml: `weights: path/to/{path.name}`"
        ) from None
    finally:
        socket.setdefaulttimeout(patience)


def _shape(tensor: Tensor) -> str:
    return " x ".join(map(str, tensor.shape)) or "a number"


def _some(names: list[str]) -> str:
    """The first of several names, for a message of one line: a file may name its tensors as it likes."""
    rest = len(names) - LISTED
    shown = [(name if name.isprintable() else ascii(name))[:100] for name in names[:LISTED]]
    return ", ".join(shown) + (f" and {rest} more" if rest > 0 else "")
