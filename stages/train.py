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
from torch import Tensor, nn

from classifier import files, tracking
from classifier.dataset import Batches, CustomImageDataset, class_names
from classifier.device import environment, refuse_several_processes, seed_everything, select_device, set_threads
from classifier.errors import run_main
from classifier.networks import build_network
from classifier.params import Params, load_params
from classifier.training import build_optimizer, build_scheduler, describe, freeze, load_weights, test_loop, train_loop
from classifier.transforms import one_hot


def main() -> None:
    params = load_params()
    refuse_several_processes()
    device = select_device(params.device)
    set_threads(params.threads)

    names = class_names(files.ANNOTATIONS)
    train_batches, val_batches, selects = load_batches(params, device, classes=len(names))

    seed_everything(params.seed)  # just before the weights are drawn, as in the tutorial
    network = build_network(params.network, train_batches.dataset.image_shape(), len(names)).to(device)
    if params.weights:
        load_weights(network, Path(params.weights), device)
    trainable = freeze(network, params.freeze)
    print(describe(network), flush=True)
    optimizer = build_optimizer(params.optimizer, trainable, params.lr, params.momentum, params.weight_decay)
    updates = params.epochs * -(-len(train_batches) // params.accumulate_steps)
    scheduler = build_scheduler(params.schedule, optimizer, updates)
    loss_fn = nn.CrossEntropyLoss(label_smoothing=params.label_smoothing)

    history: list[dict[str, float]] = []
    kept: dict[str, float] = {}
    weights: dict[str, Tensor] = {}
    recorded = environment(device)
    with tracking.training_run(params, recorded):
        for epoch in range(params.epochs):
            started = perf_counter()
            train_loss = train_loop(
                train_batches,
                network,
                loss_fn,
                optimizer,
                scheduler,
                epoch=epoch,
                accumulate_steps=params.accumulate_steps,
                precision=params.precision,
            )
            images_per_second = train_batches.image_count / (perf_counter() - started)
            val_loss, val_accuracy = test_loop(val_batches, network, params.precision)
            print(
                f"Epoch {epoch + 1}: Accuracy: {val_accuracy:.1%}, Avg loss: {val_loss:.6f}, "
                f"train loss: {train_loss:.6f}, {images_per_second:,.0f} images/s",
                flush=True,
            )
            figures = {"train_loss": train_loss, "val_loss": val_loss, "val_accuracy": val_accuracy}
            history.append({"epoch": epoch + 1} | figures)
            tracking.log_metrics(figures | {"images_per_second": images_per_second}, step=epoch + 1)
            if not selects or not kept or val_accuracy > kept["val_accuracy"]:
                kept = history[-1]
                weights = {name: tensor.cpu().clone() for name, tensor in network.state_dict().items()}

        with files.atomic(files.WEIGHTS) as path, path.open("wb") as file:
            torch.save(weights, file)
        with files.atomic(files.EPOCHS) as path:
            pd.DataFrame(history).to_csv(path, index=False, lineterminator="\n")
        files.write_json(files.TRAIN_METRICS, kept)
        files.write_json(files.ENVIRONMENT, [recorded])  # a list: DVC makes no columns of it in its tables of metrics


def load_batches(params: Params, device: torch.device, classes: int) -> tuple[Batches, Batches, bool]:
    """Batches for training, batches for the figures of each epoch, and whether these select the weights to keep.

    Without validation images there is nothing to select by, and the figures are the tutorial's: on test.
    """
    encode = partial(one_hot, classes=classes) if params.target_transform == "one_hot" else None
    train_set = CustomImageDataset(files.ANNOTATIONS / "train.csv", files.IMAGES, target_transform=encode)
    val_set = CustomImageDataset(files.ANNOTATIONS / "val.csv", files.IMAGES)
    selects = len(val_set) > 0
    if not selects:
        val_set = CustomImageDataset(files.ANNOTATIONS / "test.csv", files.IMAGES)
    batches = partial(
        Batches,
        batch_size=params.batch_size,
        device=device,
        memory_limit_gib=params.memory_limit_gib,
        workers=params.workers,
    )
    train_batches = batches(train_set, seed=params.seed, shuffle=params.shuffle, augmentations=params.augment)
    return train_batches, batches(val_set), selects


if __name__ == "__main__":
    run_main(main)
