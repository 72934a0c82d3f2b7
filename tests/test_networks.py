"""Tests for every network in classifier/networks, and for the properties of each."""

import io
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional
from torchvision import models

from classifier.export.formats import TOLERANCE, read_logits, write
from classifier.networks import MEAN, STD, Mirrored, build_network, cnn
from classifier.networks.vgg16 import averaging_matrix
from classifier.pipeline.errors import PipelineError
from classifier.pipeline.params import modules_in

NETWORKS = modules_in("networks")
OF_TORCHVISION = ["resnet18", "vgg16"]
SIDES = {"vgg16": 32}  # pixels; 28 otherwise
SLOW = {"vgg16"}  # initialising 134 million parameters takes seconds

Shape = tuple[int, int, int]


def marked(names: list[str], slow: set[str]) -> list[object]:
    return [pytest.param(name, marks=pytest.mark.slow if name in slow else ()) for name in names]


EACH_NETWORK = pytest.mark.parametrize("name", marked(NETWORKS, SLOW))


@pytest.fixture(autouse=True)
def deterministic() -> Iterator[None]:
    """Only deterministic kernels, as in the train stage."""
    torch.set_deterministic_debug_mode("error")
    yield
    torch.set_deterministic_debug_mode("default")


def shape_for(name: str, channels: int = 1) -> Shape:
    return (channels, SIDES.get(name, 28), SIDES.get(name, 28))


def build(name: str, seed: int = 0, image_shape: Shape | None = None, classes: int = 10) -> nn.Module:
    torch.manual_seed(seed)
    return build_network(name, image_shape or shape_for(name), classes)


def test_the_networks_are_found() -> None:
    assert {"mlp", "cnn", "resnet18", "vgg16"} <= set(NETWORKS)


@pytest.mark.parametrize(("channels", "classes"), [(1, 10), (3, 7)])
@EACH_NETWORK
def test_logits(name: str, channels: int, classes: int) -> None:
    image_shape = shape_for(name, channels)
    network = build(name, image_shape=image_shape, classes=classes).eval()
    pixels = torch.rand(5, *image_shape)
    pixels[0], pixels[1] = 0, 1  # black and white
    with torch.inference_mode():
        logits = network(pixels)
        alone = network(pixels[:1])
    assert logits.shape == (5, classes)
    assert logits.dtype == torch.float32
    assert logits.isfinite().all()
    torch.testing.assert_close(alone, logits[:1], rtol=0, atol=1e-5)


@EACH_NETWORK
def test_every_trainable_parameter_gets_a_gradient(name: str) -> None:
    network = build(name).train()
    nn.functional.cross_entropy(network(torch.rand(8, *shape_for(name))), torch.arange(8)).backward()
    for parameter_name, parameter in network.named_parameters():
        assert parameter.requires_grad, parameter_name
        assert parameter.grad is not None, parameter_name
        assert parameter.grad.isfinite().all(), parameter_name
        assert parameter.grad.any(), parameter_name


@EACH_NETWORK
def test_the_last_batch_of_an_epoch_may_be_one_image(name: str) -> None:
    network = build(name).train()
    loss = nn.functional.cross_entropy(network(torch.rand(1, *shape_for(name))), torch.tensor([3]))
    loss.backward()
    assert loss.isfinite()


@EACH_NETWORK
def test_saved_weights_give_the_same_logits(name: str) -> None:
    saved, file = build(name, seed=1).eval(), io.BytesIO()
    pixels = torch.rand(4, *shape_for(name))
    with torch.inference_mode():
        expected = saved(pixels)
        torch.save(saved.state_dict(), file)
        del saved
        loaded = build(name, seed=2).eval()
        assert not torch.equal(loaded(pixels), expected)
        file.seek(0)
        loaded.load_state_dict(torch.load(file, weights_only=True))
        assert torch.equal(loaded(pixels), expected)


@EACH_NETWORK
def test_the_seed_decides_the_weights(name: str) -> None:
    first, second = build(name, seed=3).state_dict(), build(name, seed=3).state_dict()
    assert all(torch.equal(first[key], second[key]) for key in first)


# Half a gigabyte of vgg16 takes a quarter of a minute each time
TIERS = {"resnet18": pytest.mark.slow, "vgg16": pytest.mark.nightly}
EXPORTED = [pytest.param(name, marks=TIERS.get(name, ())) for name in NETWORKS]


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("suffix", ["pt2", pytest.param("onnx", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", EXPORTED)
def test_exported_files_give_the_logits_at_other_batch_sizes(
    name: str, suffix: str, channels: int, tmp_path: Path
) -> None:
    network = build(name, image_shape=shape_for(name, channels)).eval()
    pixels = torch.rand(5, *shape_for(name, channels))
    with torch.inference_mode():
        expected = network(pixels).numpy()
    write(network, pixels[:2], tmp_path / f"model.{suffix}")
    del network
    for count in (1, 5):
        logits = read_logits(tmp_path / f"model.{suffix}", pixels[:count].numpy())
        np.testing.assert_allclose(logits, expected[:count], rtol=0, atol=TOLERANCE)


# The tutorial's


def test_a_mirrored_network_answers_an_image_and_its_mirror_image_alike() -> None:
    network, pixels = build("mlp"), torch.rand(5, 1, 28, 28)
    logits = Mirrored(network)(pixels)
    assert torch.equal(logits, (network(pixels) + network(pixels.flip(3))) / 2)
    assert torch.allclose(logits, Mirrored(network)(pixels.flip(3)), rtol=0, atol=1e-6)
    assert not torch.allclose(logits, network(pixels), rtol=0, atol=1e-3)


def test_mlp_is_the_tutorials() -> None:
    network = build("mlp")
    assert [(name, tuple(parameter.shape)) for name, parameter in network.named_parameters()] == [
        ("linear_relu_stack.0.weight", (512, 784)),
        ("linear_relu_stack.0.bias", (512,)),
        ("linear_relu_stack.2.weight", (512, 512)),
        ("linear_relu_stack.2.bias", (512,)),
        ("linear_relu_stack.4.weight", (10, 512)),
        ("linear_relu_stack.4.bias", (10,)),
    ]
    assert sum(parameter.numel() for parameter in network.parameters()) == 669_706
    assert type(network).__name__ == "NeuralNetwork"
    assert [type(layer) for layer in network.modules()][1:] == [
        nn.Flatten,
        nn.Sequential,
        nn.Linear,
        nn.ReLU,
        nn.Linear,
        nn.ReLU,
        nn.Linear,
    ]


def test_mlp_for_other_images() -> None:
    sizes = {name: tuple(tensor.shape) for name, tensor in build("mlp", 0, (3, 32, 32), 7).state_dict().items()}
    assert sizes["linear_relu_stack.0.weight"] == (512, 3 * 32 * 32)
    assert sizes["linear_relu_stack.4.weight"] == (7, 512)


# The small convolutional one


@pytest.mark.parametrize("image_shape", [(1, 4, 4), (3, 4, 4), (1, 5, 7), (3, 8, 8), (1, 9, 40), (3, 130, 130)])
def test_cnn_takes_images_of_any_size(image_shape: Shape) -> None:
    network = build("cnn", image_shape=image_shape).train()
    network(torch.zeros(1, *image_shape)).sum().backward()  # one image, and black
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in network.parameters())
    assert network.eval()(torch.rand(3, *image_shape)).shape == (3, 10)


def test_cnn_does_not_depend_on_brightness_and_contrast_but_for_the_border() -> None:
    """The batch normalisation after the first convolution removes both."""
    network = build("cnn")
    stage = network.get_submodule("stages.0").train()
    pixels = torch.rand(8, 1, 28, 28)
    inner = (..., slice(1, -1), slice(1, -1))
    torch.testing.assert_close(stage(0.5 * pixels)[inner], stage(pixels)[inner], rtol=0, atol=1e-2)


@pytest.mark.parametrize(
    ("image_shape", "parameters"), [((1, 28, 28), 1_849_226), ((3, 32, 32), 1_851_274), ((1, 128, 128), 1_849_226)]
)
def test_cnn_is_small_whatever_the_images(image_shape: Shape, parameters: int) -> None:
    network = build("cnn", image_shape=image_shape)
    assert sum(parameter.numel() for parameter in network.parameters()) == parameters


@pytest.mark.parametrize("shape", [(0, 3, 3), (1, 3, 3), (5, 7, 7), (64, 3, 5)])
def test_small_maps_have_the_gradients_of_torchs_convolution(shape: tuple[int, int, int]) -> None:
    images, *sides = shape
    maps, weight, factors = torch.rand(images, 4, *sides), torch.rand(6, 4, 3, 3), torch.rand(images, 6, *sides)
    gradients = []
    for convolve in (partial(functional.conv2d, padding=1), cnn.SmallMaps.apply):
        operands = [tensor.double().requires_grad_() for tensor in (maps, weight)]
        (convolve(*operands) * factors).sum().backward()
        gradients.append([operand.grad for operand in operands])
    torch.testing.assert_close(*gradients)


def test_cnn_has_the_same_gradients_whether_small_maps_lie_side_by_side_or_not(monkeypatch: pytest.MonkeyPatch) -> None:
    pixels, labels = torch.rand(8, 1, 28, 28), torch.arange(8)
    gradients = []
    for small in (0, cnn.SMALL):
        monkeypatch.setattr(cnn, "SMALL", small)
        network = build("cnn").train()
        with torch.autocast("cpu", torch.bfloat16):
            functional.cross_entropy(network(pixels), labels).backward()
        gradients.append(
            torch.cat([parameter.grad.flatten() for parameter in network.parameters() if parameter.grad is not None])
        )
    assert torch.cosine_similarity(gradients[0], gradients[1], dim=0) > 0.9999


# torchvision's


@pytest.mark.parametrize(("name", "parameters"), [("resnet18", 11_689_512), ("vgg16", 138_357_544)])
def test_names_and_shapes_are_torchvisions(name: str, parameters: int) -> None:
    with torch.device("meta"):  # takes no memory
        ours = build_network(name, (3, 224, 224), 1000)
        theirs = models.get_model(name)
    assert [(key, tensor.shape) for key, tensor in ours.state_dict().items()] == [
        (key, tensor.shape) for key, tensor in theirs.state_dict().items()
    ]
    assert sum(parameter.numel() for parameter in ours.parameters()) == parameters


@pytest.mark.parametrize("name", OF_TORCHVISION)
def test_pixels_are_normalised_as_for_torchvisions_weights(name: str) -> None:
    preset = models.get_model_weights(name).DEFAULT.transforms()
    assert [*MEAN] == preset.mean
    assert [*STD] == preset.std


@pytest.mark.parametrize(
    ("name", "image_shape", "first"),
    [
        ("resnet18", (3, 64, 64), (64, 3, 7, 7)),
        ("resnet18", (1, 224, 224), (64, 1, 7, 7)),
        ("resnet18", (3, 63, 200), (64, 3, 3, 3)),
        ("resnet18", (1, 28, 28), (64, 1, 3, 3)),
        ("vgg16", (1, 32, 32), (64, 1, 3, 3)),
    ],
)
def test_first_and_last_layer_are_fitted_to_the_data(name: str, image_shape: Shape, first: tuple[int, ...]) -> None:
    with torch.device("meta"):
        tensors = list(build_network(name, image_shape, 7).state_dict().values())
    assert tensors[0].shape == first
    assert tensors[-1].shape == (7,)


@pytest.mark.parametrize("image_shape", [(1, 9, 4), (3, 9, 9), (1, 16, 16), (3, 64, 64)])
def test_resnet18_trains_on_one_image(image_shape: Shape) -> None:
    network = build("resnet18", image_shape=image_shape).train()
    network(torch.rand(1, *image_shape)).sum().backward()


@pytest.mark.parametrize(
    ("name", "size", "message"),
    [
        (
            "resnet18",
            (8, 8),
            r"network: resnet18 needs images of more than 8 x 8 pixels, .* 8 x 8; set `image_size: 9`",
        ),
        (
            "vgg16",
            (28, 28),
            r"network: vgg16 needs images of at least 32 x 32 .* 28 x 28; set `image_size: 32` or more",
        ),
        ("vgg16", (31, 64), r"network: vgg16 needs .* these are 31 x 64; set `image_size: 32` or more"),
    ],
)
def test_images_that_are_too_small_are_refused(name: str, size: tuple[int, int], message: str) -> None:
    with pytest.raises(PipelineError, match=message):
        build_network(name, (1, *size), 10)


@pytest.mark.parametrize("size", [(1, 1), (2, 3), (5, 14), (6, 8), (7, 7), (13, 20)])
def test_averages_are_those_of_adaptive_pooling(size: tuple[int, int]) -> None:
    maps = torch.rand(2, 3, *size)
    expected = nn.functional.adaptive_avg_pool2d(maps, (7, 7))
    torch.testing.assert_close(averaging_matrix(size[0]) @ maps @ averaging_matrix(size[1]).T, expected)
    assert torch.equal(averaging_matrix(7), torch.eye(7))
