"""The tutorial's recipe on the real Fashion-MNIST gives the tutorial's figures."""

import json
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch
from imports import ROOT
from project import Project
from torch import nn
from train_loop import train_loop

from classifier.compute.device import choose_kernels, seed_everything, set_threads
from classifier.data.dataset import CustomImageDataset
from classifier.data.loader import Batches
from classifier.networks import build_network
from classifier.training.optimization import build_optimizer, build_scheduler
from classifier.training.state import TrainState

GOLDEN = json.loads((ROOT / "tests/golden/tutorial_seed42.json").read_text())


@pytest.fixture(scope="module")
def annotated(fashion_mnist_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Project:
    """A project with the real data, all of its training images in train.csv."""
    project = Project.create(tmp_path_factory.mktemp("golden") / "project")
    project.set_params(shuffle="false", val_size="0")
    for stage in ("download", "annotate"):
        project.run(sys.executable, "-m", "stages", stage, FASHION_MNIST_DIR=str(fashion_mnist_dir))
    return project


def test_the_first_epoch_prints_the_tutorials_ten_losses(annotated: Project) -> None:
    data = annotated.root / "data"
    set_threads(1)  # other tests run beside this one
    choose_kernels(deterministic=True, precision="float32")
    seed_everything(42)
    network = build_network("mlp", (1, 28, 28), 10)
    optimizer = build_optimizer("sgd", list(network.parameters()), 1e-3, 0.0, 0.0)
    batches = Batches(
        CustomImageDataset(data / "annotations/train.csv", data / "images"),
        64,
        torch.device("cpu"),
        memory_limit_gib=8,
        workers=0,
    )
    state = TrainState(network, optimizer, build_scheduler("constant", optimizer, len(batches)))
    losses: dict[int, float] = {}
    train_loop(
        batches,
        state,
        nn.CrossEntropyLoss(),
        accumulate_steps=1,
        precision="float32",
        after_update=lambda: losses.update({64 * state.batch: state.last_loss}),
    )
    golden = dict(GOLDEN["first_epoch_losses"])
    assert len(golden) == 10
    assert [losses[seen] for seen in golden] == pytest.approx(list(golden.values()), abs=1e-5)


@pytest.mark.nightly
def test_the_tutorials_recipe_as_an_experiment_gives_the_published_result(
    fashion_mnist_dir: Path, tmp_path: Path
) -> None:
    project = Project.create(tmp_path / "project")
    project.commit()
    settings = ["-S", "seed=42", "-S", "shuffle=false", "-S", "val_size=0"]
    settings += ["-S", "threads=1", "evaluate"]  # other tests run beside this one
    project.dvc("exp", "run", *settings, FASHION_MNIST_DIR=str(fashion_mnist_dir))

    test = json.loads((project.root / "metrics/test.json").read_text())
    published = GOLDEN["published"]
    assert test["accuracy"] == pytest.approx(published["test_accuracy"]["10"], abs=1e-3)
    assert test["loss"] == pytest.approx(published["test_loss"]["10"], abs=1e-4)

    # Without validation images the figures of each epoch are those on test.
    epochs = pd.read_csv(project.root / "metrics/epochs.csv")
    assert epochs.val_loss.tolist() == pytest.approx(GOLDEN["epochs"]["test_loss"], abs=1e-4)
    assert epochs.val_accuracy.tolist() == pytest.approx(GOLDEN["epochs"]["test_accuracy"], abs=1e-3)
    assert json.loads((project.root / "metrics/train.json").read_text())["epoch"] == 10
