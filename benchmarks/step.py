"""What the parts of a training step cost, and what does not make it quicker.

python -m benchmarks.step [--rounds N]

The tutorial's network, batches of 64 of 60,000 images of noise in memory, in one process, in turns after one that does
not count. `loop` is the bare loop: pixels by index, forward, backward, SGD. The others are the same with one thing
changed; their losses are the same where the line does not say otherwise. Where weights change within the backward pass,
each matrix product adds what it has computed to the weights right away: no gradient is kept, or read again.

Then some steps of the cnn, batches of 256, bfloat16, crop and flip, in processes of their own in turns: as torch and
the C library have it, and with what the train stage and the network add, one after the other. Freed memory is kept
(`keep_freed_memory`); new tensors are not filled with NaN, as deterministic torch does (`choose_kernels`); the
gradients of small maps are computed side by side (`SmallMaps`).
"""

from collections.abc import Callable
from functools import partial
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import deterministic

from benchmarks.measuring import Contender, Report, in_turns, median_ratio, parser, summary
from classifier.compute.device import choose_kernels, keep_freed_memory, seed_everything, set_threads
from classifier.data.transforms import augment, to_float
from classifier.networks import cnn
from classifier.networks.mlp import build
from classifier.pipeline.errors import run_main
from classifier.training.optimization import build_scheduler

IMAGES, BATCH, LR = 60_000, 64, 1e-3
STEPS = 200  # in a turn: short turns, so that a busy moment of the machine meets all variants
SHOWN = 12  # operations
CNN_STEPS, CNN_BATCH = 10, 256  # in a turn


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--rounds", type=int, default=25, help="turns of each variant (default 25)")
    given = arguments.parse_args()
    report = Report("Parts of a step", ("torch",), given.page)
    set_threads("auto")
    pixels, labels = noise(IMAGES)

    variants: dict[str, Callable[[], None]] = {
        "loop": partial(train, pixels, labels),
        "+ losses and gradients checked": partial(train, pixels, labels, checks=True),
        "+ learning rate by a scheduler": partial(train, pixels, labels, schedules=True),
        "without the update": partial(train, pixels, labels, updates=False),
        "SGD(foreach=True)": partial(train, pixels, labels, foreach=True),
        "SGD(fused=True), other last bits": partial(train, pixels, labels, fused=True),
        "gradients kept, not made anew": partial(train, pixels, labels, keeps_gradients=True),
        "weights changed within backward, other last bits": partial(train, pixels, labels, within_backward=True),
        "pixels[index], not index_select": partial(train, pixels, labels, selects=False),
        "pixels kept as float32": partial(train, to_float(pixels), labels),
        "bfloat16, other losses": partial(train, pixels, labels, precision=torch.bfloat16),
        "matrix products alone": products,
    }
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for number in range(given.rounds + 1):
        for name, variant in variants.items():
            started = perf_counter()
            variant()
            if number:
                seconds[name].append(perf_counter() - started)
    report.line(
        f"\n{STEPS} steps of the tutorial's network, batch {BATCH}, {given.rounds} rounds, median ratio to loop"
    )
    for name, taken in seconds.items():
        report.line(f"  {name:48} {median_ratio(taken, seconds['loop']):.2f}  {summary(taken, 's')}")

    report.line(f"\nshare of the time by operation, {STEPS} steps with checks and scheduler under torch's profiler")
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        train(pixels, labels, checks=True, schedules=True)
    operations = sorted(profile.key_averages(), key=lambda event: -event.self_cpu_time_total)
    total = sum(event.self_cpu_time_total for event in operations)
    for event in operations[:SHOWN]:
        report.line(f"  {event.key[:40]:40} {event.self_cpu_time_total / total:6.1%}")
    report_cnn(report, given.rounds)
    report.save()


def noise(count: int) -> tuple[Tensor, Tensor]:
    """Pixels (count, 1, 28, 28) uint8 and labels (count,) int64."""
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (count, 1, 28, 28), dtype=torch.uint8, generator=generator)
    return pixels, torch.randint(0, 10, (count,), generator=generator)


def report_cnn(report: Report, rounds: int) -> None:
    variants = {"as torch has it": 0, "+ freed memory kept": 1, "+ new tensors not filled": 2, "+ small maps": 3}
    contenders = {name: Contender(cnn_steps, added) for name, added in variants.items()}
    turns = in_turns(contenders, rounds)
    for contender in contenders.values():
        contender.close()
    report.line(
        f"\n{CNN_STEPS} steps of the cnn, batch {CNN_BATCH}, bfloat16, {rounds} rounds, median ratio to the first"
    )
    for name, taken in turns.items():
        report.line(f"  {name:24} {median_ratio(taken, turns['as torch has it']):.2f}  {summary(taken, 's')}")


def cnn_steps(added: int) -> Callable[[], float]:
    """Returns a function that takes CNN_STEPS steps, with the first `added` of the pipeline's ways: their seconds."""
    set_threads("auto")
    choose_kernels(deterministic=True, precision="float32")
    seed_everything(0)
    if added >= 1:
        keep_freed_memory()
    deterministic.fill_uninitialized_memory = added < 2  # type: ignore[attr-defined]
    if added <= 2:
        cnn.SMALL = 0
    pixels, labels = noise(CNN_BATCH)
    generator = torch.Generator().manual_seed(0)
    network = cnn.build((1, 28, 28), 10)
    optimizer = torch.optim.SGD(network.parameters(), LR, momentum=0.9)

    def steps() -> float:
        started = perf_counter()
        for _ in range(CNN_STEPS):
            images = augment(to_float(pixels), ("crop", "flip"), generator)
            with torch.autocast("cpu", torch.bfloat16):
                loss = nn.functional.cross_entropy(network(images), labels)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        return perf_counter() - started

    return steps


def train(
    pixels: Tensor,
    labels: Tensor,
    *,
    checks: bool = False,
    schedules: bool = False,
    updates: bool = True,
    keeps_gradients: bool = False,
    foreach: bool | None = None,
    fused: bool | None = None,
    within_backward: bool = False,
    selects: bool = True,
    precision: torch.dtype = torch.float32,
) -> None:
    """STEPS steps over pixels (N, 1, 28, 28), uint8 or float32 in [0, 1], and their labels, in a drawn order."""
    torch.manual_seed(0)
    network = build((1, 28, 28), 10)
    parameters = list(network.parameters())
    optimizer = torch.optim.SGD(parameters, LR, foreach=foreach, fused=fused)
    scheduler = build_scheduler("constant", optimizer, len(pixels))
    if within_backward:
        for module in network.modules():
            if isinstance(module, nn.Linear):
                module.forward = partial(UpdatingLinear.apply, module.weight, module.bias)  # type: ignore[method-assign]
    for index in torch.randperm(len(pixels))[: STEPS * BATCH].split(BATCH):
        images = pixels.index_select(0, index) if selects else pixels[index]
        with torch.autocast("cpu", precision, enabled=precision != torch.float32):
            logits = network(to_float(images) if images.dtype == torch.uint8 else images)
            loss = nn.functional.cross_entropy(logits, labels[index])
        loss.backward()
        if checks:
            loss.item()
            torch.stack([weights.grad.sum() for weights in parameters if weights.grad is not None]).sum().item()
        if updates:
            optimizer.step()
        if schedules:
            scheduler.step()
        optimizer.zero_grad(set_to_none=not keeps_gradients)


class UpdatingLinear(torch.autograd.Function):
    """A linear layer whose backward pass takes SGD's step in its weights; its bias is left to the optimiser."""

    @staticmethod
    def forward(context: Any, weight: Tensor, bias: Tensor, inputs: Tensor) -> Tensor:  # type: ignore[override]
        context.save_for_backward(weight, inputs)
        return nn.functional.linear(inputs, weight, bias)

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> tuple[None, Tensor, Tensor | None]:  # type: ignore[override]
        weight, inputs = context.saved_tensors
        of_inputs = gradient @ weight if context.needs_input_grad[2] else None  # before the weights change
        weight.addmm_(gradient.T, inputs, alpha=-LR)
        return None, gradient.sum(0), of_inputs


def products() -> None:
    """The eight matrix products of each step, on the same operands again and again: caches are as warm as can be."""
    pixels, hidden, gradient = torch.rand(BATCH, 784), torch.rand(BATCH, 512), torch.rand(BATCH, 10)
    first, second, third = torch.rand(512, 784), torch.rand(512, 512), torch.rand(10, 512)
    for _ in range(STEPS):
        pixels @ first.T
        hidden @ second.T
        hidden @ third.T
        gradient.T @ hidden
        gradient @ third
        hidden.T @ hidden
        hidden @ second
        hidden.T @ pixels


if __name__ == "__main__":
    run_main(main)
