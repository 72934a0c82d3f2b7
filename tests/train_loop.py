"""The loop of the train stage over one epoch."""

from collections.abc import Callable

from torch import Tensor

from classifier.compute.device import Precision
from classifier.data.loader import Batches
from classifier.training.loop import TrainStep
from classifier.training.state import TrainState


def train_loop(
    batches: Batches,
    state: TrainState,
    loss_fn: Callable[[Tensor, Tensor], Tensor],
    *,
    accumulate_steps: int = 1,
    precision: Precision = "float32",
    after_update: Callable[[], object] = lambda: None,
) -> float:
    """Train to the end of the state's epoch; return the mean of the batches' losses."""
    step = TrainStep(state, batches, loss_fn, accumulate_steps, precision)
    for batch in step.rest_of_epoch():
        if step(*batch):
            after_update()
    return step.mean_loss()
