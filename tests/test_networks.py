"""Every network in classifier/networks, found by listing, and the tutorial's network in detail."""

import io

import pytest
import torch
from torch import nn

from classifier.networks import build_network
from classifier.params import modules_in

NETWORKS = modules_in("networks")


def build(name: str, seed: int = 0, image_shape: tuple[int, int, int] = (1, 28, 28), classes: int = 10) -> nn.Module:
    torch.manual_seed(seed)
    return build_network(name, image_shape, classes)


def test_the_tutorials_network_is_found() -> None:
    assert "mlp" in NETWORKS


@pytest.mark.parametrize(("image_shape", "classes"), [((1, 28, 28), 10), ((3, 32, 32), 7)])
@pytest.mark.parametrize("name", NETWORKS)
def test_logits(name: str, image_shape: tuple[int, int, int], classes: int) -> None:
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


@pytest.mark.parametrize("name", NETWORKS)
def test_every_trainable_parameter_gets_a_gradient(name: str) -> None:
    network = build(name).train()
    nn.functional.cross_entropy(network(torch.rand(8, 1, 28, 28)), torch.arange(8)).backward()
    for parameter_name, parameter in network.named_parameters():
        assert parameter.requires_grad, parameter_name
        assert parameter.grad is not None, parameter_name
        assert parameter.grad.isfinite().all(), parameter_name
        assert parameter.grad.any(), parameter_name


@pytest.mark.parametrize("name", NETWORKS)
def test_saved_weights_give_the_same_logits(name: str) -> None:
    saved, loaded = build(name, seed=1).eval(), build(name, seed=2).eval()
    pixels = torch.rand(4, 1, 28, 28)
    assert not torch.equal(loaded(pixels), saved(pixels))
    file = io.BytesIO()
    torch.save(saved.state_dict(), file)
    file.seek(0)
    loaded.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(loaded(pixels), saved(pixels))


@pytest.mark.parametrize("name", NETWORKS)
def test_the_seed_decides_the_weights(name: str) -> None:
    first, second = build(name, seed=3).state_dict(), build(name, seed=3).state_dict()
    assert all(torch.equal(first[key], second[key]) for key in first)


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
