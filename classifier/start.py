"""The state that a training starts from: the network with its first weights, its optimiser and its schedule."""

import torch

from classifier.batches import Batches
from classifier.device import seed_everything
from classifier.networks import build_network, describe
from classifier.optimization import build_optimizer, build_scheduler, freeze
from classifier.params import Params
from classifier.pretrained import load_pretrained
from classifier.training import TrainState


def initial_state(params: Params, batches: Batches, classes: int) -> TrainState:
    """What params.yaml asks for, before the first update; the network is on the batches' device, and described.

    Raises PipelineError if the pretrained weights cannot be had, or `freeze` names no parameter, or all.
    """
    group = batches.group
    seed_everything(params.seed)  # just before the weights are drawn, as in the tutorial
    network = build_network(params.network, batches.image_shape, classes).to(batches.device)
    pretrained = load_pretrained(network, params.network, params.weights) if params.weights else None
    trainable = freeze(network, params.freeze)
    print(describe(network), flush=True)
    optimizer = build_optimizer(params.optimizer, trainable, params.lr, params.momentum, params.weight_decay)
    updates = params.epochs * -(-len(batches) // params.accumulate_steps)
    scheduler = build_scheduler(params.schedule, optimizer, updates)
    state = TrainState(network, optimizer, scheduler, group.train_together(network), pretrained)
    if not group.is_first:
        torch.manual_seed(params.seed + group.rank)  # other numbers for other images, as dropout draws them
    return state
