"""Train stage: annotated images in, network weights out.

Reads   data/images.zip, data/annotations/
Writes  models/model_weights.pth, metrics/train.json, metrics/epochs.csv, metrics/environment.json
Keeps   with validation images, the weights of the epoch with the best validation accuracy; else the last ones;
        and until it has written them, checkpoints from which a killed training goes on to the same bytes
"""

import io
from contextlib import ExitStack

import torch

from classifier import files
from classifier.annotations import class_names, write_csv
from classifier.batches import batches_of, training_batches
from classifier.checkpoint import checkpoints, going_on, makings
from classifier.dataset import annotated
from classifier.device import environment, keep_freed_memory, select_device, set_threads
from classifier.distributed import Group, joined
from classifier.errors import run_main
from classifier.inference import test_loop
from classifier.networks import Mirrored
from classifier.optimization import build_loss
from classifier.params import Params, load_params
from classifier.start import initial_state
from classifier.tracking import Tracker
from classifier.training import TrainState, train_loop


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
    # Before images are decoded: meanwhile, code may be edited
    made_of = makings("train", params.model_dump(), recorded) if group.is_first else None

    names = class_names(files.verified(files.ANNOTATIONS))
    train_set, val_set, test_set = annotated(["train", "val", "test"], len(names))
    train_batches = training_batches(train_set, names, params, device, group)
    # Without validation images there is nothing to select weights by; an epoch's figures are the tutorial's: on test
    selects = len(val_set) > 0
    val_batches = batches_of(val_set if selects else test_set, params, device, group)
    class_weights = train_set.class_weights(names).float().to(device) if params.balance == "loss" else None
    loss_fn = build_loss(params.label_smoothing, class_weights)
    state = initial_state(params, train_batches, len(names))
    evaluated = Mirrored(state.network) if params.test_flip else state.network

    with ExitStack() as stack:
        saved = stack.enter_context(checkpoints(made_of)) if made_of else None
        if tracker and saved:
            stack.enter_context(tracker.training(params, recorded, saved.name, saved.started))
            if state.pretrained:
                tracker.tag({"sha256.weights": state.pretrained})
        every = params.checkpoint_steps * params.accumulate_steps
        with going_on(state, group, saved, every=every, last=len(train_batches)) as after_update:
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
                state.end_epoch(figures, keep=not selects or state.is_best(val_accuracy))
                if tracker:
                    tracker.log_metrics(figures | {"images_per_second": images_per_second}, step=state.epoch)
        if group.is_first:
            write(state, recorded)


def write(state: TrainState, recorded: dict[str, str | int]) -> None:
    """Write the outputs: the weights that were kept, the figures of each epoch, and where they were computed."""
    content = io.BytesIO()  # torch itself, writing to a full disk, aborts the process
    torch.save(state.weights, content)
    with files.atomic(files.WEIGHTS) as path:
        path.write_bytes(content.getbuffer())
    with files.atomic(files.EPOCHS) as path:
        write_csv(path, {key: [figures[key] for figures in state.history] for key in state.history[0]})
    files.write_json(files.TRAIN_METRICS, state.kept)
    files.write_json(files.ENVIRONMENT, [recorded])  # a list: DVC makes no columns of it in its tables of metrics


if __name__ == "__main__":
    run_main(main)
