"""Networks, one module each. A module `classifier/networks/<name>.py` has one function:

build(image_shape: tuple[int, int, int], classes: int) -> torch.nn.Module
    A network that takes pixels (N, C, H, W), float32 in [0, 1], with (C, H, W) = image_shape, and gives
    logits (N, classes). It normalises its input itself, so that every exported file takes plain pixels.
"""

import importlib

from torch import Tensor, nn, tensor

# Of ImageNet's pixels in [0, 1], by channel: what torchvision's weights were trained with
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Normalization(nn.Module):
    """Pixels in [0, 1] as torchvision's weights want them; for other channels than three by the means over colours."""

    mean: Tensor
    std: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        for name, of_colours in (("mean", MEAN), ("std", STD)):
            values = of_colours if channels == 3 else [sum(of_colours) / 3]
            self.register_buffer(name, tensor(values).view(-1, 1, 1), persistent=False)  # not among torchvision's names

    def forward(self, pixels: Tensor) -> Tensor:
        """(N, C, H, W) to the same shape."""
        normalised: Tensor = (pixels - self.mean) / self.std
        return normalised


class Mirrored(nn.Module):
    """A network whose logits are the mean of those of an image and of its mirror image.

    For images that mean the same when left and right change places. Source: Krizhevsky et al. 2012, section 4.1.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, pixels: Tensor) -> Tensor:
        """(N, C, H, W) float32 in [0, 1] to logits (N, classes) float32."""
        plain, mirrored = self.network(pixels), self.network(pixels.flip(3))
        mean: Tensor = (plain.float() + mirrored.float()) / 2
        return mean


def build_network(name: str, image_shape: tuple[int, int, int], classes: int) -> nn.Module:
    """Build the network whose name `load_params` has checked, with newly drawn weights."""
    network: nn.Module = importlib.import_module(f"classifier.networks.{name}").build(image_shape, classes)
    return network


def describe(network: nn.Module) -> str:
    """The network's structure and its number of parameters, for people."""
    total = sum(parameter.numel() for parameter in network.parameters())
    frozen = sum(parameter.numel() for parameter in network.parameters() if not parameter.requires_grad)
    return f"{network}\n{total:,} parameters" + (f", {frozen:,} of them frozen" if frozen else "")
