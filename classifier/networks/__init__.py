"""Networks, one module each. A module `classifier/networks/<name>.py` has one function:

build(image_shape: tuple[int, int, int], classes: int) -> torch.nn.Module
    A network that takes pixels (N, C, H, W), float32 in [0, 1], with (C, H, W) = image_shape, and gives
    logits (N, classes). It normalises its input itself, so that every exported file takes plain pixels.
"""

import importlib

from torch import nn


def build_network(name: str, image_shape: tuple[int, int, int], classes: int) -> nn.Module:
    """Build the network whose name `load_params` has checked, with newly drawn weights."""
    network: nn.Module = importlib.import_module(f"classifier.networks.{name}").build(image_shape, classes)
    return network
