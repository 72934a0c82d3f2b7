"""The initial training state: the network with its first weights, its optimiser and its schedule."""

from typing import TYPE_CHECKING

import torch
from torch import nn

from classifier.compute.device import choose_kernels, place, seed_everything
from classifier.data.loader import Batches
from classifier.networks import build_network, describe_network
from classifier.pipeline.errors import PipelineError
from classifier.training.optimization import build_optimizer, build_scheduler, freeze
from classifier.training.state import TrainState

if TYPE_CHECKING:  # benchmarks.accelerator runs where pydantic is not installed
    from classifier.pipeline.params import Params


def initial_state(params: "Params", batches: Batches, classes: int) -> TrainState:
    """Build the training state for these parameters, on the device of the batches, and print the network.

    Raises PipelineError if the pretrained weights cannot be loaded, if `freeze` matches no parameter or every
    parameter, or if the network cannot be compiled.
    """
    group, device = batches.group, batches.device
    choose_kernels(deterministic=params.deterministic, precision=params.precision)
    seed_everything(params.seed)  # immediately before the weights are drawn
    network = place(build_network(params.network, batches.image_shape, classes), device)
    pretrained = None
    if params.weights:
        from classifier.training.pretrained import load_pretrained  # imports safetensors, which is not always installed

        pretrained = load_pretrained(network, params.network, params.weights)
    trainable = freeze(network, params.freeze)
    print(describe_network(network), flush=True)
    optimizer = build_optimizer(params.optimizer, trainable, params.lr, params.momentum, params.weight_decay)
    updates = params.epochs * -(-len(batches) // params.accumulate_steps)
    wrapped = group.ddp_network(network)
    state = TrainState(
        network,
        optimizer,
        build_scheduler(params.schedule, optimizer, updates),
        wrapped=compile_network(wrapped, device) if params.compile else wrapped,
        scaler=torch.amp.GradScaler(device.type, enabled=params.precision == "float16"),
        cuda_graphs=params.cuda_graphs,
        pretrained=pretrained,
    )
    if not group.is_first:
        torch.manual_seed(params.seed + group.rank)  # processes have different images, so also different dropout
    return state


def compile_network(network: nn.Module, device: torch.device) -> nn.Module:
    """Return a module that torch compiles on its first call. Raises PipelineError if torch cannot compile here."""
    try:
        torch.compile(torch.sin)(torch.ones(8, device=device))
    except Exception as error:  # several types: no C++ compiler, no Triton, or an incompatible version of either
        reason = str(error).strip().splitlines()[0]
        raise PipelineError(
            f"compile: torch cannot compile for {device} here ({reason}); install a C++ compiler, or set compile: false"
        ) from None
    result: nn.Module = torch.compile(network, dynamic=False)  # type: ignore[assignment]
    return result
