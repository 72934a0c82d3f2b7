"""The network of PyTorch's "Learn the basics" tutorial: three linear layers, pixels-512-512-classes, with ReLU.

669,706 parameters for 28 x 28 grey pixels and ten classes. With the tutorial's recipe (SGD, rate 1e-3, batch
size 64, ten epochs in file order) it reaches a test accuracy of 0.710 on Fashion-MNIST.
"""

import math

from torch import Tensor, nn


class NeuralNetwork(nn.Module):
    """Fully connected layers on the flattened, unnormalised image."""

    def __init__(self, image_shape: tuple[int, int, int], classes: int) -> None:
        super().__init__()
        self.flatten = nn.Flatten()
        self.linear_relu_stack = nn.Sequential(
            nn.Linear(math.prod(image_shape), 512),
            nn.ReLU(),
            nn.Linear(512, 512),
            nn.ReLU(),
            nn.Linear(512, classes),
        )

    def forward(self, pixels: Tensor) -> Tensor:
        """Map pixels (N, C, H, W) float32 in [0, 1] to logits (N, classes)."""
        logits: Tensor = self.linear_relu_stack(self.flatten(pixels))
        return logits


def build(image_shape: tuple[int, int, int], classes: int) -> NeuralNetwork:
    return NeuralNetwork(image_shape, classes)
