"""torchvision's VGG-16 (Simonyan and Zisserman 2015, arXiv:1409.1556), with first and last layers adapted to the data.

138,357,544 parameters for 3 channels and 1000 classes, 134,301,514 for ten. They take 0.5 GiB, 1.5 GiB with gradients
and momentum; an export to ONNX takes about 5 GiB. The state_dict has torchvision's names, so
`weights: IMAGENET1K_V1` in params.yaml starts from ImageNet weights, for which torchvision states a validation accuracy
of 0.716. `freeze: [features.*]` then trains only the fully connected layers.

Images must be 32 x 32 or more. For 224 x 224, the convolutions return maps of 7 x 7, the input size of the classifier.
Maps of other sizes are averaged to 7 x 7 as adaptive_avg_pool2d does, but by matrix products, because the backward of
adaptive_avg_pool2d is not deterministic on CUDA. Max pooling is not on torch's list of nondeterministic operations.
"""

from torch import Tensor, nn, zeros
from torchvision import models

from classifier.networks import Normalization
from classifier.pipeline.errors import PipelineError

REDUCTION = 32  # factor by which the five poolings reduce the sides of an image
SIDE = 7  # pixels a side of the classifier's input maps


class VGG16(nn.Module):
    """Normalisation of the pixels, then the layers of torchvision's model under its names."""

    rows: Tensor
    columns: Tensor

    def __init__(self, image_shape: tuple[int, int, int], classes: int) -> None:
        super().__init__()
        channels, height, width = image_shape
        model = models.vgg16(num_classes=classes)
        if channels != 3:
            model.features[0] = nn.Conv2d(channels, 64, kernel_size=3, padding=1)
            nn.init.kaiming_normal_(model.features[0].weight, mode="fan_out", nonlinearity="relu")  # as torchvision's
            nn.init.zeros_(model.features[0].bias)
        self.features = model.features
        self.classifier = model.classifier
        self.normalize = Normalization(channels)
        # Not in torchvision's files
        self.register_buffer("rows", averaging_matrix(height // REDUCTION), persistent=False)
        self.register_buffer("columns", averaging_matrix(width // REDUCTION).T.contiguous(), persistent=False)

    def forward(self, pixels: Tensor) -> Tensor:
        """Map pixels (N, C, H, W) float32 in [0, 1] to logits (N, classes)."""
        maps = self.features(self.normalize(pixels))
        if maps.shape[2:] != (SIDE, SIDE):
            maps = self.rows @ maps @ self.columns
        logits: Tensor = self.classifier(maps.flatten(1))
        return logits


def averaging_matrix(size: int) -> Tensor:
    """Return the matrix (7, size) that averages `size` values to seven as adaptive average pooling does.

    Output i is the mean of the values with index from floor(i size / 7) up to, excluding, ceil((i + 1) size / 7).
    """
    matrix = zeros(SIDE, size)
    for row in range(SIDE):
        start, end = row * size // SIDE, -(-(row + 1) * size // SIDE)
        matrix[row, start:end] = 1 / (end - start)
    return matrix


def build(image_shape: tuple[int, int, int], classes: int) -> VGG16:
    """Build the network. Raises PipelineError for images below 32 pixels a side, which five poolings reduce to none."""
    _, height, width = image_shape
    if min(height, width) < REDUCTION:
        raise PipelineError(
            f"network: vgg16 needs images of at least {REDUCTION} x {REDUCTION} pixels, but these are "
            f"{height} x {width}; set `image_size: {REDUCTION}` or more"
        )
    return VGG16(image_shape, classes)
