"""Checkpoints: a training interrupted anywhere resumes to the same bytes, and only from its own checkpoints."""

import hashlib
import io
import json
import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hostile import RunsCodeWhenUnpickled
from imports import ROOT
from limits import no_file_above
from project import python
from small_images import CLASSES, make_images
from torch import Tensor, nn
from train_loop import train_loop

from classifier.compute.device import choose_kernels, seed_everything
from classifier.data.dataset import CustomImageDataset
from classifier.data.loader import Batches
from classifier.training import checkpoint
from classifier.training.checkpoint import Checkpoints, checkpoints, stage_fingerprint
from classifier.training.inference import test_loop
from classifier.training.optimization import build_optimizer, build_scheduler
from classifier.training.state import TrainState

pytestmark = pytest.mark.usefixtures("one_thread")

MAKINGS = {"lr": 0.1, "data/images": "an md5"}
EPOCHS, BATCHES, ACCUMULATE = 2, 5, 2


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of all checkpoints, empty."""
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    monkeypatch.setattr(checkpoint, "PATIENCE_SECONDS", 0.3)
    return tmp_path / ".checkpoints"


class Stopped(BaseException):
    """Raised in place of a signal or a kill."""


def give_up(**fingerprint: Any) -> Path:
    """Abandon a training with this fingerprint after its first checkpoint; return its folder."""
    with suppress(Stopped), checkpoints(fingerprint) as saved:
        saved.save(0, 1, {"batch": 1})
        raise Stopped
    return saved.folder


# The same bytes


@pytest.fixture(scope="module")
def batches(tmp_path_factory: pytest.TempPathFactory) -> Batches:
    csv, images = make_images(tmp_path_factory.mktemp("images"), count=37, size=8)  # the last batch is of five
    dataset = CustomImageDataset(csv, images, classes=CLASSES)
    return Batches(
        dataset, 8, torch.device("cpu"), seed=3, shuffle=True, weights=(1.0 + dataset.labels).double(),
        augmentations=["crop", "flip", "erase", "color", "mixup", "cutmix"], memory_limit_gib=1, workers=0,
    )  # fmt: skip


Result = tuple[bytes, str]  # the file of the kept weights, and the metrics of all epochs as JSON


class Training:
    """A training like the stage's, of a network with every kind of state."""

    def __init__(self, batches: Batches, optimizer: str, stop_before: int | None = None) -> None:
        self.batches = batches
        choose_kernels(deterministic=True, precision="float32")
        seed_everything(7)
        network = nn.Sequential(
            nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.5), nn.Flatten(), nn.Linear(144, CLASSES)
        )
        chosen = build_optimizer(optimizer, list(network.parameters()), 0.02, 0.9, 1e-3)
        updates = EPOCHS * -(-BATCHES // ACCUMULATE)
        self.state = TrainState(network, chosen, build_scheduler("onecycle", chosen, updates))
        self.stop_before, self.seen = stop_before, 0
        network.register_forward_pre_hook(self.stop)

    def stop(self, network: nn.Module, _: Any) -> None:
        if network.training and self.seen == self.stop_before:
            raise Stopped
        self.seen += network.training

    def run(self) -> Result:
        """Train to the end."""
        state = self.state
        with checkpoints(MAKINGS) as saved:
            if content := saved.load():
                state.load_state_dict(content)
            while state.epoch < EPOCHS:
                loss = train_loop(
                    self.batches, state, nn.CrossEntropyLoss(), accumulate_steps=ACCUMULATE, precision="float32",
                    after_update=lambda: saved.save(state.epoch, state.batch, state.state_dict()),
                )  # fmt: skip
                val_loss, _ = test_loop(self.batches, state.network, "float32")
                state.end_epoch({"train_loss": loss, "val_loss": val_loss}, keep=True)
        buffer = io.BytesIO()
        torch.save(state.weights, buffer)
        return buffer.getvalue(), json.dumps([state.history, state.kept])


@pytest.fixture(scope="module", params=["adam", "sgd"])
def uninterrupted(request: pytest.FixtureRequest, batches: Batches, tmp_path_factory: Any) -> tuple[str, Result]:
    """The name of an optimiser and the result of an uninterrupted training."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DVC_ROOT", str(tmp_path_factory.mktemp("uninterrupted")))
        return request.param, Training(batches, request.param).run()


@pytest.mark.parametrize("batch", range(EPOCHS * BATCHES))
def test_a_training_stopped_before_any_batch_goes_on_to_the_same_bytes(
    batches: Batches, uninterrupted: tuple[str, Result], batch: int, home: Path
) -> None:
    optimizer, expected = uninterrupted
    with pytest.raises(Stopped):
        Training(batches, optimizer, stop_before=batch).run()
    random.seed(batch)
    resumed = Training(batches, optimizer)
    assert resumed.run() == expected
    done = batch // BATCHES * BATCHES + batch % BATCHES // ACCUMULATE * ACCUMULATE  # batches up to the last update
    assert resumed.seen == EPOCHS * BATCHES - done
    assert not list(home.glob("*/"))


def test_a_training_stopped_twice_goes_on_to_the_same_bytes(
    batches: Batches, uninterrupted: tuple[str, Result]
) -> None:
    optimizer, expected = uninterrupted
    for stop in (4, 3):
        with pytest.raises(Stopped):
            Training(batches, optimizer, stop_before=stop).run()
    assert Training(batches, optimizer).run() == expected


def test_the_random_states_come_back(batches: Batches) -> None:
    def draw() -> tuple[float, float, float]:
        return random.random(), np.random.rand(), torch.rand(1).item()  # noqa: NPY002, S311

    state = Training(batches, "adam").state
    content = state.state_dict()
    with suppress(Stopped), checkpoints(MAKINGS) as saved:
        saved.save(0, 0, content)
        raise Stopped
    drawn = draw()
    assert draw() != drawn
    with checkpoints(MAKINGS) as saved:
        loaded = saved.load()
        assert loaded
        state.load_state_dict(loaded)
    assert draw() == drawn


# Damaged checkpoints


def test_the_last_two_checkpoints_are_kept() -> None:
    with checkpoints(MAKINGS) as saved:
        for epoch, batch in ((0, 9), (0, 10), (1, 2), (10, 1)):
            saved.save(epoch, batch, {"epoch": epoch})
        assert sorted(path.name for path in saved.folder.glob("*.pt")) == [
            "epoch-000001-batch-000000002.pt",
            "epoch-000010-batch-000000001.pt",
        ]
        assert saved.load() == {"epoch": 10}


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def flip_a_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def plant_code(path: Path) -> None:
    buffer = io.BytesIO()
    torch.save(RunsCodeWhenUnpickled(path.with_name("ran")), buffer)
    path.write_bytes(hashlib.sha256(buffer.getvalue()).digest() + buffer.getvalue())


@pytest.mark.parametrize("damage", [truncate, empty, flip_a_byte, plant_code])
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(
    damage: Callable[[Path], None], capsys: pytest.CaptureFixture[str]
) -> None:
    with checkpoints(MAKINGS) as saved:
        saved.save(0, 1, {"batch": 1})
        saved.save(0, 2, {"batch": 2})
        last = saved.folder / "epoch-000000-batch-000000002.pt"
        damage(last)
        assert saved.load() == {"batch": 1}
        assert capsys.readouterr().err == f"{last}: damaged checkpoint, removed; the one before it is used, if any\n"
        assert not (saved.folder / "ran").exists()


def test_with_all_checkpoints_damaged_training_starts_anew(capsys: pytest.CaptureFixture[str]) -> None:
    with checkpoints(MAKINGS) as saved:
        for batch in (1, 2):
            saved.save(0, batch, {"batch": batch})
        for path in saved.folder.glob("*.pt"):
            truncate(path)
        assert saved.load() is None
        assert capsys.readouterr().err.count("damaged") == 2
        saved.save(0, 1, {"batch": 1})
        assert saved.load() == {"batch": 1}


@pytest.mark.parametrize("content", ["", "{", "[]", '{"name": "a"}'])
def test_a_training_whose_record_is_damaged_says_so_and_goes_on(
    content: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """The name of the folder is the hash of the fingerprint."""
    record = give_up(lr=0.1) / "training.json"
    record.write_text(content)
    with checkpoints({"lr": 0.1}) as saved:
        assert saved.load() == {"batch": 1}
        assert saved.fingerprint == {"lr": 0.1}
    damaged = f"{record}: damaged, written again; the training continues in a new MLflow run\n"
    assert capsys.readouterr().err == damaged


def test_a_checkpoint_for_which_there_is_no_room_leaves_the_ones_before() -> None:
    with checkpoints(MAKINGS) as saved:
        saved.save(0, 1, {"batch": 1})
        saved.save(0, 2, {"batch": 2})
        with no_file_above(5000), pytest.raises(OSError, match="File too large"):
            saved.save(0, 3, {"weights": torch.zeros(10_000)})
        assert saved.load() == {"batch": 2}
        assert sorted(path.name for path in saved.folder.iterdir()) == [
            "epoch-000000-batch-000000001.pt",
            "epoch-000000-batch-000000002.pt",
            "training.json",
        ]


# Which checkpoint a training resumes from


@pytest.fixture
def pipeline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Create a pipeline of one stage and its files; return the values of its parameters."""
    monkeypatch.chdir(tmp_path)
    Path("dvc.yaml").write_text(
        "stages:\n  train:\n    deps: [train.py, '${network}.py', data]\n    params: [lr, network, weights]\n"
    )
    for name in ("train.py", "mlp.py", "cnn.py", "start.pth"):
        Path(name).write_text(name)
    Path("data").mkdir()
    Path("data/train.csv").write_text("file,label\n")
    return {"lr": 0.1, "network": "mlp", "weights": "start.pth", "workers": 2}


def fingerprint(values: dict[str, Any], environment: dict[str, str]) -> dict[str, Any]:
    return stage_fingerprint(Path("dvc.yaml"), "train", {}, values, environment)


def test_the_fingerprint_is_deps_parameters_weights_and_environment(pipeline: dict[str, Any]) -> None:
    found = fingerprint(pipeline, {"torch": "2"})
    assert list(found) == ["train.py", "mlp.py", "data", "start.pth", "lr", "network", "weights", "torch"]
    assert found == fingerprint(pipeline | {"workers": 0}, {"torch": "2"})
    too_long = "https://" + 300 * "x"  # for a file name; reading the weights reports it
    assert fingerprint(pipeline | {"weights": too_long}, {})["weights"] == too_long


@pytest.mark.parametrize(
    "change",
    [
        lambda values: values.update(lr=0.2),
        lambda values: values.update(network="cnn"),
        lambda values: Path("train.py").write_text("other code"),
        lambda values: Path("mlp.py").write_text("other code"),
        lambda values: Path("data/train.csv").write_text("file,label\n0.png,1\n"),
        lambda values: Path("data/train.csv").rename("data/val.csv"),
        lambda values: Path("start.pth").write_text("other weights"),
    ],
    ids=["parameter", "network", "code", "network's code", "data", "file names", "weights"],
)
def test_a_training_with_another_fingerprint_has_its_own_checkpoints(
    pipeline: dict[str, Any], change: Callable[[dict[str, Any]], None]
) -> None:
    give_up(**fingerprint(pipeline, {}))
    change(pipeline)
    with checkpoints(fingerprint(pipeline, {})) as saved:
        assert saved.load() is None


def test_a_training_in_another_environment_has_its_own_checkpoints(pipeline: dict[str, Any]) -> None:
    give_up(**fingerprint(pipeline, {"torch": "2"}))
    with checkpoints(fingerprint(pipeline, {"torch": "3"})) as saved:
        assert saved.load() is None


def test_a_training_that_goes_on_keeps_its_name_and_start() -> None:
    with pytest.raises(Stopped), checkpoints(MAKINGS) as first:
        raise Stopped
    with checkpoints(MAKINGS) as second:
        assert (second.name, second.started) == (first.name, first.started)
    assert 0 <= time.time() - first.started < 60
    with checkpoints(MAKINGS) as third:
        assert third.name != first.name


def test_the_order_of_the_fingerprint_makes_no_other_training() -> None:
    give_up(lr=0.1, epochs=3)
    with checkpoints({"epochs": 3, "lr": 0.1}) as saved:
        assert saved.load() == {"batch": 1}


def test_what_sets_a_given_up_training_apart_is_told() -> None:
    give_up(lr=0.1, epochs=3, cnn="an md5")
    with checkpoints({"lr": 0.2, "epochs": 3, "mlp": "another md5"}) as saved:
        assert saved.difference_from_abandoned() == (
            "lr was 0.1 and is 0.2, cnn was an md5 and is None, mlp was None and is another md5"
        )


def test_of_several_given_up_trainings_the_last_is_told() -> None:
    for age, lr in ((100, 0.2), (200, 0.1)):
        folder = give_up(lr=lr)
        os.utime(folder, (0, folder.stat().st_mtime - age))
    with checkpoints({"lr": 0.3}) as saved:
        assert saved.difference_from_abandoned() == "lr was 0.2 and is 0.3"


def test_a_training_under_way_is_not_told_as_given_up() -> None:
    with checkpoints({"lr": 0.1}), checkpoints({"lr": 0.2}) as saved:
        assert saved.difference_from_abandoned() is None


def test_a_given_up_training_with_a_damaged_record_is_not_told() -> None:
    (give_up(lr=0.1) / "training.json").write_text("{")
    with checkpoints({"lr": 0.2}) as saved:
        assert saved.difference_from_abandoned() is None


# Cleaning up and locking


def test_a_training_that_succeeds_leaves_nothing(home: Path) -> None:
    with checkpoints(MAKINGS) as saved:
        saved.save(0, 1, {})
    assert [path.name for path in home.iterdir() if path.name != ".lock"] == []


def remove(path: Path) -> None:
    shutil.rmtree(path)


def replace_by_a_file(path: Path) -> None:
    shutil.rmtree(path)
    path.write_text("")


@pytest.mark.parametrize("take_away", [remove, replace_by_a_file])
@pytest.mark.parametrize("of_all_trainings", [True, False])
def test_a_training_whose_checkpoints_are_taken_away_goes_on(
    home: Path, take_away: Callable[[Path], None], of_all_trainings: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    with checkpoints(MAKINGS) as saved:
        saved.save(0, 1, {"batch": 1})
        take_away(home if of_all_trainings else saved.folder)
    assert not saved.folder.exists() or take_away is replace_by_a_file

    home.unlink() if home.is_file() else shutil.rmtree(home)
    with suppress(Stopped), checkpoints(MAKINGS) as saved:
        take_away(home if of_all_trainings else saved.folder)
        saved.save(0, 2, {"batch": 2})
        saved.save(0, 3, {"batch": 3})
        raise Stopped
    if take_away is remove:  # the checkpoints saved after that are used, in the same run
        name = saved.name
        with checkpoints(MAKINGS) as saved:
            assert saved.load() == {"batch": 3}
            assert saved.name == name
    else:
        warning = "not written, so a killed training cannot resume from here"
        assert capsys.readouterr().err.count(warning) == 1


def test_the_oldest_given_up_trainings_go_but_none_under_way(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def made(number: int, folder: Path) -> Path:
        os.utime(folder, (number, number))
        return folder

    with checkpoints({"seed": 0}) as oldest:
        made(0, oldest.folder)
        folders = [made(number, give_up(seed=number)) for number in range(1, checkpoint.KEPT_TRAININGS)]
        assert set(home.glob("*/")) == {oldest.folder, *folders}
        newest = [give_up(seed=100), give_up(seed=101)]
        assert set(home.glob("*/")) == {oldest.folder, *folders[1:], *newest}
        assert capsys.readouterr().out == f"Removed the checkpoints of an abandoned training: {folders[0]}\n"


def test_a_process_with_the_same_fingerprint_waits_and_gets_its_own_set_and_a_killed_ones_lock_is_free(
    capsys: pytest.CaptureFixture[str],
) -> None:
    holder = (
        "import time; from classifier.training.checkpoint import checkpoints\n"
        "with checkpoints({'lr': 0.1}) as saved:\n"
        "    saved.save(0, 5, {'batch': 5}); print(saved.name, flush=True); time.sleep(60)"
    )
    with subprocess.Popen([python(), "-c", holder], cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        name = process.stdout.readline().strip()
        with checkpoints({"lr": 0.1}) as second:
            assert second.name != name
            assert second.load() is None
        assert capsys.readouterr().out.startswith("Another process runs the same training")
        process.send_signal(signal.SIGKILL)
    with checkpoints({"lr": 0.1}) as third:
        assert third.name == name
        assert third.load() == {"batch": 5}


def test_tensors_of_a_checkpoint_come_back_bit_for_bit() -> None:
    tensor = torch.tensor([0.1, float("nan"), -0.0, 1e-45])
    with checkpoints(MAKINGS) as saved:
        saved.save(0, 1, {"tensor": tensor})
        loaded = Checkpoints(saved.folder).load()
        assert loaded
        assert bits(loaded["tensor"]) == bits(tensor)


def bits(tensor: Tensor) -> bytes:
    return tensor.numpy().tobytes()
