"""Inference: load and save weights, compute logits, scores and saliency."""

import io
import math
import os
import warnings
import zipfile
from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from classifier.compute.device import Precision, naming_batch_size, place
from classifier.data.loader import Batches
from classifier.networks import Mirrored, build_network
from classifier.pipeline.errors import PipelineError
from classifier.pipeline.outputs import atomic
from classifier.progress import progress


def trained_network(
    weights: Path, name: str, image_shape: tuple[int, int, int], classes: int, device: torch.device, *, test_flip: bool
) -> nn.Module:
    """Build the network with the weights that the train stage wrote; with test_flip, average over mirror images.

    Raises PipelineError if the weights are those of another network.
    """
    network = place(build_network(name, image_shape, classes), device)
    load_weights(network, weights, device)
    return Mirrored(network) if test_flip else network


def load_weights(network: nn.Module, path: Path, device: torch.device) -> None:
    """Load a state_dict that torch.save wrote, without running code from the file.

    Raises PipelineError if the file is missing, is not a state_dict, or holds weights of another network.
    """
    state = read_weights(path, device)
    try:
        network.load_state_dict(state)
    except (RuntimeError, TypeError, AttributeError) as error:  # the last two if it is no dict with str keys
        reason = " ".join(str(error).split())[:300]
        raise PipelineError(f"weights: {path} does not hold weights of this network: {reason}") from None


def read_weights(path: Path, device: torch.device) -> Any:
    """Return the tensors and plain values that torch.save wrote to a file, without running code from it.

    Raises PipelineError if the file is missing or holds anything else.
    """
    if not os.path.isfile(path):  # noqa: PTH113, pathlib raises an error for a name that is too long
        raise PipelineError(f"weights: there is no file {path}")
    try:
        _refuse_compressed(path)
        with warnings.catch_warnings(action="ignore"):  # torch warns about files of other programs
            return torch.load(path, map_location=device, weights_only=True)
    except Exception:  # torch raises several types, and advises to load the file as code
        raise PipelineError(
            f"weights: {path} cannot be read; it must be a complete file that holds only tensors, as "
            "torch.save(network.state_dict(), path) writes"
        ) from None


def save_weights(weights: Mapping[str, Tensor], path: Path) -> None:
    """Write weights by name to a file, atomically; `read_weights` reads them."""
    content = io.BytesIO()  # torch.save to a file aborts the process when the disk is full
    torch.save(weights, content)
    with atomic(path) as temporary:
        temporary.write_bytes(content.getbuffer())


def _refuse_compressed(path: Path) -> None:
    """Raise ValueError for a compressed zip, which torch.save never writes: kilobytes can expand to gigabytes."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            if any(member.compress_type != zipfile.ZIP_STORED for member in archive.infolist()):
                raise ValueError


@torch.inference_mode()
def predict_logits(batches: Batches, network: nn.Module, precision: Precision) -> Tensor:
    """Return the logits of all images, (N, classes) float32 on the CPU, in dataset order, in every process."""
    network.eval()
    counts = [batches.count(number) for number in range(len(batches))]
    with (
        naming_batch_size(batches.device, batches.batch_size),
        autocast(batches.device, precision),
        progress("predicting", "image", sum(counts), hidden=not batches.group.is_first, leave=False) as bar,
    ):
        logits = []
        for count, (pixels, _) in zip(counts, batches.epoch(), strict=True):
            logits.append(network(pixels).float())
            bar.update(count)
    return batches.group.in_order(torch.cat(logits).cpu(), counts)


def test_loop(batches: Batches, network: nn.Module, precision: Precision) -> tuple[float, float]:
    """Return average loss and accuracy of a split, as `score` does; the target transform is not used."""
    return score(predict_logits(batches, network, precision), batches.dataset.labels, batches.batch_size)


test_loop.__test__ = False  # type: ignore[attr-defined]  # the tutorial's name, not a test for pytest


def score(logits: Tensor, labels: Tensor, batch_size: int) -> tuple[float, float]:
    """Return average loss and accuracy (a fraction) of logits (N, C) float32 for labels (N,) int64.

    The loss is what PyTorch's tutorial prints as `Avg loss`: the mean over batches of the mean cross entropy of each
    batch. In a smaller last batch, each image has a larger weight.
    """
    losses = nn.functional.cross_entropy(logits.double(), labels, reduction="none")
    loss = torch.stack([batch.mean() for batch in losses.split(batch_size)]).mean()
    return loss.item(), (logits.argmax(1) == labels).double().mean().item()


def advice(accuracy: float, labels: Tensor) -> str:
    """Return advice if the accuracy is not clearly above the share of the largest class, otherwise an empty string.

    Clearly means by more than two standard errors of that share. labels: (N,) int64.
    """
    count = len(labels)
    share = labels.bincount().max().item() / count
    if accuracy > share + 2 * math.sqrt(share * (1 - share) / count):
        return ""
    return (
        f"The network is not clearly better than always predicting the largest class ({share:.1%}): train it "
        "longer, or with another lr, optimizer or network"
    )


def saliency(network: nn.Module, pixels: Tensor) -> Tensor:
    """Return the largest |gradient| over channels of the winning logit by each pixel, (N, H, W) on the CPU.

    pixels: (N, C, H, W) float32 on the network's device. Source: Simonyan et al. 2013, arXiv:1312.6034.
    """
    network.eval()
    pixels = pixels.clone().requires_grad_()
    winning = network(pixels).max(dim=1).values
    (gradient,) = torch.autograd.grad(winning.sum(), pixels)
    return gradient.abs().amax(dim=1).cpu()


def autocast(device: torch.device, precision: Precision) -> AbstractContextManager[object]:
    """Return a context in which networks compute in this precision; `choose_kernels` sets float32 or tf32."""
    dtype = torch.float16 if precision == "float16" else torch.bfloat16
    return torch.autocast(device.type, dtype, enabled=precision in ("bfloat16", "float16"))
