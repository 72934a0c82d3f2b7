"""Three convolutions that widen the maps, and two residual blocks between them.

1,849,226 parameters for grey pixels and ten classes. Fashion-MNIST, all 60,000 training images:

    dvc exp run -S network=cnn -S val_size=0 -S epochs=16 -S batch_size=256 -S lr=0.2 -S momentum=0.9 \\
        -S weight_decay=0.001 -S schedule=onecycle -S label_smoothing=0.1 -S 'augment=[flip, erase]' \\
        -S precision=bfloat16 -S test_flip=true

Test accuracy after the last epoch 0.9407 ± 0.0007 (five seeds), in 686 ± 76 seconds on two threads of an Intel Xeon
(family 6, model 207): `python -m benchmarks.time_to_accuracy --only recipe`. With `epochs=60` and
`augment=[crop, flip, erase]` one run came to 0.9428 (95 % interval 0.9381 to 0.9472), in 50 minutes there.
"""

from math import gcd
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

WIDTHS = (64, 128, 256)  # channels behind each convolution that widens the maps
SMALLEST = 3  # pixels a side that halving must leave
SMALL = 8  # pixels a side below which maps are laid side by side
ROW = 32  # so many at most


class Residual(nn.Module):
    """Two convolutions whose result is added to what they were given."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            convolution(channels, channels, pools=False), convolution(channels, channels, pools=False)
        )

    def forward(self, maps: Tensor) -> Tensor:
        """(N, C, H, W) to the same shape."""
        change: Tensor = self.body(maps)
        return maps + change


class ConvolutionalNetwork(nn.Module):
    """A convolution, then twice a convolution with a residual block, each convolution that widens with half the side.

    There is no normalisation before the first stage: its convolution has no bias, so that its batch normalisation
    takes out the images' brightness and contrast. A stage halves the sides only where 3 x 3 pixels or more are left: so
    batch normalisation, which in training needs more than one number a channel, works on a batch of one image.
    """

    def __init__(self, image_shape: tuple[int, int, int], classes: int) -> None:
        super().__init__()
        before, height, width = image_shape
        side = min(height, width)
        self.stages = nn.ModuleList()
        for number, after in enumerate(WIDTHS):
            halves = side // 2 >= SMALLEST
            side = side // 2 if halves else side
            if number:
                stage = nn.Sequential(*convolution(before, after, pools=halves), Residual(after))
            else:
                stage = strided_convolution(before, after) if halves else convolution(before, after, pools=False)
            self.stages.append(stage)
            before = after
        self.classifier = nn.Linear(WIDTHS[-1], classes)
        if image_shape[0] == 1:
            # The order in memory that `forward` asks for: pixels with one channel are in both orders, and torch then
            # goes by the weights
            self.stages[0].to(memory_format=torch.channels_last)

    def forward(self, pixels: Tensor) -> Tensor:
        """(N, C, H, W) float32 in [0, 1] to logits (N, classes)."""
        maps = pixels.contiguous(memory_format=torch.channels_last)  # quicker, by half on a CPU
        for stage in self.stages:
            maps = stage(maps)
        logits: Tensor = self.classifier(maps.amax((2, 3)))
        return logits


class Convolution(nn.Conv2d):
    """3 x 3, padded by 1: as torch's, with the gradient of the weights sooner where bfloat16 trains small maps."""

    def forward(self, maps: Tensor) -> Tensor:
        """(N, C, H, W) to (N, `out_channels`, H, W)."""
        trains = self.training and torch.is_grad_enabled()
        if trains and max(maps.shape[2:]) < SMALL and torch.is_autocast_enabled("cpu") and maps.device.type == "cpu":
            product: Tensor = SmallMaps.apply(maps.bfloat16(), self.weight.bfloat16())
            return product
        return super().forward(maps)


class SmallMaps(torch.autograd.Function):
    """A 3 x 3 convolution of small maps whose backward lays the maps of a batch side by side.

    The gradient of the weights sums products along a map's rows. The matrix units of Intel's processors (AMX) take 32
    bfloat16 numbers at a time, and oneDNN gives them one row of one image: 3 or 7 numbers here. In a row of 32 images,
    with a column of zeros between neighbours as the padding of both, the sums are the same but for rounding.
    `python -m benchmarks.step` measures it.
    """

    @staticmethod
    def forward(ctx: Any, maps: Tensor, weight: Tensor) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(maps, weight)
        return functional.conv2d(maps, weight, padding=1)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None]:  # type: ignore[override]
        maps, weight = ctx.saved_tensors
        of_maps, of_weight = ctx.needs_input_grad
        one, none = [1, 1], [0, 0]  # stride, padding and dilation; padding of the output
        rest = (weight, None, one, one, one, False, none, 1)
        backward = torch.ops.aten.convolution_backward
        maps_gradient = backward(gradient, maps, *rest, [True, False, False])[0] if of_maps else None
        if not of_weight:
            return maps_gradient, None
        return maps_gradient, backward(side_by_side(gradient), side_by_side(maps), *rest, [False, True, False])[1]


def side_by_side(maps: Tensor) -> Tensor:
    """(N, C, H, W) to (N / G, C, H, G * (W + 1)), zeros behind each map; G is at most ROW and a divisor of N."""
    images, channels, height, width = maps.shape
    row = gcd(images, ROW)
    rows = maps.new_empty(images // row, height, row, width + 1, channels)
    rows[..., width, :] = 0
    rows[..., :width, :] = maps.permute(0, 2, 3, 1).reshape(images // row, row, height, width, channels).transpose(1, 2)
    return rows.flatten(2, 3).permute(0, 3, 1, 2)


def convolution(before: int, after: int, pools: bool) -> nn.Sequential:
    """Convolution, max pooling where asked, batch normalisation and ReLU."""
    return nn.Sequential(
        Convolution(before, after, kernel_size=3, padding=1, bias=False),
        # Before the normalisation, which then has a quarter of the numbers to work on
        nn.MaxPool2d(2) if pools else nn.Identity(),
        nn.BatchNorm2d(after),
        nn.ReLU(),
    )


def strided_convolution(before: int, after: int) -> nn.Sequential:
    """A convolution that halves the sides, batch normalisation and ReLU: 16 products where one that pools has 36."""
    return nn.Sequential(
        nn.Conv2d(before, after, kernel_size=4, stride=2, padding=1, bias=False), nn.BatchNorm2d(after), nn.ReLU()
    )


def build(image_shape: tuple[int, int, int], classes: int) -> ConvolutionalNetwork:
    return ConvolutionalNetwork(image_shape, classes)
