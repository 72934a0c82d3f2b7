"""The state of a training: all that it needs to go on to the same weights."""

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
    """All that training goes on from: with the same data and parameters, the same state leads to the same weights."""

    network: nn.Module
    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LRScheduler
    trained: nn.Module | None = None  # the network as it is trained: compiled, or by several processes; else itself
    # Of float16 gradients; in other precisions it is off, and does nothing
    scaler: torch.amp.GradScaler = field(default_factory=partial(torch.amp.GradScaler, "cpu", enabled=False))
    cuda_graphs: bool = False  # record the training step, if it can be: see GraphedStep
    graphed_step: GraphedStep | None = None
    pretrained: str | None = None  # the SHA-256 of the file of weights that it started from
    epoch: int = 0  # epochs that are done
    batch: int = 0  # batches of the epoch under way that are done
    seconds: float = 0.0  # that they took
    loss_sum: float = 0.0  # of theirs
    last_loss: float = math.nan  # of the batch before
    history: list[dict[str, float]] = field(default_factory=list)  # the figures of each epoch
    kept: dict[str, float] = field(default_factory=dict)  # those of the epoch whose weights are kept
    weights: dict[str, Tensor] = field(default_factory=dict)  # the weights kept, on the CPU
    pending: list[tuple[int, float, str, Tensor]] = field(default_factory=list)  # see flush

    def defer(self, batch: int, what: str, tensor: Tensor) -> None:
        """Queue a batch's loss, or the norm of its gradients; reading it now would wait for the device."""
        self.pending.append((batch, self.optimizer.param_groups[0]["lr"], what, tensor))

    def flush(self) -> None:
        """Read the queued figures, in one wait for the device, and add the losses to the sum.

        Raises PipelineError for the first number that is not finite.
        """
        if not self.pending:
            return
        numbers = torch.stack([tensor for *_, tensor in self.pending]).tolist()
        for (batch, lr, what, _), number in zip(self.pending, numbers, strict=True):
            if not math.isfinite(number):
                fault = f"loss is {number}" if what == "loss" else f"gradient of {self._broken()} is not finite"
                self._diverged(f"batch {batch + 1}: the {fault}", lr)
            if what == "loss":
                self.loss_sum += number
                self.last_loss = number
        self.pending.clear()

    def end_epoch(self, figures: dict[str, float], keep: bool) -> None:
        """Note an epoch's figures, keep the weights that it ended with if they are better, and turn to the next.

        Raises PipelineError if a figure is not finite: the last update can break what no training loss has met.
        """
        for name, figure in figures.items():
            if not math.isfinite(figure):
                self._diverged(f"after its last batch: {name} is {figure}", self.optimizer.param_groups[0]["lr"])
        self.history.append({"epoch": self.epoch + 1} | figures)
        if keep:
            self.kept = self.history[-1]
            self.weights = {name: tensor.cpu().clone() for name, tensor in self.network.state_dict().items()}
        self.epoch, self.batch, self.seconds, self.loss_sum = self.epoch + 1, 0, 0.0, 0.0

    def is_best(self, val_accuracy: float) -> bool:
        """Whether an epoch's validation accuracy is above that of the epoch whose weights are kept."""
        return not self.kept or val_accuracy > self.kept["val_accuracy"]

    def state_dict(self) -> dict[str, Any]:
        """Everything, the random number generators' states included, as tensors and plain Python values."""
        self.flush()
        parts = {name: getattr(self, name).state_dict() for name in STATEFUL}
        return parts | {name: getattr(self, name) for name in PLAIN} | {"random": _random_states()}

    def load_state_dict(self, content: dict[str, Any]) -> None:
        """Take over what `state_dict` gave."""
        for name in STATEFUL:
            getattr(self, name).load_state_dict(content[name])
        for name in PLAIN:
            setattr(self, name, content[name])
        _set_random_states(content["random"])

    def write_results(self, weights: Path, epochs: Path, metrics: Path) -> None:
        """Write the kept weights, the figures of each epoch (CSV), and those of the kept epoch (JSON)."""
        save_weights(self.weights, weights)
        with atomic(epochs) as path:
            write_csv(path, {key: [figures[key] for figures in self.history] for key in self.history[0]})
        write_json(metrics, self.kept)

    def _broken(self) -> str:
        """The first parameter whose gradient is not finite; on an accelerator, of a batch that may be a later one."""
        gradients = ((name, parameter.grad) for name, parameter in self.network.named_parameters())
        return next((name for name, grad in gradients if grad is not None and not grad.isfinite().all()), "a parameter")

    def _diverged(self, what: str, lr: float) -> NoReturn:
        before = "the first" if math.isnan(self.last_loss) else f"the last finite loss was {self.last_loss:.6g}"
        best = f"; the best weights so far are of epoch {self.kept['epoch']:.0f}" if self.kept else ""
        raise PipelineError(
            f"epoch {self.epoch + 1}, {what} at lr {lr:g}, {before}{best}\n"
            "Lower lr, or look at the images of this batch."
        )


STATEFUL = ("network", "optimizer", "scheduler", "scaler")
NOT_SAVED = ("trained", "cuda_graphs", "graphed_step", "pretrained", "pending")
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
