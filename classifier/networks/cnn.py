"""A small residual network: three convolutions that increase the number of channels, and two residual blocks.

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

WIDTHS = (64, 128, 256)  # output channels of the three stages
SMALLEST = 3  # pixels a side; a stage halves the sides only if at least this is left
SMALL = 8  # pixels a side; below it, `SmallMaps` computes the gradient of the weights
ROW = 32  # the most maps that it concatenates


class Residual(nn.Module):
    """Add the result of two convolutions to their input."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            convolution(channels, channels, pools=False), convolution(channels, channels, pools=False)
        )

    def forward(self, maps: Tensor) -> Tensor:
        """Map (N, C, H, W) to the same shape."""
        change: Tensor = self.body(maps)
        return maps + change


class ConvolutionalNetwork(nn.Module):
    """Three convolutions, each of which halves the sides of its maps; residual blocks follow the last two.

    The input is not normalised: the first convolution has no bias, so its batch normalisation removes brightness and
    contrast. A stage halves the sides only if at least 3 x 3 pixels are left. Batch normalisation in training needs
    more than one value for each channel, and so also works on a batch of one image.
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
            # With one channel, pixels count as both contiguous and channels_last, and torch uses the memory format of
            # the weights: set the one that `forward` wants
            self.stages[0].to(memory_format=torch.channels_last)

    def forward(self, pixels: Tensor) -> Tensor:
        """Map pixels (N, C, H, W) float32 in [0, 1] to logits (N, classes)."""
        maps = pixels.contiguous(memory_format=torch.channels_last)  # faster, by half on a CPU
        for stage in self.stages:
            maps = stage(maps)
        logits: Tensor = self.classifier(maps.amax((2, 3)))
        return logits


class Convolution(nn.Conv2d):
    """A 3 x 3 convolution with padding 1 that uses `SmallMaps` when training small maps in bfloat16 on a CPU."""

    def forward(self, maps: Tensor) -> Tensor:
        """Map (N, C, H, W) to (N, out_channels, H, W)."""
        trains = self.training and torch.is_grad_enabled()
        if trains and max(maps.shape[2:]) < SMALL and torch.is_autocast_enabled("cpu") and maps.device.type == "cpu":
            product: Tensor = SmallMaps.apply(maps.bfloat16(), self.weight.bfloat16())
            return product
        return super().forward(maps)


class SmallMaps(torch.autograd.Function):
    """A 3 x 3 convolution whose backward concatenates the maps of a batch along their width.

    The gradient of the weights sums products along the rows of a map. The matrix units of Intel's processors (AMX)
    process 32 bfloat16 numbers at a time, but oneDNN passes them one row of one image: 3 or 7 numbers here. Rows of up
    to 32 images are therefore concatenated, with a column of zeros between neighbours as the padding of both. The sums
    are equal except for rounding. `python -m benchmarks.step` measures the effect.
    """

    @staticmethod
    def forward(ctx: Any, maps: Tensor, weight: Tensor) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(maps, weight)
        return functional.conv2d(maps, weight, padding=1)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None]:  # type: ignore[override]
        maps, weight = ctx.saved_tensors
        needs_maps, needs_weight = ctx.needs_input_grad
        # bias sizes, stride, padding, dilation, transposed, output padding, groups
        options = (None, [1, 1], [1, 1], [1, 1], False, [0, 0], 1)
        backward = torch.ops.aten.convolution_backward
        maps_gradient = backward(gradient, maps, weight, *options, [True, False, False])[0] if needs_maps else None
        if not needs_weight:
            return maps_gradient, None
        gradients, rows = concatenated_rows(gradient), concatenated_rows(maps)
        return maps_gradient, backward(gradients, rows, weight, *options, [False, True, False])[1]


def concatenated_rows(maps: Tensor) -> Tensor:
    """Concatenate groups of G maps along their width, with a column of zeros after each map.

    Map (N, C, H, W) to (N / G, C, H, G * (W + 1)), where G is the greatest common divisor of N and ROW.
    """
    images, channels, height, width = maps.shape
    row = gcd(images, ROW)
    rows = maps.new_empty(images // row, height, row, width + 1, channels)
    rows[..., width, :] = 0
    rows[..., :width, :] = maps.permute(0, 2, 3, 1).reshape(images // row, row, height, width, channels).transpose(1, 2)
    return rows.flatten(2, 3).permute(0, 3, 1, 2)


def convolution(before: int, after: int, pools: bool) -> nn.Sequential:
    """Build a convolution, max pooling if `pools`, batch normalisation and ReLU."""
    return nn.Sequential(
        Convolution(before, after, kernel_size=3, padding=1, bias=False),
        # Pooling first leaves a quarter of the values to normalise
        nn.MaxPool2d(2) if pools else nn.Identity(),
        nn.BatchNorm2d(after),
        nn.ReLU(),
    )


def strided_convolution(before: int, after: int) -> nn.Sequential:
    """Build a convolution that halves the sides, batch normalisation and ReLU.

    An output value takes 16 products for each input channel; with 3 x 3 and pooling it takes 36.
    """
    return nn.Sequential(
        nn.Conv2d(before, after, kernel_size=4, stride=2, padding=1, bias=False), nn.BatchNorm2d(after), nn.ReLU()
    )


def build(image_shape: tuple[int, int, int], classes: int) -> ConvolutionalNetwork:
    return ConvolutionalNetwork(image_shape, classes)
