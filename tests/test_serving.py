"""The champion behind MLflow's own server: requests over HTTP get the answers of `classifier predict`, or a reason."""

import base64
import io
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import pytest
from imports import ROOT
from model_server import SECONDS, model_server, post
from pictures import split_pngs
from PIL import Image
from project import Project, python, reproduced_project

pytestmark = pytest.mark.slow

MODEL = "models:/fashion-mnist@champion"
COUNT = 8


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """A project with a champion, and some of its test images as files in the folder `pictures`."""
    project = reproduced_project(tmp_path_factory, export_formats="[onnx]")
    project.run(sys.executable, "-m", "classifier", "promote")
    (project.root / "pictures").mkdir()
    for number, (_, content) in enumerate(split_pngs(project.root / "data", "test", COUNT)):
        (project.root / f"pictures/{number}.png").write_bytes(content)
    return project


@pytest.fixture(scope="module")
def port(project: Project) -> Iterator[int]:
    """Of a server with a limit on its memory, as the documentation has it; macOS knows none."""
    with model_server(project.root, MODEL, "ulimit -v 8388608" if sys.platform == "linux" else "") as port:
        yield port


@pytest.fixture(scope="module")
def pictures(project: Project) -> list[str]:
    """The files in base64."""
    paths = sorted((project.root / "pictures").iterdir())
    return [base64.b64encode(path.read_bytes()).decode() for path in paths]


@pytest.fixture(scope="module")
def expected(project: Project) -> list[dict[str, Any]]:
    """What `classifier predict` says of them."""
    command = [sys.executable, "-m", "classifier", "predict", "pictures", "--model", "champion", "--format", "json"]
    answers: list[dict[str, Any]] = json.loads(project.run(*command).stdout)
    assert len({answer["class"] for answer in answers}) > 1
    return answers


def encoded(image: Image.Image, kind: str = "PNG") -> str:
    file = io.BytesIO()
    image.save(file, kind)
    return base64.b64encode(file.getvalue()).decode()


@pytest.mark.parametrize(
    "form", ["objects", "strings", "mixed", "broken lines", "split", "records", "instances", "column", "CSV"]
)
def test_every_form_of_a_request_gets_the_answers_of_predict(
    port: int, pictures: list[str], expected: list[dict[str, Any]], form: str
) -> None:
    objects = [{"image": picture} for picture in pictures]
    content: Any = {
        "objects": {"inputs": objects},
        "strings": {"inputs": pictures},
        "mixed": {"inputs": [*objects[:3], *pictures[3:]]},
        "broken lines": {"inputs": [base64.encodebytes(base64.b64decode(picture)).decode() for picture in pictures]},
        "split": {"dataframe_split": {"columns": ["image"], "data": [[picture] for picture in pictures]}},
        "records": {"dataframe_records": objects},
        "instances": {"instances": objects},
        "column": {"inputs": {"image": pictures}},
        "CSV": "\n".join(["image", *pictures]).encode(),
    }[form]
    status, text = post(port, content, "text/csv" if form == "CSV" else "application/json")
    assert status == 200, text
    answers = json.loads(text)
    assert set(answers) == {"predictions"}
    assert len(answers["predictions"]) == COUNT
    for answer, predicted in zip(answers["predictions"], expected, strict=True):
        probabilities = {f"P({name})": value for name, value in predicted["probabilities"].items()}
        assert list(answer) == ["class", "probability", *probabilities]
        assert answer["class"] == predicted["class"]
        assert answer["probability"] == pytest.approx(predicted["probability"], abs=1e-6)
        assert {name: answer[name] for name in probabilities} == pytest.approx(probabilities, abs=1e-6)


def test_an_image_of_another_size_and_in_colour_is_brought_to_the_models(port: int, pictures: list[str]) -> None:
    grey = Image.open(io.BytesIO(base64.b64decode(pictures[0])))
    status, text = post(port, {"inputs": [pictures[0], encoded(grey.resize((56, 56), 0).convert("RGB"), "BMP")]})
    assert status == 200, text
    one, other = json.loads(text)["predictions"]
    assert other["class"] == one["class"]
    assert other["probability"] == pytest.approx(one["probability"], abs=1e-2)


GOOD = encoded(Image.new("L", (28, 28)))
LARGE = encoded(Image.new("1", (10_000, 9_000)))  # 11 kB
BAD_REQUESTS: dict[str, tuple[Any, str]] = {
    "not base64": ({"inputs": [GOOD, "!"]}, r"1 of 2 images cannot be used: image 2: .*: not base64: "),
    "not ASCII": ({"inputs": [{"image": "é"}]}, r"image 1: .*: not base64: "),
    "no image": (
        {"inputs": [{"image": GOOD}, {"image": "AAAA"}]},
        r"1 of 2 images cannot be used: image 2: not a usable image: it is none of AVIF, ",
    ),
    "cut off": ({"inputs": [GOOD[:60]]}, "image 1: not a usable image: "),
    "several": ({"inputs": ["AAAA", GOOD, "AAAA"]}, r"2 of 3 images cannot be used: image 1: .*; image 3: "),
    "very many": ({"inputs": ["AAAA"] * 1000}, r"1000 of 1000 images cannot be used \(the first 20\): image 1: "),
    "too large": ({"inputs": [GOOD, LARGE]}, "image 2: not a usable image: it has more than 89,478,485 pixels"),
    "deep": ({"inputs": [encoded(Image.new("F", (28, 28)), "TIFF")]}, "image 1: .* its values have no fixed range"),
    "no images": ({"inputs": []}, "0 images; send 1 to 1024"),
    "an empty table": ({"dataframe_split": {"columns": ["image"], "data": []}}, "0 images; send 1 to 1024"),
    "too many": ({"inputs": [GOOD] * 1025}, "1025 images; send 1 to 1024"),
    "another key": ({"images": [GOOD]}, "exactly one of the input fields .*'inputs'"),
    "a key of chats": ({"input": [GOOD]}, 'no column "image"; send a list of images in base64, or of objects '),
    "another key of objects": ({"inputs": [{"picture": GOOD}]}, 'image 1: .* no string of base64 under "image"'),
    "another column": ({"dataframe_split": {"columns": ["x"], "data": [[GOOD]]}}, 'no column "image"; send a list'),
    "two columns": (
        {"dataframe_split": {"columns": ["image", "image"], "data": [[GOOD, GOOD]]}},
        r"text of shape \(1, 2\); send a list of images in base64",
    ),
    "a number": ({"inputs": [{"image": GOOD}, {"image": 5}]}, 'image 2: .* no string of base64 under "image"'),
    "null": ({"inputs": [None]}, 'image 1: .* no string of base64 under "image"'),
    "nested": ({"inputs": [[GOOD]]}, r"text of shape \(1, 1\); send a list of images in base64"),
    "no list": (
        {"inputs": 5},
        r"images of shape \(\); this model takes \(N, 1, 28, 28\), or a list of images in base64",
    ),
    "not JSON": (b"{", "valid JSON formatted string"),
    "nothing": (b"", "valid JSON formatted string"),
    "a list": ([GOOD], "Received a list"),
}


@pytest.mark.parametrize("name", BAD_REQUESTS)
def test_a_bad_request_is_answered_with_its_reason_and_the_image_at_fault(port: int, name: str) -> None:
    content, reason = BAD_REQUESTS[name]
    status, text = post(port, content)
    assert status == 400, text
    message = json.loads(text)["message"]
    assert re.search(reason, message), message
    assert GOOD not in text
    assert "Traceback" not in text


@pytest.mark.parametrize("content_type", ["text/plain", "image/png", "application/x-www-form-urlencoded"])
def test_another_content_type_is_told(port: int, content_type: str) -> None:
    status, text = post(port, {"inputs": [GOOD]}, content_type)
    assert status == 415
    assert "only supports the following content types" in text
    assert "application/json" in text


def test_no_string_of_a_request_is_taken_for_the_path_of_a_file(port: int, project: Project) -> None:
    path = project.root / "AAAA"  # which is base64, too
    shutil.copy(project.root / "pictures/0.png", path)
    for name in (str(path), path.name):
        for content in (
            {"inputs": [name]}, {"inputs": [{"image": name}]}, {"inputs": {"image": [name]}}, {"instances": [name]},
            {"dataframe_split": {"columns": ["image"], "data": [[name]]}}, {"inputs": name},
            {"prompt": "", "image": [name]}, {"input": [name]},
        ):  # fmt: skip
            status, text = post(port, content)
            assert status == 400, text


@pytest.mark.skipif(sys.platform != "linux", reason="macOS knows no limit on a process's memory")
def test_a_request_that_would_take_all_memory_is_refused_and_the_next_one_answered(port: int) -> None:
    status, text = post(port, {"inputs": ["A" * 2**20, *[""] * 4000]})  # MLflow makes 4001 strings of 4 MiB of it
    assert status == 400
    assert "Unable to allocate 15.6 GiB" in text
    assert post(port, {"inputs": [GOOD]})[0] == 200


def test_a_connection_can_be_kept_for_many_requests(port: int) -> None:
    connection = HTTPConnection("127.0.0.1", port, timeout=SECONDS)
    connection.connect()
    kept = connection.sock
    for content in ({"inputs": [GOOD]}, {"inputs": ["!"]}, {"inputs": [GOOD, GOOD]}):
        connection.request("POST", "/invocations", json.dumps(content), {"Content-Type": "application/json"})
        answer = connection.getresponse()
        assert answer.status == (400 if "!" in content["inputs"] else 200)
        answer.read()
        assert connection.sock is kept  # which is another if the server has closed it
    connection.close()


def test_the_benchmark_measures_without_errors(project: Project, tmp_path: Path) -> None:
    root = project.copy(tmp_path / "project").root
    done = subprocess.run(
        [python(), "-m", "benchmarks.serving", "--project", root, "--requests", "12"],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    rows = re.findall(r"^ +(\d+) +(\d+) +[\d.]+ +[\d.]+ +[\d.]+ +[\d.]+ +(\d+)$", done.stdout, re.MULTILINE)
    assert rows == [("1", "1", "0"), ("4", "1", "0"), ("1", "32", "0"), ("4", "32", "0")]
