"""torchvision's ResNet-18 (He et al. 2016, arXiv:1512.03385), with first and last layers adapted to the data.

11,689,512 parameters for 3 channels and 1000 classes, 11,181,642 for ten. The state_dict has torchvision's names, so
`weights: IMAGENET1K_V1` in params.yaml starts from ImageNet weights, for which torchvision states a validation accuracy
of 0.698.

Images below 64 pixels a side would shrink to a single position. For them, as is usual for CIFAR (section 4.2 of the
paper), the first convolution is 3 x 3 with stride 1 and there is no max pooling. ImageNet weights do not fit that
convolution. On scikit-learn's digits, enlarged to 16 x 16, the network reaches a test accuracy of 0.9944 without
pretrained weights: a fifth of the images for the test, 5 epochs, `optimizer: adamw`, `lr: 0.001`, `weight_decay: 0.05`,
`schedule: onecycle`, `shuffle: true`.
"""

from torch import Tensor, nn
from torchvision import models

from classifier.networks import Normalization
from classifier.pipeline.errors import PipelineError

SMALL = 64  # pixels a side: below it, the first layers keep the image's size


class ResNet18(nn.Module):
    """Normalisation of the pixels, then the layers of torchvision's model under its names."""

    def __init__(self, image_shape: tuple[int, int, int], classes: int) -> None:
        super().__init__()
        channels, height, width = image_shape
        model = models.resnet18(num_classes=classes)
        small = min(height, width) < SMALL
        if small:
            model.conv1 = nn.Conv2d(channels, 64, kernel_size=3, padding=1, bias=False)
        else:
            model.conv1 = nn.Conv2d(channels, 64, kernel_size=7, stride=2, padding=3, bias=False)
        nn.init.kaiming_normal_(model.conv1.weight, mode="fan_out", nonlinearity="relu")  # as torchvision's
        self.conv1 = model.conv1
        self.bn1 = model.bn1
        self.relu = model.relu
        self.maxpool = nn.Identity() if small else model.maxpool
        self.layer1 = model.layer1
        self.layer2 = model.layer2
        self.layer3 = model.layer3
        self.layer4 = model.layer4
        self.fc = model.fc
        self.normalize = Normalization(channels)

    def forward(self, pixels: Tensor) -> Tensor:
        """Map pixels (N, C, H, W) float32 in [0, 1] to logits (N, classes)."""
        maps = self.maxpool(self.relu(self.bn1(self.conv1(self.normalize(pixels)))))
        maps = self.layer4(self.layer3(self.layer2(self.layer1(maps))))
        logits: Tensor = self.fc(maps.mean((2, 3)))  # the backward of adaptive_avg_pool2d is not deterministic on CUDA
        return logits


def build(image_shape: tuple[int, int, int], classes: int) -> ResNet18:
    """Build the network. Raises PipelineError for images of 8 x 8 pixels or less.

    Halving those three times leaves one value for each channel. Batch normalisation in training needs two, and the last
    batch of an epoch may be a single image.
    """
    _, height, width = image_shape
    if max(height, width) <= 8:
        raise PipelineError(
            f"network: resnet18 needs images of more than 8 x 8 pixels, but these are {height} x {width}; "
            "set `image_size: 9` or more"
        )
    return ResNet18(image_shape, classes)
