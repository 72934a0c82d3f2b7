"""Four 3 x 3 convolutions with batch normalisation, the mean over the image, and one linear layer.

149,114 parameters for grey pixels and ten classes. Measured with seed 42, weights of the last epoch:

- Fashion-MNIST, 55,000 training images: test accuracy 0.9216 after 5 epochs of `optimizer: adamw`, `lr: 0.005`,
  `weight_decay: 0.05`, `schedule: onecycle`, `batch_size: 128`, `shuffle: true`. An epoch takes 11 times as much
  processor time as one of mlp, 39 seconds of one core.
- The digits of scikit-learn, 1,437 of 8 x 8 pixels for training: 0.9917, 0.9944 and 0.9972 on three stratified fifths
  kept for the test, after 10 epochs of the same but `batch_size: 64`.
"""

from itertools import pairwise

import torch
from torch import Tensor, nn

WIDTHS = (16, 64, 96, 96)  # channels behind each convolution
SMALLEST = 4  # pixels a side that pooling must leave


class ConvolutionalNetwork(nn.Module):
    """Stages of convolution, max pooling, batch normalisation and ReLU.

    There is no normalisation before the first stage: its convolution has no bias, so that its batch normalisation
    takes out the images' brightness and contrast. A stage pools only where 4 x 4 pixels or more are left: so batch
    normalisation, which in training needs more than one number a channel, works on a batch of one image.
    """

    def __init__(self, image_shape: tuple[int, int, int], classes: int) -> None:
        super().__init__()
        channels, height, width = image_shape
        side = min(height, width)
        self.stages = nn.ModuleList()
        for before, after in pairwise((channels, *WIDTHS)):
            pools = side // 2 >= SMALLEST
            side = side // 2 if pools else side
            self.stages.append(
                nn.Sequential(
                    nn.Conv2d(before, after, kernel_size=3, padding=1, bias=False),
                    # Before the normalisation, which then has a quarter of the numbers to work on
                    nn.MaxPool2d(2) if pools else nn.Identity(),
                    nn.BatchNorm2d(after),
                    nn.ReLU(),
                )
            )
        self.classifier = nn.Linear(WIDTHS[-1], classes)

    def forward(self, pixels: Tensor) -> Tensor:
        """(N, C, H, W) float32 in [0, 1] to logits (N, classes)."""
        maps = pixels
        for number, stage in enumerate(self.stages):
            maps = stage(maps)
            if number == 0 and maps.device.type == "cpu":  # where this order in memory is quicker, by a quarter
                maps = maps.contiguous(memory_format=torch.channels_last)
        logits: Tensor = self.classifier(maps.mean((2, 3)))
        return logits


def build(image_shape: tuple[int, int, int], classes: int) -> ConvolutionalNetwork:
    return ConvolutionalNetwork(image_shape, classes)
