"""Pretrained weights: files of both formats, torchvision's by name, and files that do not fit."""

import hashlib
import http.server
import json
import socket
import struct
import threading
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from hostile import RunsCodeWhenUnpickled, halve, write_nothing, write_text
from project import small_project
from safetensors.torch import save_file
from torch import Tensor, nn
from torchvision import models
from tracker import send_the_rest

from classifier.networks import build_network
from classifier.pipeline.errors import PipelineError
from classifier.training import pretrained
from classifier.training.pretrained import load_pretrained

IMAGE_SHAPE, CLASSES = (3, 8, 8), 5
FIRST, MIDDLE, LAST = "stages.0.0.weight", "stages.2.0.weight", ("classifier.weight", "classifier.bias")
STATISTICS, COUNT = "stages.1.2.running_var", "stages.1.2.num_batches_tracked"
TAG = "sha256.weights"
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"

State = dict[str, Tensor]


def cnn(seed: int = 0, image_shape: tuple[int, int, int] = IMAGE_SHAPE, classes: int = CLASSES) -> nn.Module:
    torch.manual_seed(seed)
    return build_network("cnn", image_shape, classes)


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


# Files that fit


@pytest.mark.parametrize(("suffix", "write"), [("pth", torch.save), ("safetensors", save_file)])
def test_all_tensors_of_a_file_are_taken_over(
    suffix: str, write: Callable[[State, Path], None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / f"start-v1.{suffix}"
    given, network = cnn(seed=1), cnn(seed=2)
    write(given.state_dict(), path)
    assert load_pretrained(network, "cnn", str(path)) == sha256(path)
    torch.testing.assert_close(network.state_dict(), given.state_dict(), rtol=0, atol=0)
    assert all(parameter.requires_grad for parameter in network.parameters())
    assert capsys.readouterr().out == f"Loaded 44 of 44 tensors from {path}\n"


def test_the_layers_fitted_to_images_and_classes_stay_newly_drawn_where_they_differ(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "start.pth"
    given, network = cnn(1, (1, 28, 28), 10), cnn(2)
    torch.save(given.state_dict(), path)
    drawn = deepcopy(network.state_dict())
    load_pretrained(network, "cnn", str(path))
    for key, tensor in network.state_dict().items():
        expected = drawn[key] if key in (FIRST, *LAST) else given.state_dict()[key]
        assert torch.equal(tensor, expected), key
    assert capsys.readouterr().out.splitlines() == [
        f"Loaded 41 of 44 tensors from {path}",
        "  stages.0.0.weight is newly initialised: 64 x 3 x 4 x 4, not 64 x 1 x 4 x 4",
        "  classifier.weight is newly initialised: 5 x 256, not 10 x 256",
        "  classifier.bias is newly initialised: 5, not 10",
    ]


def test_for_grey_images_the_first_convolution_is_the_sum_over_the_channels(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "start.pth"
    given, network = cnn(1).eval(), cnn(2, (1, 8, 8)).eval()
    torch.save(given.state_dict(), path)
    load_pretrained(network, "cnn", str(path))
    grey = torch.rand(4, 1, 8, 8)
    torch.testing.assert_close(network(grey), given(grey.expand(4, 3, 8, 8)), rtol=0, atol=1e-5)
    assert (
        "  stages.0.0.weight is summed over channels: 64 x 1 x 4 x 4, from 64 x 3 x 4 x 4\n" in capsys.readouterr().out
    )


def test_a_file_of_smaller_numbers_is_taken_over_as_float32(tmp_path: Path) -> None:
    given, network = cnn(1).half().state_dict(), cnn(2)
    torch.save(given, tmp_path / "start.pth")
    load_pretrained(network, "cnn", str(tmp_path / "start.pth"))
    assert network.state_dict()[MIDDLE].dtype == torch.float32
    assert torch.equal(network.state_dict()[MIDDLE], given[MIDDLE].float())


def test_the_first_layer_of_an_mlp_is_fitted_to_the_images(tmp_path: Path) -> None:
    given, network = build_network("mlp", (1, 28, 28), 10), build_network("mlp", IMAGE_SHAPE, 10)
    torch.save(given.state_dict(), tmp_path / "start.pth")
    drawn = deepcopy(network.state_dict())
    load_pretrained(network, "mlp", str(tmp_path / "start.pth"))
    kept = [key for key, tensor in network.state_dict().items() if torch.equal(tensor, drawn[key])]
    assert kept == ["linear_relu_stack.0.weight"]


# Files that do not


def remove(state: State) -> None:
    del state[MIDDLE], state[STATISTICS]


def add(state: State) -> None:
    state |= {f"extra.{letter}": torch.zeros(1) for letter in LETTERS}


def add_line(state: State) -> None:
    state["a\nb\x1b" + "c" * 10_000] = torch.zeros(1)


def reshape(state: State) -> None:
    state[MIDDLE] = torch.zeros(256, 128, 5, 5)


def count_in_fractions(state: State) -> None:
    state[COUNT] = torch.tensor(0.5)


def put(key: str, tensor: Callable[[Tensor], object]) -> Callable[[State], None]:
    def change(state: State) -> None:
        state[key] = tensor(state[key])  # type: ignore[assignment]

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (remove, r"does not fit the network: it lacks stages\.1\.2\.running_var, stages\.2\.0\.weight$"),
        (add, r"does not fit the network: it has unknown tensors extra\.A, extra\.B, extra\.C and 23 more$"),
        (add_line, r"does not fit the network: it has unknown tensors 'a\\nb\\x1bc{91}$"),
        (reshape, r"not fit the network: it has stages\.2\.0\.weight of 256 x 128 x 5 x 5, not 256 x 128 x 3 x 3$"),
        (count_in_fractions, r"does not fit the network: it has stages\.1\.2\.num_batches_tracked of torch\.float32$"),
        (put(LAST[1], lambda bias: bias * torch.nan), r"dense tensor of finite numbers in classifier\.bias$"),
        (put(MIDDLE, lambda weight: weight.to_sparse()), r"dense tensor of finite numbers in stages\.2\.0\.weight$"),
        (put(MIDDLE, lambda weight: weight.to(torch.complex64)), r"dense tensor of finite numbers in stages\.2\.0"),
        (put(MIDDLE, lambda weight: weight.to("meta")), r"dense tensor of finite numbers in stages\.2\.0\.weight$"),
        # A few bytes expanded to 10^15 numbers: must not be compared or summed
        (
            put(FIRST, lambda weight: torch.zeros(1).expand(16, 10**12, 3, 3)),
            r"of finite numbers in stages\.0\.0\.weight$",
        ),
        (put(MIDDLE, lambda _: "text"), r"dense tensor of finite numbers in stages\.2\.0\.weight$"),
    ],
)
def test_tensors_that_do_not_fit(change: Callable[[State], None], message: str, tmp_path: Path) -> None:
    state, network = cnn(1).state_dict(), cnn(2)
    change(state)
    torch.save(state, tmp_path / "start.pth")
    before = deepcopy(network.state_dict())
    check_refused(network, tmp_path / "start.pth", message)
    torch.testing.assert_close(network.state_dict(), before, rtol=0, atol=0)  # unchanged


def check_refused(network: nn.Module, path: Path, message: str) -> None:
    """Check that loading the file raises an error of one line that starts with the parameter and names the file."""
    with pytest.raises(PipelineError, match=message) as caught:
        load_pretrained(network, "cnn", str(path))
    text = str(caught.value)
    assert text.startswith(f"weights: {path} ") or text == f"weights: there is no file {path}"
    assert "\n" not in text
    assert "weights_only" not in text  # torch's advice is to run the file's code
    assert caught.value.__context__ is None or caught.value.__suppress_context__


def write_half(path: Path) -> None:
    (save_file if path.suffix == ".safetensors" else torch.save)(cnn().state_dict(), path)
    halve(path)


def write_header(path: Path, **entry: object) -> None:
    """Write a .safetensors file of one tensor with a header that may be wrong."""
    header = json.dumps({MIDDLE: {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]} | entry}).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(8))


def write_compressed(path: Path) -> None:
    torch.save({MIDDLE: torch.zeros(2**20)}, path.with_suffix(".stored"))
    with (
        zipfile.ZipFile(path.with_suffix(".stored")) as stored,
        zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as packed,
    ):
        for member in stored.namelist():
            packed.writestr(member, stored.read(member))


@pytest.mark.parametrize(
    ("suffix", "write", "message"),
    [
        ("pth", lambda _: None, "there is no file"),
        ("pth", Path.mkdir, "there is no file"),
        ("pth", write_text, "cannot be read"),
        ("pth", write_nothing, "cannot be read"),
        ("pth", write_half, "cannot be read"),
        ("pth", write_compressed, "cannot be read"),
        ("pth", lambda path: torch.save(cnn(), path), "cannot be read"),
        ("pth", lambda path: torch.save(torch.zeros(3), path), "does not hold tensors by name"),
        ("pth", lambda path: torch.save([torch.zeros(3)], path), "does not hold tensors by name"),
        ("pth", lambda path: torch.save({0: torch.zeros(3)}, path), "does not hold tensors by name"),
        ("pth", lambda path: torch.save({}, path), "does not fit the network: it lacks .* and 41 more$"),
        ("safetensors", lambda _: None, "there is no file"),
        ("safetensors", Path.mkdir, "there is no file"),
        ("safetensors", write_text, "cannot be read as a complete .safetensors file"),
        ("safetensors", write_nothing, "cannot be read as a complete .safetensors file"),
        ("safetensors", write_half, "cannot be read as a complete .safetensors file"),
        ("safetensors", lambda path: path.write_bytes(b"\xff" * 64), "cannot be read as a complete .safetensors file"),
        ("safetensors", lambda path: torch.save(cnn().state_dict(), path), "cannot be read as a complete .safetensors"),
        (
            "safetensors",
            lambda path: write_header(path, shape=[2**40]),
            "cannot be read as a complete .safetensors file",
        ),
        ("safetensors", lambda path: write_header(path, data_offsets=[0, 2**40]), "cannot be read as a complete"),
        ("safetensors", lambda path: write_header(path, dtype="X9"), "cannot be read as a complete .safetensors file"),
        ("safetensors", write_header, "does not fit the network: it lacks"),
    ],
)
def test_files_that_are_no_weights(suffix: str, write: Callable[[Path], object], message: str, tmp_path: Path) -> None:
    write(tmp_path / f"start.{suffix}")
    check_refused(cnn(), tmp_path / f"start.{suffix}", message)


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_a_name_longer_than_any_file_has(suffix: str, tmp_path: Path) -> None:
    check_refused(cnn(), tmp_path / f"{'x' * 300}.{suffix}", "there is no file")


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_code_in_a_file_is_not_run(suffix: str, tmp_path: Path) -> None:
    torch.save(RunsCodeWhenUnpickled(tmp_path / "ran"), tmp_path / f"start.{suffix}")
    check_refused(cnn(), tmp_path / f"start.{suffix}", "cannot be read")
    assert not (tmp_path / "ran").exists()


# torchvision's weights by name, from a local server


@pytest.fixture
def checkpoints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder for torch's downloads."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "home"))
    return tmp_path / "home/hub/checkpoints"


@contextmanager
def served(content: bytes | None) -> Iterator[str]:
    """Yield the address of a server that answers every request with these bytes; None: with 404."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if content is None:
                self.send_error(404)
                return
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever).start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}"
        finally:
            server.shutdown()


@pytest.fixture
def offered(tmp_path: Path) -> tuple[nn.Module, bytes, str]:
    """A network, the content of its weights file, and the name that torchvision would give to the file."""
    given = cnn(seed=1)
    torch.save(given.state_dict(), tmp_path / "offered.pth")
    content = (tmp_path / "offered.pth").read_bytes()
    return given, content, f"resnet18-{hashlib.sha256(content).hexdigest()[:8]}.pth"


def offer(monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    monkeypatch.setattr(models.ResNet18_Weights.IMAGENET1K_V1.value, "url", url)


@pytest.mark.parametrize("name", ["IMAGENET1K_V1", "DEFAULT"])
def test_torchvisions_weights_are_downloaded_once(
    name: str, offered: tuple[nn.Module, bytes, str], checkpoints: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given, content, file = offered
    with served(content) as address:
        offer(monkeypatch, f"{address}/{file}")
        digest = load_pretrained(network := cnn(2), "resnet18", name)
    torch.testing.assert_close(network.state_dict(), given.state_dict(), rtol=0, atol=0)
    assert [path.name for path in checkpoints.iterdir()] == [file]
    assert digest == sha256(checkpoints / file)
    assert load_pretrained(cnn(3), "resnet18", name) == digest  # the server is gone
    assert socket.getdefaulttimeout() is None


def check_both_ways_out(network: nn.Module, url: str, checkpoints: Path, reason: str) -> None:
    with pytest.raises(PipelineError, match=reason) as caught:
        load_pretrained(network, "resnet18", "IMAGENET1K_V1")
    text = str(caught.value)
    assert text.startswith(f"weights: {url} cannot be downloaded: ")
    assert text.endswith(
        f". Download it by other means, then put it into {checkpoints}, or set its path in params.yaml: "
        f"`weights: path/to/{url.rpartition('/')[2]}`"
    )
    assert "\n" not in text
    assert not list(checkpoints.iterdir())
    assert socket.getdefaulttimeout() is None


@pytest.mark.parametrize(
    ("content", "reason"),
    [(None, "HTTP Error 404: Not Found"), (b"other", 'invalid hash value .expected "[0-9a-f]{8}')],
)
def test_a_server_without_the_weights(
    content: bytes | None,
    reason: str,
    offered: tuple[nn.Module, bytes, str],
    checkpoints: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with served(content) as address:
        offer(monkeypatch, url := f"{address}/{offered[2]}")
        check_both_ways_out(cnn(2), url, checkpoints, reason)


@pytest.mark.parametrize(("listens", "reason"), [(False, "refused"), (True, "timed out")])
def test_a_server_that_does_not_answer(
    listens: bool, reason: str, checkpoints: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pretrained, "PATIENCE_SECONDS", 0.2)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        if listens:
            silent.listen()
        offer(monkeypatch, url := f"http://127.0.0.1:{silent.getsockname()[1]}/resnet18-f37072fd.pth")
        check_both_ways_out(cnn(), url, checkpoints, reason)


def test_a_full_disk_is_not_taken_for_a_lack_of_network(checkpoints: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fill(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch.hub, "download_url_to_file", fill)
    with pytest.raises(OSError, match="No space left on device"):
        load_pretrained(cnn(), "resnet18", "DEFAULT")


def test_another_file_under_the_name_of_torchvisions(checkpoints: Path) -> None:
    checkpoints.mkdir(parents=True)
    path = checkpoints / "resnet18-f37072fd.pth"
    torch.save(cnn().state_dict(), path)
    with pytest.raises(PipelineError, match="differs from https://download") as caught:
        load_pretrained(cnn(), "resnet18", "DEFAULT")
    assert str(caught.value).startswith(f"weights: {path} ")


@pytest.mark.parametrize(
    ("network", "weights", "message"),
    [
        (
            "mlp",
            "DEFAULT",
            r"'DEFAULT' is not a file that ends in \.pth or \.safetensors, and torchvision has no .* mlp$",
        ),
        ("cnn", "start.pt", r"'start\.pt' is not a file that ends in .*, and torchvision has no weights for cnn$"),
        ("resnet18", "IMAGENET", r"'IMAGENET' is not one of IMAGENET1K_V1, DEFAULT for resnet18, or a file that ends"),
        (
            "vgg16",
            "IMAGENET1K_V2",
            r"'IMAGENET1K_V2' is not one of IMAGENET1K_V1, IMAGENET1K_FEATURES, DEFAULT for vgg16",
        ),
    ],
)
def test_names_that_torchvision_does_not_have(network: str, weights: str, message: str) -> None:
    with pytest.raises(PipelineError, match=rf"^weights: {message}"):
        load_pretrained(cnn(), network, weights)


# torchvision's models


@pytest.mark.parametrize("name", ["resnet18", pytest.param("vgg16", marks=pytest.mark.slow)])
def test_torchvisions_model_there_and_back(name: str, tmp_path: Path) -> None:
    """torchvision's weights give the same logits in our network, and its model can load our saved weights."""
    torch.manual_seed(0)
    pixels = torch.rand(2, 3, 224, 224)
    transform = models.get_model_weights(name).DEFAULT.transforms()
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (transform.mean, transform.std))
    network: nn.Module = models.get_model(name).eval()
    with torch.inference_mode():
        expected = network((pixels - mean) / std)
    torch.save(network.state_dict(), tmp_path / "theirs.pth")
    del network

    network = build_network(name, (3, 224, 224), 1000).eval()
    load_pretrained(network, name, str(tmp_path / "theirs.pth"))
    (tmp_path / "theirs.pth").unlink()
    with torch.inference_mode():
        logits = network(pixels)
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4 * float(expected.std()))
    torch.save(network.state_dict(), tmp_path / "ours.pth")
    del network

    network = build_network(name, (3, 224, 224), 1000).eval()
    load_pretrained(network, name, str(tmp_path / "ours.pth"))
    with torch.inference_mode():
        assert torch.equal(network(pixels), logits)


@pytest.mark.slow
def test_the_train_stage_starts_from_a_file(tmp_path: Path) -> None:
    """It prints so, tags the run with the hash of the file, and freezes layers after loading."""
    project = small_project(tmp_path, network="cnn", epochs="1", freeze="[stages.*]", weights="start-v1.pth")
    given = cnn(1, (1, 28, 28), 3)
    torch.save(given.state_dict(), project.root / "start-v1.pth")
    output = project.dvc("repro", "train").stdout
    assert "Loaded 42 of 44 tensors from start-v1.pth\n" in output
    assert "  classifier.bias is newly initialised: 10, not 3\n" in output
    trained = torch.load(project.root / "models/model_weights.pth")
    for key, tensor in given.state_dict().items():
        assert key in LAST or torch.equal(trained[key], tensor), key
    assert set(json.loads((project.root / "metrics/train.json").read_text())) == {
        "epoch", "train_loss", "val_loss", "val_accuracy",
    }  # fmt: skip
    send_the_rest(project)
    query = f"import mlflow; print(mlflow.search_runs(search_all_experiments=True)['tags.{TAG}'].to_list())"
    printed = project.run("python", "-c", query, MLFLOW_TRACKING_URI="sqlite:///mlflow.db").stdout
    assert sha256(project.root / "start-v1.pth") in printed
