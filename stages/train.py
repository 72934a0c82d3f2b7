"""Train stage: annotated images in, network weights out.

Reads   data/images.zip, data/annotations/
Writes  models/model_weights.pth, metrics/train.json, metrics/epochs.csv, metrics/environment.json
Keeps   with validation images, the weights of the epoch with the best validation accuracy; else the last ones;
        and until it has written them, checkpoints from which a killed training goes on to the same bytes
"""

import io
from contextlib import ExitStack
from functools import partial
from time import monotonic

import torch

from classifier import files
from classifier.annotations import class_names, write_csv
from classifier.checkpoint import Checkpoints, checkpoints, makings
from classifier.dataset import Batches, CustomImageDataset
from classifier.device import (
    environment,
    keep_freed_memory,
    seed_everything,
    select_device,
    set_threads,
)
from classifier.distributed import ALONE, Group, joined
from classifier.errors import run_main
from classifier.interrupts import held_back
from classifier.networks import Mirrored, build_network
from classifier.params import Params, load_params
from classifier.pretrained import load_pretrained
from classifier.tracking import Tracker
from classifier.training import (
    TrainState,
    build_loss,
    build_optimizer,
    build_scheduler,
    describe,
    freeze,
    test_loop,
    train_loop,
)
from classifier.transforms import one_hot

CHECKPOINT_SECONDS = 60  # between checkpoints at most, however long checkpoint_steps take
LONGEST_STEP = 3  # seconds that a signal waits for the next place to stop at


def main() -> None:
    params = load_params()
    with joined() as group:
        train(params, group)


def train(params: Params, group: Group) -> None:
    tracker = Tracker() if group.is_first else None
    device = select_device(params.device)
    set_threads(params.threads)
    keep_freed_memory()
    recorded = environment(device)
    made_of = makings("train", params.model_dump(), recorded)  # now: while images are decoded, code may be edited

    names = class_names(files.verified(files.ANNOTATIONS))
    train_batches, val_batches, selects = load_batches(params, device, names, group)

    seed_everything(params.seed)  # just before the weights are drawn, as in the tutorial
    network = build_network(params.network, train_batches.dataset.image_shape(), len(names)).to(device)
    start = load_pretrained(network, params.network, params.weights) if params.weights else None
    trainable = freeze(network, params.freeze)
    evaluated = Mirrored(network) if params.test_flip else network
    print(describe(network), flush=True)
    optimizer = build_optimizer(params.optimizer, trainable, params.lr, params.momentum, params.weight_decay)
    updates = params.epochs * -(-len(train_batches) // params.accumulate_steps)
    state = TrainState(network, optimizer, build_scheduler(params.schedule, optimizer, updates))
    state.together = group.train_together(network)
    if not group.is_first:
        torch.manual_seed(params.seed + group.rank)  # other numbers for other images, as dropout draws them
    class_weights = train_batches.dataset.class_weights(names).float().to(device) if params.balance == "loss" else None
    loss_fn = build_loss(params.label_smoothing, class_weights)

    with ExitStack() as stack:
        saved = stack.enter_context(checkpoints(made_of)) if group.is_first else None
        if tracker and saved:
            stack.enter_context(tracker.training(params, recorded, saved.name, saved.started))
            if start:
                tracker.tag({"sha256.weights": start})
        resume(state, group, saved)
        with held_back(LONGEST_STEP) as held:

            def after_update() -> None:
                steps = -(-state.batch // params.accumulate_steps)
                is_due = steps % params.checkpoint_steps == 0 or state.batch == len(train_batches)
                is_late = saved is not None and monotonic() - saved.last > CHECKPOINT_SECONDS
                if group.any(is_due or is_late or held.number is not None):
                    save(state, group, saved)
                    held.release()

            while state.epoch < params.epochs:
                train_loss = train_loop(
                    train_batches,
                    state,
                    loss_fn,
                    accumulate_steps=params.accumulate_steps,
                    precision=params.precision,
                    after_update=after_update,
                )
                images_per_second = train_batches.image_count / state.seconds
                val_loss, val_accuracy = test_loop(val_batches, evaluated, params.precision)
                print(
                    f"Epoch {state.epoch + 1}: Accuracy: {val_accuracy:.1%}, Avg loss: {val_loss:.6f}, "
                    f"train loss: {train_loss:.6f}, {images_per_second:,.0f} images/s",
                    flush=True,
                )
                figures = {"train_loss": train_loss, "val_loss": val_loss, "val_accuracy": val_accuracy}
                better = not selects or not state.kept or val_accuracy > state.kept["val_accuracy"]
                state.end_epoch(figures, keep=better)
                if tracker:
                    tracker.log_metrics(figures | {"images_per_second": images_per_second}, step=state.epoch)

        if group.is_first:
            write(state, recorded)


def save(state: TrainState, group: Group, saved: Checkpoints | None) -> None:
    """Have the first process save what all of them go on from."""
    content = state.content()
    content["random"] = group.gather(content["random"])  # each draws its own numbers, as for dropout
    if saved:
        saved.save(state.epoch, state.batch, content)


def resume(state: TrainState, group: Group, saved: Checkpoints | None) -> None:
    """Go on where this training was killed, if it was."""
    content = group.from_first(lambda: saved.load() if saved else None)
    if content:
        state.restore(content | {"random": content["random"][group.rank]})
        print(f"Going on in epoch {state.epoch + 1} after batch {state.batch}", flush=True)
    elif saved and (other := saved.given_up()):
        print(f"Starting anew, not from the checkpoint of a training that was given up: {other}", flush=True)


def write(state: TrainState, recorded: dict[str, str | int]) -> None:
    content = io.BytesIO()  # torch itself, writing to a full disk, aborts the process
    torch.save(state.weights, content)
    with files.atomic(files.WEIGHTS) as path:
        path.write_bytes(content.getbuffer())
    with files.atomic(files.EPOCHS) as path:
        write_csv(path, {key: [figures[key] for figures in state.history] for key in state.history[0]})
    files.write_json(files.TRAIN_METRICS, state.kept)
    files.write_json(files.ENVIRONMENT, [recorded])  # a list: DVC makes no columns of it in its tables of metrics


def load_batches(
    params: Params, device: torch.device, names: list[str], group: Group = ALONE
) -> tuple[Batches, Batches, bool]:
    """Batches for training, batches for the figures of each epoch, and whether these select the weights to keep.

    Without validation images there is nothing to select by, and the figures are the tutorial's: on test.
    """
    classes = len(names)
    encode = partial(one_hot, classes=classes) if params.target_transform == "one_hot" else None
    images = files.verified(files.IMAGES)
    train_set = CustomImageDataset(files.ANNOTATIONS / "train.csv", images, target_transform=encode, classes=classes)
    # Here for `loss` too: what it refuses is told before images are decoded
    weights = None if params.balance == "none" else train_set.class_weights(names)[train_set.labels]
    val_set = CustomImageDataset(files.ANNOTATIONS / "val.csv", images, classes=classes)
    selects = len(val_set) > 0
    if not selects:
        val_set = CustomImageDataset(files.ANNOTATIONS / "test.csv", images, classes=classes)
    batches = partial(
        Batches,
        batch_size=params.batch_size,
        device=device,
        memory_limit_gib=params.memory_limit_gib,
        workers=params.workers,
        group=group,
    )
    train_batches = batches(
        train_set,
        seed=params.seed,
        shuffle=params.shuffle,
        weights=weights if params.balance == "sampler" else None,
        augmentations=params.augment,
    )
    return train_batches, batches(val_set), selects


if __name__ == "__main__":
    run_main(main)
