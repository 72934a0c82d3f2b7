"""The state that a training starts from: the network with its first weights, its optimiser and its schedule."""

from typing import TYPE_CHECKING

import torch
from torch import nn

from classifier.compute.device import choose_kernels, place, seed_everything
from classifier.data.loader import Batches
from classifier.networks import build_network, describe
from classifier.pipeline.errors import PipelineError
from classifier.training.optimization import build_optimizer, build_scheduler, freeze
from classifier.training.state import TrainState

if TYPE_CHECKING:  # benchmarks.accelerator runs where pydantic is not installed
    from classifier.pipeline.params import Params


def initial_state(params: "Params", batches: Batches, classes: int) -> TrainState:
    """What params.yaml asks for, before the first update; the network is on the batches' device, and described.

    Raises PipelineError if the pretrained weights cannot be had, `freeze` names no parameter, or all, or the network
    cannot be compiled.
    """
    group, device = batches.group, batches.device
    choose_kernels(deterministic=params.deterministic, precision=params.precision)
    seed_everything(params.seed)  # just before the weights are drawn, as in the tutorial
    network = place(build_network(params.network, batches.image_shape, classes), device)
    pretrained = None
    if params.weights:
        from classifier.training.pretrained import load_pretrained  # needs safetensors, which no other training does

        pretrained = load_pretrained(network, params.network, params.weights)
    trainable = freeze(network, params.freeze)
    print(describe(network), flush=True)
    optimizer = build_optimizer(params.optimizer, trainable, params.lr, params.momentum, params.weight_decay)
    updates = params.epochs * -(-len(batches) // params.accumulate_steps)
    trained = group.ddp_network(network)
    state = TrainState(
        network,
        optimizer,
        build_scheduler(params.schedule, optimizer, updates),
        trained=compiled(trained, device) if params.compile else trained,
        scaler=torch.amp.GradScaler(device.type, enabled=params.precision == "float16"),
        cuda_graphs=params.cuda_graphs,
        pretrained=pretrained,
    )
    if not group.is_first:
        torch.manual_seed(params.seed + group.rank)  # other numbers for other images, as dropout draws them
    return state


def compiled(network: nn.Module, device: torch.device) -> nn.Module:
    """The network, compiled by torch when it is first called. Raises PipelineError if torch cannot compile here."""
    try:
        torch.compile(torch.sin)(torch.ones(8, device=device))
    except Exception as error:  # of many kinds: no C++ compiler, no Triton, another one's version
        reason = str(error).strip().splitlines()[0]
        raise PipelineError(
            f"compile: torch cannot compile for {device} here ({reason}); install a C++ compiler, or set compile: false"
        ) from None
    result: nn.Module = torch.compile(network, dynamic=False)  # type: ignore[assignment]
    return result
