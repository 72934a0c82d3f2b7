"""Several processes, as torchrun starts them, do what one does: real torchrun, gloo, DVC and MLflow."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import tracker
from dvc_queue import processes_in
from imports import ROOT
from project import TRAINED, Project, clean_environment, python, real_environment, small_project
from small_images import make_images
from tracker import free_port, send_the_rest, wait_for

from classifier.compute.distributed import Group

# Two epochs of the product's own loop; in float64, whose sums hardly depend on their order. With small batches the
# training of a network with batch normalisation is chaotic: in float32 a change of 1e-6 grows a thousandfold.
TRAIN = """\
import json, sys
from pathlib import Path
import torch
sys.path.append("tests")
from torch import nn
from classifier.data.loader import Batches
from classifier.data.dataset import CustomImageDataset
from classifier.compute.device import set_threads
from classifier.compute.distributed import process_group
from classifier.networks import build_network
from classifier.training.inference import predict_logits
from classifier.training.optimization import build_optimizer, build_scheduler
from classifier.training.state import TrainState
from train_loop import train_loop

class Float64(nn.Module):
    def __init__(self, network):
        super().__init__()
        self.network = network.double()
    def forward(self, pixels):
        return self.network(pixels.double())

folder, settings = Path(sys.argv[1]), json.loads(sys.argv[2])
set_threads(1)
with process_group() as group:
    device = torch.device("cpu")
    dataset = CustomImageDataset(folder / "images.csv", folder / "images", classes=4)
    batches = Batches(dataset, settings["batch_size"], device, seed=1, shuffle=True, augmentations=settings["augment"],
                      memory_limit_gib=settings["memory"], workers=1, group=group)
    torch.manual_seed(0)
    network = Float64(build_network(settings["network"], batches.image_shape, 4))
    optimizer = build_optimizer("sgd", list(network.parameters()), 0.05, 0.9, 0.0)
    state = TrainState(network, optimizer, build_scheduler("constant", optimizer, 100))
    state.wrapped = group.ddp_network(network)
    losses = []
    for _ in range(2):
        losses.append(train_loop(batches, state, nn.CrossEntropyLoss(), accumulate_steps=settings["accumulate"],
                                 precision=settings["precision"]))
        state.end_epoch({"loss": losses[-1]}, keep=True)
    logits = predict_logits(batches, network, "float32")
    print(json.dumps({"losses": losses, "rank": group.rank, "logits": logits.tolist(), "weights":
                      {name: tensor.tolist() for name, tensor in network.state_dict().items()}}))
"""
SETTINGS = {"network": "mlp", "batch_size": 8, "augment": [], "memory": 1, "accumulate": 1, "precision": "float32"}
STREAMED = 1e-9  # GiB


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """25 images of 12 x 12 pixels: the last batch of 8 has one."""
    folder = tmp_path_factory.mktemp("images")
    make_images(folder, 25, 12)
    return folder


def training(images: Path, settings: dict[str, Any]) -> list[str]:
    return [python(), "-c", TRAIN, str(images), json.dumps(SETTINGS | settings)]


def torchrun(*options: str) -> list[str]:
    return [python(), "-m", "torch.distributed.run", *options, "--no-python"]


def trained(images: Path, processes: int, **settings: Any) -> dict[str, Any]:
    launcher = torchrun(f"--nproc-per-node={processes}") if processes > 1 else []
    done = subprocess.run(
        [*launcher, *training(images, settings)],
        cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (line,) = done.stdout.splitlines()  # all but the first process are silent
    result: dict[str, Any] = json.loads(line)
    return result


def assert_same(together: dict[str, Any], alone: dict[str, Any]) -> None:
    assert together["rank"] == 0
    np.testing.assert_allclose(together["losses"], alone["losses"], rtol=1e-7)
    np.testing.assert_allclose(together["logits"], alone["logits"], rtol=0, atol=1e-5)
    for name, tensor in alone["weights"].items():
        np.testing.assert_allclose(together["weights"][name], tensor, rtol=0, atol=1e-7, err_msg=name)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("processes", "settings"),
    [
        (2, {}),
        (3, {"network": "cnn", "memory": STREAMED, "augment": ["crop", "flip", "erase"]}),
        (3, {"augment": ["color", "mixup"], "memory": STREAMED, "accumulate": 3}),
        pytest.param(3, {"accumulate": 4}, marks=pytest.mark.nightly),
        pytest.param(2, {"network": "cnn"}, marks=pytest.mark.nightly),
        pytest.param(2, {"augment": ["flip", "mixup", "cutmix"]}, marks=pytest.mark.nightly),
    ],
)
def test_losses_and_weights_are_those_of_one_process(images: Path, processes: int, settings: dict[str, Any]) -> None:
    assert_same(trained(images, processes, **settings), trained(images, 1, **settings))


@pytest.mark.slow
def test_two_machines_train_as_one(images: Path) -> None:
    """Each with a torchrun of its own, which meet at an address; here both are on this one."""
    settings = {"network": "cnn", "augment": ["flip", "cutmix"]}
    meeting = ["--nnodes=2", "--nproc-per-node=1", "--master-addr=127.0.0.1", f"--master-port={free_port()}"]
    agents = [
        subprocess.Popen(
            [*torchrun(*meeting, f"--node-rank={node}"), *training(images, settings)],
            cwd=ROOT, stdout=subprocess.PIPE, text=True,
        )
        for node in range(2)
    ]  # fmt: skip
    printed = [agent.communicate()[0] for agent in agents]
    assert [agent.returncode for agent in agents] == [0, 0]
    (line,) = "".join(printed).splitlines()
    assert_same(json.loads(line), trained(images, 1, **settings))


@pytest.mark.parametrize("size", [1, 2, 3, 8])
@pytest.mark.parametrize("count", [1, 2, 7, 64])
def test_the_parts_of_a_batch_are_all_of_it_in_order_and_as_even_as_can_be(count: int, size: int) -> None:
    parts = [Group(rank, size).part(count) for rank in range(size)]
    assert [place for part in parts for place in part] == list(range(count))
    lengths = [len(part) for part in parts]
    assert max(lengths) - min(lengths) <= 1
    assert Group(0, size).part(count, size - 1) == parts[-1]


# The stage, under DVC

EPOCHS, BATCHES = 6, 20
# Put behind the network. In the batch whose number is in $AT, the process whose number is in $RANK_AT kills itself,
# ends torchrun, or does what SLURM does when a job's time is up; not when torchrun has started it again.
ENDING = """

import os, signal, time
import psutil
build_network = build
def build(image_shape, classes):
    network = build_network(image_shape, classes)
    if os.environ.get("RANK") == os.environ.get("RANK_AT", "") and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        left = iter(range(int(os.environ["AT"]), -1, -1))
        ended = []
        def end(module, inputs):
            if ended:
                time.sleep(0.1)  # until the signal has come
            if module.training and next(left, -1) == 0:
                if os.environ["END"] == "itself":
                    os.kill(os.getpid(), signal.SIGKILL)
                tasks = [psutil.Process(os.getppid())]
                if os.environ["END"] == "job":
                    found = [(task, task.info["environ"] or {}) for task in psutil.process_iter(["environ"])]
                    tasks = [task for task, of in found
                             if of.get("SLURM_JOB_ID") == os.environ["SLURM_JOB_ID"] and "SLURM_NODEID" in of]
                for task in tasks:
                    task.terminate()
                ended.append(True)
        network.register_forward_pre_hook(end)
    return network
"""


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """A project that two processes have trained, all else done too."""
    project = small_project(
        tmp_path_factory.mktemp("distributed"),
        launcher="torchrun --nproc-per-node=2 --max-restarts=1", threads="auto", epochs=str(EPOCHS), batch_size="8",
        momentum="0.9", schedule="cosine", augment="[crop, flip]", checkpoint_steps="7", export_formats="[pth]",
    )  # fmt: skip
    with (project.root / "classifier/networks/mlp.py").open("a") as network:
        network.write(ENDING)
    project.commit()
    project.dvc("repro")
    return project


@pytest.fixture
def untrained(reference: Project, tmp_path: Path) -> Project:
    project = reference.copy(tmp_path / "project")
    project.forget_training()
    return project


def assert_saved_when_ended(printed: str) -> None:
    """A training goes on from a checkpoint behind that which it had saved by itself, after batch 7."""
    saved = re.search(r"Resuming epoch 3 after batch (\d+)", printed)
    assert saved is not None
    assert int(saved[1]) > 7


def assert_trained_as(project: Project, reference: Project) -> None:
    send_the_rest(project)
    for name in TRAINED:
        assert (project.root / name).read_bytes() == (reference.root / name).read_bytes(), name
    assert tracker.statuses(project.root / "mlflow.db") == ["FINISHED"]
    assert list(project.root.glob(".checkpoints/*/")) == []


@pytest.mark.slow
def test_two_processes_write_what_one_does_once(reference: Project, tmp_path: Path) -> None:
    alone = reference.copy(tmp_path / "project")
    alone.set_params(launcher="python")
    alone.dvc("repro")
    epochs, others = (pd.read_csv(project.root / "metrics/epochs.csv") for project in (reference, alone))
    # Sums differ in their last bits, which this training on few images multiplies with each epoch
    np.testing.assert_allclose(epochs[:1], others[:1], rtol=1e-3)
    assert len(others) == EPOCHS
    environment, other = (json.loads((project.root / "metrics/environment.json").read_text())[0]
                          for project in (reference, alone))  # fmt: skip
    assert environment == other | {"processes": 2}
    assert tracker.statuses(reference.root / "mlflow.db") == ["FINISHED"]


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_torchrun_starts_a_killed_process_again_and_training_goes_on_to_the_same_bytes(
    untrained: Project, reference: Project, rank: int
) -> None:
    done = untrained.dvc("repro", "train", RANK_AT=str(rank), AT=str(2 * BATCHES + 9), END="itself")
    assert "Resuming epoch 3 after batch 7\n" in done.stdout
    assert_trained_as(untrained, reference)


@pytest.mark.slow
def test_an_ended_torchrun_leaves_a_checkpoint_and_no_process(untrained: Project, reference: Project) -> None:
    # A copy's parent is not who started it
    untrained.env = real_environment(untrained.root.parent)
    done = untrained.dvc("repro", "train", check=False, RANK_AT="0", AT=str(2 * BATCHES + 9), END="torchrun")
    assert done.returncode != 0
    wait_for(lambda: processes_in(untrained.root) == [])
    assert_saved_when_ended(untrained.dvc("repro", "train").stdout)
    assert_trained_as(untrained, reference)


@pytest.mark.slow
def test_a_second_machine_joins_the_training_that_dvc_runs_on_the_first(
    untrained: Project, reference: Project, tmp_path: Path
) -> None:
    """As docs/processes.md says. Two copies of the project are the machines."""
    untrained.set_params(launcher="torchrun --nproc-per-node=1")
    second = untrained.copy(tmp_path / "second")
    before = second.outputs()
    meeting = {"PET_NNODES": "2", "PET_MASTER_ADDR": "127.0.0.1", "PET_MASTER_PORT": str(free_port())}
    with subprocess.Popen(
        [sys.executable, "-m", "stages", "train"], cwd=second.root,
        env=clean_environment(tmp_path, **meeting, PET_NODE_RANK="1"), stdout=subprocess.PIPE, text=True,
    ) as joining:  # fmt: skip
        untrained.dvc("repro", "train", check=True, **meeting, PET_NODE_RANK="0")
        printed, _ = joining.communicate()
    assert (joining.returncode, printed) == (0, "")
    assert second.outputs() == before
    epochs, others = (pd.read_csv(project.root / "metrics/epochs.csv") for project in (reference, untrained))
    np.testing.assert_allclose(epochs[:1], others[:1], rtol=1e-3)
    assert len(others) == EPOCHS
    send_the_rest(untrained)
    assert tracker.statuses(untrained.root / "mlflow.db") == ["FINISHED"]


# What SLURM has, for nodes that are processes here: srun runs its command once for each, and kills the others when one
# fails
SLURM = {
    "scontrol": "echo 127.0.0.1",
    "srun": """
shift
for node in $(seq "$SLURM_JOB_NUM_NODES"); do SLURM_NODEID=$((node - 1)) "$@" & tasks+=($!); done
for task in "${tasks[@]}"; do wait -n || { kill -KILL "${tasks[@]}"; exit 1; }; done
""",
}


@pytest.fixture
def job(untrained: Project, tmp_path: Path) -> Project:
    """An untrained project, as a job of two nodes finds it."""
    for name, script in SLURM.items():
        (tmp_path / "slurm").mkdir(exist_ok=True)
        (tmp_path / "slurm" / name).write_text(f"#!/usr/bin/env bash\nset -e\n{script}")
        (tmp_path / "slurm" / name).chmod(0o755)
    port = free_port()
    untrained.env = {
        "PATH": f"{tmp_path / 'slurm'}:{clean_environment(tmp_path)['PATH']}", "PET_MASTER_PORT": str(port),
        "SLURM_JOB_NODELIST": "node[1-2]", "SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_ID": str(port),
    }  # fmt: skip
    untrained.set_params(launcher="torchrun --nproc-per-node=1")
    return untrained


@pytest.mark.slow
def test_a_slurm_job_is_refused_if_each_node_would_train_by_itself(job: Project) -> None:
    job.set_params(launcher="python")
    refused = job.run("deploy/train.slurm", check=False)
    assert refused.returncode == 1
    assert "params.yaml, launcher: python: each node would train separately" in refused.stderr


@pytest.mark.slow
def test_a_slurm_job_whose_time_is_up_saves_a_checkpoint_and_the_next_goes_on_from_it(job: Project) -> None:
    job.env |= {"RANK_AT": "1", "AT": str(2 * BATCHES + 9), "END": "job"}
    ended = job.run("deploy/train.slurm", check=False)
    assert ended.returncode != 0
    wait_for(lambda: processes_in(job.root) == [])
    del job.env["AT"], job.env["RANK_AT"]
    printed = job.run("deploy/train.slurm").stdout
    assert_saved_when_ended(printed)
    assert job.stages_run(printed) == ["train", "evaluate", "export"]
    assert len(pd.read_csv(job.root / "metrics/epochs.csv")) == EPOCHS


@pytest.mark.slow
def test_a_slurm_job_trains_on_all_of_its_nodes(job: Project, reference: Project) -> None:
    printed = job.run("deploy/train.slurm").stdout
    assert job.stages_run(printed) == ["check", "train", "evaluate", "export"]
    assert json.loads((job.root / "metrics/environment.json").read_text())[0]["processes"] == 2
    epochs, others = (pd.read_csv(project.root / "metrics/epochs.csv") for project in (reference, job))
    np.testing.assert_allclose(epochs[:1], others[:1], rtol=1e-3)
    assert len(others) == EPOCHS

    shutil.rmtree(job.root / "models")  # it is in the cache
    printed = job.run("deploy/train.slurm").stdout  # which would wait for the other node in vain
    assert job.stages_run(printed) == []
