"""Train stage: annotated images in, network weights out.

Reads   data/images.zip, data/annotations/
Writes  models/model_weights.pth, metrics/train.json, metrics/epochs.csv, metrics/environment.json
Keeps   with validation images, the weights of the epoch with the best validation accuracy; else the last ones;
        and until it has written them, checkpoints from which a killed training goes on to the same bytes
"""

from contextlib import ExitStack

from classifier.compute.device import environment, keep_freed_memory, select_device, set_threads
from classifier.compute.distributed import Group, process_group
from classifier.data.dataset import load_splits
from classifier.data.loader import batches_of, training_batches
from classifier.data.lockfile import verified
from classifier.pipeline import paths
from classifier.pipeline.annotations import class_names, write_csv
from classifier.pipeline.errors import run_main
from classifier.pipeline.outputs import atomic, write_json
from classifier.pipeline.params import Params, load_params
from classifier.tracking.tracker import Tracker
from classifier.training.checkpoint import checkpoints, resume, stage_fingerprint
from classifier.training.inference import save_weights
from classifier.training.initial_state import initial_state
from classifier.training.loop import TrainState, train_epochs
from classifier.training.optimization import build_loss


def main() -> None:
    params = load_params()
    with process_group() as group:
        train(params, group)


def train(params: Params, group: Group) -> None:
    tracker = Tracker() if group.is_first else None
    device = select_device(params.device)
    set_threads(params.threads)
    keep_freed_memory()
    recorded = environment(device)
    # Before images are decoded: meanwhile, code may be edited
    fingerprint = stage_fingerprint("train", params.model_dump(), recorded) if group.is_first else None

    names = class_names(verified(paths.ANNOTATIONS))
    train_set, val_set, test_set = load_splits(["train", "val", "test"], len(names))
    train_batches = training_batches(train_set, names, params, device, group)
    # Without validation images there is nothing to select weights by; an epoch's figures are the tutorial's: on test
    selects = len(val_set) > 0
    val_batches = batches_of(val_set if selects else test_set, params, device, group)
    class_weights = train_set.class_weights(names).float().to(device) if params.balance == "loss" else None
    loss_fn = build_loss(params.label_smoothing, class_weights)
    state = initial_state(params, train_batches, len(names))

    with ExitStack() as stack:
        saved = stack.enter_context(checkpoints(fingerprint)) if fingerprint else None
        if tracker and saved:
            stack.enter_context(tracker.training(params, recorded, saved.name, saved.started))
            if state.pretrained:
                tracker.tag({"sha256.weights": state.pretrained})
        every = params.checkpoint_steps * params.accumulate_steps
        with resume(state, group, saved, every=every, last=len(train_batches)) as after_update:
            for figures in train_epochs(
                train_batches, val_batches, state, loss_fn, params, keep_best=selects, after_update=after_update
            ):
                if tracker:
                    tracker.log_metrics(figures, step=state.epoch)
        if group.is_first:
            write(state, recorded)


def write(state: TrainState, recorded: dict[str, str | int]) -> None:
    """Write the outputs: the weights that were kept, the figures of each epoch, and where they were computed."""
    save_weights(state.weights, paths.WEIGHTS)
    with atomic(paths.EPOCHS) as path:
        write_csv(path, {key: [figures[key] for figures in state.history] for key in state.history[0]})
    write_json(paths.TRAIN_METRICS, state.kept)
    write_json(paths.ENVIRONMENT, [recorded])  # a list: DVC makes no columns of it in its tables of metrics


if __name__ == "__main__":
    run_main(main)
