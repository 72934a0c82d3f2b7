"""Networks, one module each. A module `classifier/networks/<name>.py` defines one function:

build(image_shape: tuple[int, int, int], classes: int) -> torch.nn.Module
    Return a network that maps pixels (N, C, H, W), float32 in [0, 1], with (C, H, W) = image_shape, to
    logits (N, classes). The network normalises its input, so every exported file takes unnormalised pixels.
"""

import importlib

from torch import Tensor, nn, tensor

# Of ImageNet's pixels in [0, 1], by channel; torchvision's weights were trained with this normalisation
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Normalization(nn.Module):
    """Normalise pixels in [0, 1] as torchvision does; unless there are three channels, by the means over channels."""

    mean: Tensor
    std: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        for name, by_channel in (("mean", MEAN), ("std", STD)):
            values = by_channel if channels == 3 else [sum(by_channel) / 3]
            self.register_buffer(name, tensor(values).view(-1, 1, 1), persistent=False)  # not in torchvision's files

    def forward(self, pixels: Tensor) -> Tensor:
        """Map (N, C, H, W) to the same shape."""
        normalised: Tensor = (pixels - self.mean) / self.std
        return normalised


class Mirrored(nn.Module):
    """Average the logits of an image and of its mirror image.

    This suits images whose class does not change when they are mirrored. Source: Krizhevsky et al. 2012, section 4.1.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, pixels: Tensor) -> Tensor:
        """Map pixels (N, C, H, W) float32 in [0, 1] to logits (N, classes) float32."""
        plain, mirrored = self.network(pixels), self.network(pixels.flip(3))
        mean: Tensor = (plain.float() + mirrored.float()) / 2
        return mean


def build_network(name: str, image_shape: tuple[int, int, int], classes: int) -> nn.Module:
    """Build a network with newly initialised weights. `load_params` has checked the name."""
    network: nn.Module = importlib.import_module(f"classifier.networks.{name}").build(image_shape, classes)
    return network


def describe_network(network: nn.Module) -> str:
    """Return the network's structure and its number of parameters as text."""
    total = sum(parameter.numel() for parameter in network.parameters())
    frozen = sum(parameter.numel() for parameter in network.parameters() if not parameter.requires_grad)
    return f"{network}\n{total:,} parameters" + (f", {frozen:,} of them frozen" if frozen else "")
