"""The picture of what the network sees: that it shows the batches of the train stage, and its titles."""

import shutil
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from project import Project, small_project

from classifier.cli.samples import draw_samples, first_images, first_originals, sample_batches, titles
from classifier.data.dataset import load_splits
from classifier.data.loader import training_batches
from classifier.pipeline.annotations import class_names
from classifier.pipeline.errors import PipelineError
from classifier.pipeline.params import load_params
from classifier.pipeline.paths import ANNOTATIONS, IMAGES

NAMES = ["cat", "dog", "eel"]


def test_titles_are_class_names_or_shares() -> None:
    assert titles(torch.tensor([2, 0]), NAMES) == ["eel", "cat"]
    shares = torch.tensor([[0.3, 0.0, 0.7], [0.0, 1.0, 0.0]])
    assert titles(shares, NAMES) == ["eel 70%\ncat 30%", "dog 100%"]


@pytest.fixture(scope="module")
def annotated(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """A project in which only download and annotate have run. Tests change params.yaml alone."""
    project = small_project(tmp_path_factory.mktemp("samples"), batch_size="32")
    for stage in ("download", "annotate"):
        project.run(sys.executable, "-m", "stages", stage)
    project.set_params(source="fashion_mnist")  # this process does not know the project's own
    return project


@pytest.mark.parametrize(
    "params",
    [
        {"augment": "[]", "balance": "none", "target_transform": ""},
        {"augment": "[]", "balance": "none", "shuffle": "false"},
        {"augment": "[crop, flip, erase, color]", "balance": "sampler"},
        {"augment": "[mixup, cutmix, crop]", "balance": "loss", "seed": "3", "batch_size": "3"},
        {"augment": "[mixup]", "target_transform": "one_hot", "batch_size": "500"},
    ],
    ids=lambda params: " ".join(params.values()),
)
def test_they_are_the_images_and_targets_of_the_train_stage(
    annotated: Project, params: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(annotated.root)
    defaults = {"seed": "42", "batch_size": "32", "shuffle": "true", "target_transform": ""}
    annotated.set_params(**(defaults | params))
    names = class_names(ANNOTATIONS)
    pixels, targets = first_images(sample_batches(load_params(), names), rows=4, columns=8)
    (train_set,) = load_splits(["train"], ANNOTATIONS, IMAGES, len(names), None)
    batches = list(training_batches(train_set, names, load_params(), torch.device("cpu")).epoch(0))
    assert torch.equal(pixels, torch.cat([images[:8] for images, _ in batches])[:32])
    expected = torch.cat([of_batch[:8] for _, of_batch in batches])[:32]
    assert torch.equal(targets, expected)


def test_originals_are_those_of_the_augmented_images(annotated: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(annotated.root)
    annotated.set_params(
        augment="[]", balance="sampler", shuffle="true", target_transform="", seed="5", batch_size="32"
    )  # fmt: skip
    for size in ("32", "3"):
        annotated.set_params(batch_size=size)
        batches = sample_batches(load_params(), class_names(ANNOTATIONS))
        pixels, _ = first_images(batches, rows=4, columns=8)
        assert torch.equal(pixels, first_originals(batches, rows=4, columns=8))


def test_a_class_without_images_is_named_before_the_training_starts(
    annotated: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(annotated.root)
    annotated.set_params(shuffle="true")
    names = [*class_names(ANNOTATIONS), "Umbrella"]
    (train_set,) = load_splits(["train"], ANNOTATIONS, IMAGES, len(names), None)
    for balance in ("sampler", "loss"):
        annotated.set_params(balance=balance)
        with pytest.raises(PipelineError, match=r"train\.csv: balance: no image of class Umbrella; add some, or set"):
            training_batches(train_set, names, load_params(), torch.device("cpu"))


def test_the_picture_is_of_known_size_and_the_same_bytes_again(
    annotated: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(annotated.root)
    annotated.set_params(augment="[crop, erase, cutmix]", balance="sampler", shuffle="true", target_transform="")
    for name in ("first.png", "second.png"):
        draw_samples(tmp_path / name)
    with Image.open(tmp_path / "first.png") as picture:
        assert picture.size == (1280, 8 * 194)
    assert (tmp_path / "first.png").read_bytes() == (tmp_path / "second.png").read_bytes()


@pytest.mark.slow
def test_the_command_needs_no_network_and_says_what_is_missing(annotated: Project, tmp_path: Path) -> None:
    project = annotated.copy(tmp_path / "project")
    project.set_params(augment="[flip, color, mixup]", balance="none", shuffle="true", target_transform="")
    command = (sys.executable, "-m", "classifier", "samples")
    assert project.run(*command).stdout == "Written: reports/samples.png\n"
    assert (project.root / "reports/samples.png").stat().st_size > 10_000
    assert not (project.root / "models").exists()
    shutil.rmtree(project.root / "data/images")
    failed = project.run(*command, check=False)
    assert failed.returncode == 1
    assert failed.stderr.startswith("data/images: missing; `dvc repro` makes it")
