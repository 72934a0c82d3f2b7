"""Train stage: annotated images in, network weights out.

Reads   data/images.zip, data/annotations/
Writes  models/model_weights.pth, metrics/train.json, metrics/epochs.csv, metrics/environment.json
Keeps   with validation images, the weights of the epoch with the best validation accuracy; else the last ones
"""

from functools import partial
from pathlib import Path
from time import perf_counter

import pandas as pd
import torch
from torch import nn
from tqdm import tqdm

from classifier import tracking
from classifier.dataset import Batches, CustomImageDataset, class_names
from classifier.device import environment, refuse_several_processes, seed_everything, select_device, set_threads
from classifier.errors import run
from classifier.files import ANNOTATIONS, ENVIRONMENT, EPOCHS, IMAGES, TRAIN_METRICS, WEIGHTS, atomic, write_json
from classifier.networks import build_network
from classifier.params import load_params
from classifier.training import build_optimizer, build_scheduler, describe, freeze, load_weights, test_loop, train_loop
from classifier.transforms import one_hot


def main() -> None:
    params = load_params()
    refuse_several_processes()
    device = select_device(params.device)
    set_threads(params.threads)

    # Without validation images there is nothing to choose by, and the figures by epoch are the tutorial's: on test.
    names = class_names(ANNOTATIONS)
    encode = partial(one_hot, classes=len(names)) if params.target_transform == "one_hot" else None
    train_set = CustomImageDataset(ANNOTATIONS / "train.csv", IMAGES, target_transform=encode)
    val_set = CustomImageDataset(ANNOTATIONS / "val.csv", IMAGES)
    selects = len(val_set) > 0
    if not selects:
        val_set = CustomImageDataset(ANNOTATIONS / "test.csv", IMAGES)
    batches = partial(Batches, batch_size=params.batch_size, device=device, memory_limit_gib=params.memory_limit_gib, workers=params.workers)
    train_batches = batches(train_set, seed=params.seed, shuffle=params.shuffle, augmentations=params.augment)
    val_batches = batches(val_set)

    seed_everything(params.seed)  # just before the weights are drawn, as in the tutorial
    network = build_network(params.network, train_set.image_shape(), len(names)).to(device)
    if params.weights:
        load_weights(network, Path(params.weights), device)
    trainable = freeze(network, params.freeze)
    print(describe(network))
    optimizer = build_optimizer(params.optimizer, trainable, params.lr, params.momentum, params.weight_decay)
    updates = params.epochs * -(-len(train_batches) // params.accumulate_steps)
    scheduler = build_scheduler(params.schedule, optimizer, updates)
    loss_fn = nn.CrossEntropyLoss(label_smoothing=params.label_smoothing)

    history: list[dict[str, float]] = []
    kept: dict[str, float] = {}
    recorded = environment(device)
    with tracking.training_run(params, recorded):
        for epoch in range(params.epochs):
            started = perf_counter()
            with tqdm(total=len(train_set), desc=f"epoch {epoch + 1}", unit="image", disable=None) as progress:
                train_loss = train_loop(
                    train_batches, network, loss_fn, optimizer, scheduler, epoch=epoch,
                    accumulate_steps=params.accumulate_steps, precision=params.precision, report=partial(_show, progress),
                )
            images_per_second = len(train_set) / (perf_counter() - started)
            val_loss, val_accuracy = test_loop(val_batches, network, val_set.labels, params.precision)
            row = {"epoch": epoch + 1, "train_loss": train_loss, "val_loss": val_loss, "val_accuracy": val_accuracy}
            print(
                f"Epoch {epoch + 1}: Accuracy: {100 * val_accuracy:.1f}%, Avg loss: {val_loss:.6f}, "
                f"train loss: {train_loss:.6f}, {images_per_second:,.0f} images/s", flush=True
            )
            tracking.log_metrics(row | {"images_per_second": images_per_second}, step=epoch + 1)
            history.append(row)
            if not selects or not kept or val_accuracy > kept["val_accuracy"]:
                kept = row
                weights = {name: tensor.detach().cpu().clone() for name, tensor in network.state_dict().items()}

        with atomic(WEIGHTS) as path, path.open("wb") as file:
            torch.save(weights, file)
        write_json(TRAIN_METRICS, kept)
        write_json(ENVIRONMENT, [recorded])  # in a list, so that DVC does not list it among the metrics
        with atomic(EPOCHS) as path:
            pd.DataFrame(history).to_csv(path, index=False, lineterminator="\n")


def _show(progress: "tqdm[None]", seen: int, loss: float) -> None:
    progress.set_postfix(loss=f"{loss:.4f}", refresh=False)
    progress.update(seen - progress.n)


if __name__ == "__main__":
    run(main)
