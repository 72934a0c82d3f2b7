"""The training state: everything that a resumed training needs to reach the same weights."""

import math
import random
from dataclasses import dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor, nn

from classifier.pipeline.annotations import write_csv
from classifier.pipeline.errors import PipelineError
from classifier.pipeline.outputs import atomic, write_json
from classifier.training.cuda_graphs import GraphedStep
from classifier.training.inference import save_weights


@dataclass
class TrainState:
    """The state of a training between two batches.

    With the same data and parameters, the same state leads to the same weights.
    """

    network: nn.Module
    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LRScheduler
    wrapped: nn.Module | None = None  # the network compiled or wrapped for several processes; None: used as it is
    scaler: torch.amp.GradScaler = field(  # enabled for float16 only
        default_factory=partial(torch.amp.GradScaler, "cpu", enabled=False)
    )
    cuda_graphs: bool = False  # whether to record the training step, see GraphedStep
    graphed_step: GraphedStep | None = None
    pretrained: str | None = None  # SHA-256 of the file of pretrained weights
    epoch: int = 0  # finished epochs
    batch: int = 0  # finished batches of the current epoch
    seconds: float = 0.0  # spent on them
    loss_sum: float = 0.0  # over them
    last_loss: float = math.nan  # of the previous batch
    history: list[dict[str, float]] = field(default_factory=list)  # metrics of each finished epoch
    kept: dict[str, float] = field(default_factory=dict)  # metrics of the epoch that `weights` are from
    weights: dict[str, Tensor] = field(default_factory=dict)  # the weights to write at the end, on the CPU
    pending: list[tuple[int, float, str, Tensor]] = field(default_factory=list)  # batch, lr, quantity, value

    def defer(self, batch: int, quantity: str, value: Tensor) -> None:
        """Queue a batch's "loss" or "gradient" scalar; reading it now would wait for the device."""
        self.pending.append((batch, self.optimizer.param_groups[0]["lr"], quantity, value))

    def flush(self) -> None:
        """Read the queued values, waiting for the device once, and add the losses to `loss_sum`.

        Raises PipelineError for the first value that is not finite.
        """
        if not self.pending:
            return
        numbers = torch.stack([value for *_, value in self.pending]).tolist()
        for (batch, lr, quantity, _), number in zip(self.pending, numbers, strict=True):
            if not math.isfinite(number):
                is_loss = quantity == "loss"
                fault = f"loss is {number}" if is_loss else f"gradient of {self._diverged_parameter()} is not finite"
                self._raise_diverged(f"batch {batch + 1}: the {fault}", lr)
            if quantity == "loss":
                self.loss_sum += number
                self.last_loss = number
        self.pending.clear()

    def end_epoch(self, figures: dict[str, float], keep: bool) -> None:
        """Record the metrics of an epoch, copy its weights to the CPU if `keep`, and start the next epoch.

        Raises PipelineError if a metric is not finite: no training loss shows the effect of the last update.
        """
        for name, figure in figures.items():
            if not math.isfinite(figure):
                self._raise_diverged(f"after its last batch: {name} is {figure}", self.optimizer.param_groups[0]["lr"])
        self.history.append({"epoch": self.epoch + 1} | figures)
        if keep:
            self.kept = self.history[-1]
            self.weights = {name: tensor.cpu().clone() for name, tensor in self.network.state_dict().items()}
        self.epoch, self.batch, self.seconds, self.loss_sum = self.epoch + 1, 0, 0.0, 0.0

    def is_best(self, val_accuracy: float) -> bool:
        """Return whether a validation accuracy is above that of the weights kept so far."""
        return not self.kept or val_accuracy > self.kept["val_accuracy"]

    def state_dict(self) -> dict[str, Any]:
        """Return the state and that of all random number generators, as tensors and plain Python values."""
        self.flush()
        parts = {name: getattr(self, name).state_dict() for name in STATEFUL}
        return parts | {name: getattr(self, name) for name in PLAIN} | {"random": _random_states()}

    def load_state_dict(self, content: dict[str, Any]) -> None:
        """Load a state that `state_dict` returned."""
        for name in STATEFUL:
            getattr(self, name).load_state_dict(content[name])
        for name in PLAIN:
            setattr(self, name, content[name])
        _set_random_states(content["random"])

    def write_results(self, weights: Path, epochs: Path, metrics: Path) -> None:
        """Write the kept weights, the metrics of each epoch (CSV), and those of the kept epoch (JSON)."""
        save_weights(self.weights, weights)
        with atomic(epochs) as path:
            write_csv(path, {key: [figures[key] for figures in self.history] for key in self.history[0]})
        write_json(metrics, self.kept)

    def _diverged_parameter(self) -> str:
        """Return the first parameter whose gradient is not finite; on an accelerator it may be of a later batch."""
        gradients = ((name, parameter.grad) for name, parameter in self.network.named_parameters())
        return next((name for name, grad in gradients if grad is not None and not grad.isfinite().all()), "a parameter")

    def _raise_diverged(self, fault: str, lr: float) -> NoReturn:
        last = (
            "no finite loss before it"
            if math.isnan(self.last_loss)
            else f"the last finite loss was {self.last_loss:.6g}"
        )
        best = f"; the best weights so far are of epoch {self.kept['epoch']:.0f}" if self.kept else ""
        raise PipelineError(
            f"epoch {self.epoch + 1}, {fault} at lr {lr:g}, {last}{best}\n"
            "Lower lr, or look at the images of this batch."
        )


STATEFUL = ("network", "optimizer", "scheduler", "scaler")
NOT_SAVED = ("wrapped", "cuda_graphs", "graphed_step", "pretrained", "pending")
PLAIN = [spec.name for spec in fields(TrainState) if spec.name not in (*STATEFUL, *NOT_SAVED)]


def _random_states() -> dict[str, Any]:
    kind, keys, *rest = np.random.get_state()  # noqa: NPY002, libraries use the global generator
    return {
        "python": random.getstate(),
        "numpy": (kind, torch.from_numpy(np.asarray(keys, np.int64)), *rest),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "mps": torch.mps.get_rng_state() if torch.backends.mps.is_available() else None,
    }


def _set_random_states(states: dict[str, Any]) -> None:
    random.setstate(states["python"])
    kind, keys, *rest = states["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))  # noqa: NPY002
    torch.set_rng_state(states["torch"])
    torch.cuda.set_rng_state_all(states["cuda"])
    if states["mps"] is not None:
        torch.mps.set_rng_state(states["mps"])
