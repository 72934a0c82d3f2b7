"""torchvision's VGG-16 (Simonyan and Zisserman 2015, arXiv:1409.1556), its first and last layer fitted to the data.

138,357,544 parameters for 3 channels and 1000 classes, 134,301,514 for ten: 0.5 GiB, with gradients and momentum 1.5,
and in an export to ONNX about 5. The state_dict has torchvision's names, so that `weights: IMAGENET1K_V1` in
params.yaml starts from ImageNet, where torchvision states a validation accuracy of 0.716. With `freeze: [features.*]`
only the fully connected layers are trained then.

Images are 32 x 32 or more. Those of 224 x 224 leave the convolutions as maps of 7 x 7, the size that the classifier
takes; maps of other sizes are averaged to it as adaptive_avg_pool2d does, but by matrix products, for its backward is
not deterministic on CUDA. Max pooling is not among the operations that torch lists as such.
"""

from torch import Tensor, nn, zeros
from torchvision import models

from classifier.networks import Normalization
from classifier.pipeline.errors import PipelineError

REDUCTION = 32  # of an image's sides by the five poolings
SIDE = 7  # of the maps that the classifier takes


class VGG16(nn.Module):
    """The layers of torchvision's model, by its names, behind the normalisation of the pixels."""

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
        self.register_buffer("rows", averages(height // REDUCTION), persistent=False)  # not among torchvision's names
        self.register_buffer("columns", averages(width // REDUCTION).T.contiguous(), persistent=False)

    def forward(self, pixels: Tensor) -> Tensor:
        """(N, C, H, W) float32 in [0, 1] to logits (N, classes)."""
        maps = self.features(self.normalize(pixels))
        if maps.shape[2:] != (SIDE, SIDE):
            maps = self.rows @ maps @ self.columns
        logits: Tensor = self.classifier(maps.flatten(1))
        return logits


def averages(size: int) -> Tensor:
    """The matrix (7, size) whose product with `size` numbers is what adaptive averaging to seven makes of them.

    The i-th of the seven is the mean of the numbers from floor(i size / 7) to before ceil((i + 1) size / 7).
    """
    matrix = zeros(SIDE, size)
    for row in range(SIDE):
        start, end = row * size // SIDE, -(-(row + 1) * size // SIDE)
        matrix[row, start:end] = 1 / (end - start)
    return matrix


def build(image_shape: tuple[int, int, int], classes: int) -> VGG16:
    """Raises PipelineError for images that five poolings would leave nothing of."""
    _, height, width = image_shape
    if min(height, width) < REDUCTION:
        raise PipelineError(
            f"network: vgg16 needs images of at least {REDUCTION} x {REDUCTION} pixels, and these are "
            f"{height} x {width}; set `image_size: {REDUCTION}` or more"
        )
    return VGG16(image_shape, classes)
