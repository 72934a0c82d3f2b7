"""Train stage: train a network on the annotated images.

Reads   data/images/, data/annotations/
Writes  models/model_weights.pth, metrics/train.json, metrics/epochs.csv, metrics/environment.json
Keeps   checkpoints until it has written the weights; a killed training resumes from them to the same bytes

The weights are those of the epoch with the best validation accuracy, or of the last epoch without validation images.
"""

from contextlib import nullcontext

from classifier.compute.device import environment, keep_freed_memory, select_device, set_threads
from classifier.compute.distributed import Group, process_group
from classifier.data.dataset import load_splits
from classifier.data.loader import batches_of, training_batches
from classifier.data.lockfile import locked_md5s, verified
from classifier.networks import Mirrored
from classifier.pipeline import paths
from classifier.pipeline.annotations import class_names
from classifier.pipeline.outputs import write_json
from classifier.pipeline.params import Params, load_params
from classifier.progress import say
from classifier.tracking.tracker import SilentTracker, Tracker
from classifier.training.checkpoint import NoCheckpoints, checkpoints, resume, stage_fingerprint
from classifier.training.inference import advice, test_loop
from classifier.training.initial_state import initial_state
from classifier.training.loop import TrainStep, epoch_summary
from classifier.training.optimization import build_loss


def main() -> None:
    params = load_params()
    with process_group() as group:
        train(params, group)


def train(params: Params, group: Group) -> None:
    md5s = locked_md5s(paths.LOCK)
    data = (paths.IMAGES, paths.ANNOTATIONS)
    tracker = Tracker(params.experiment, md5s, paths.PARAMS, data, paths.WEIGHTS) if group.is_first else SilentTracker()
    device = select_device(params.device)
    set_threads(params.threads)
    keep_freed_memory()
    recorded = environment(device)
    # Before images are decoded: the code may be edited meanwhile
    fingerprint = (
        stage_fingerprint(paths.PIPELINE, "train", md5s, params.model_dump(), recorded) if group.is_first else {}
    )

    images, annotations = (verified(path, md5s) for path in data)
    names = class_names(annotations)
    train_set, val_set, test_set = load_splits(
        ["train", "val", "test"], annotations, images, len(names), params.image_sides
    )
    train_batches = training_batches(train_set, names, params, device, group)
    # Without validation images no epoch is selected, and the figures are of test images, as in the tutorial
    selects = len(val_set) > 0
    val_batches = batches_of(val_set if selects else test_set, params, device, group)
    class_weights = train_set.class_weights(names).float().to(device) if params.balance == "loss" else None
    loss_fn = build_loss(params.label_smoothing, class_weights)
    state = initial_state(params, train_batches, len(names))
    evaluated = Mirrored(state.network) if params.test_flip else state.network

    step = TrainStep(state, train_batches, loss_fn, params.accumulate_steps, params.precision)

    every = params.checkpoint_steps * params.accumulate_steps
    with (
        checkpoints(fingerprint) if group.is_first else nullcontext(NoCheckpoints()) as saved,
        tracker.training(recorded, saved.name, saved.started),
    ):
        if state.pretrained:
            tracker.tag({"sha256.weights": state.pretrained})
        with resume(state, group, saved, every=every, last=len(train_batches)) as save_if_due:
            while state.epoch < params.epochs:
                for batch in step.rest_of_epoch():
                    if step(*batch):  # has updated the weights
                        save_if_due()
                val_loss, val_accuracy = test_loop(val_batches, evaluated, params.precision)
                figures = {"train_loss": step.mean_loss(), "val_loss": val_loss, "val_accuracy": val_accuracy}
                speed = train_batches.image_count / state.seconds
                say(epoch_summary(state.epoch + 1, figures, speed))
                state.end_epoch(figures, keep=not selects or state.is_best(val_accuracy))
                tracker.log_metrics(figures | {"images_per_second": speed}, step=state.epoch)
        if told := advice(state.kept["val_accuracy"], val_batches.dataset.labels):
            say(told)
        if group.is_first:
            state.write_results(paths.WEIGHTS, paths.EPOCHS, paths.TRAIN_METRICS)
            write_json(paths.ENVIRONMENT, [recorded])  # in a list, which DVC does not show as metrics
