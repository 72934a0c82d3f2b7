"""Arbitrary input: it is taken by the rules, or refused with a PipelineError; no other exception, no other answer."""

import csv
import importlib.util
import os
import random
import re
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import fuzz_targets
import numpy as np
import pytest
import yaml
from hypothesis import configuration, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from imports import ROOT
from pictures import encode_png, write_zip

from classifier.data.decoding import decode_image
from classifier.pipeline.annotations import class_names, read_annotations, write_csv
from classifier.pipeline.errors import PipelineError, masked
from classifier.pipeline.image_files import ImageFiles
from classifier.pipeline.params import Params, load_params, modules_in

FUZZER_SECONDS = 10
NIGHTLY_FUZZER_SECONDS = 600

# The same inputs at every run; no database of failures, and Hypothesis' caches beside pytest's, which git ignores
configuration.set_hypothesis_home_dir(ROOT / ".pytest_cache/hypothesis")
quick = settings(derandomize=True, database=None, deadline=None, max_examples=100)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz")


# Parameters

COMMITTED: dict[str, Any] = yaml.safe_load((ROOT / "params.yaml").read_text(encoding="utf-8"))
scalars = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9) | st.dates() | st.binary(max_size=5)
)
contents = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5) | st.integers(), inner, max_size=3),
    max_leaves=9,
)
printable = st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Cs"]), min_size=1, max_size=20).filter(
    lambda text: masked(text) == text
)
positive = st.floats(min_value=0, exclude_min=True, allow_infinity=False)
fractions = st.floats(min_value=0, max_value=1, exclude_max=True)
counts = st.integers(1, 10**9)


def some(*values: str, least: int = 0) -> st.SearchStrategy[list[str]]:
    return st.lists(st.sampled_from(values), min_size=least)


valid_params = st.fixed_dictionaries(
    {key: st.just(value) for key, value in COMMITTED.items()}
    | {
        "seed": st.integers(0, 2**32 - 1),
        "device": st.sampled_from(["auto", "cpu", "mps", "cuda", "cuda:3"]),
        "threads": st.just("auto") | st.integers(1, 1024),
        "launcher": st.sampled_from(["python", "torchrun --nproc-per-node=2"]),
        "source": st.sampled_from(modules_in("sources")),
        "data_path": printable,
        "val_size": st.integers(0, 10**6) | fractions,
        "test_size": st.integers(0, 10**6) | fractions,
        "image_size": st.none() | st.integers(1, 4096) | st.lists(st.integers(1, 4096), min_size=2, max_size=2),
        "stored_size": st.none(),
        "group": st.none() | st.just("^(.)"),
        "folds": st.integers(2, 100),
        "fold": st.integers(0, 1),
        "fit": st.sampled_from(["pad", "crop", "stretch"]),
        "background": st.sampled_from(["white", "black", "#123abc"]),
        "intensity": st.sampled_from(["full", "image"]),
        "on_bad_image": st.sampled_from(["stop", "skip"]),
        "crop_scale": st.floats(0.01, 1),
        "cluster": st.none() | st.just("tcp://head:8786"),
        "channels": st.sampled_from([None, 1, 3]),
        "network": st.sampled_from(modules_in("networks")),
        "weights": st.none() | printable,
        "freeze": st.lists(printable),
        "epochs": counts,
        "batch_size": counts,
        "accumulate_steps": counts,
        "shuffle": st.booleans(),
        "optimizer": st.sampled_from(["sgd", "adam", "adamw", "rmsprop"]),
        "lr": positive,
        "momentum": fractions,
        "weight_decay": st.floats(min_value=0, allow_infinity=False),
        "schedule": st.sampled_from(["constant", "linear", "cosine", "onecycle"]),
        "label_smoothing": fractions,
        "target_transform": st.sampled_from([None, "one_hot"]),
        "augment": some("crop", "vflip", "erase", "color", "mixup", "resized_crop", "rotate", "trivial", "randaugment"),
        "balance": st.sampled_from(["none", "sampler", "loss"]),
        "precision": st.sampled_from(["float32", "bfloat16"]),
        "test_flip": st.booleans(),
        "export_formats": some("pth", "pt2", "onnx", "safetensors", "int8", least=1),
        "int8_max_drop": fractions,
        "temperature_scaling": st.booleans(),
        "workers": st.integers(0, 100),
        "memory_limit_gib": positive,
        "experiment": printable,
        "registered_model": printable.filter(lambda name: not set(name) & set("/:'\"`")),
    }
).filter(lambda values: values["shuffle"] or values["balance"] != "sampler")


def load(folder: Path, content: bytes) -> Params | None:
    """The parameters, or None if they are refused."""
    path = folder / "params.yaml"
    path.write_bytes(content)
    try:
        return load_params(path)
    except PipelineError as error:
        assert all(line.startswith(str(path)) for line in str(error).split("\n"))  # noqa: PT017, or it is taken
        return None


@quick
@given(content=st.binary() | st.text(alphabet="ab:-[]{}&*!|>?%@`'\"#,\n\t 01.~").map(str.encode))
def test_any_bytes_as_parameters(folder: Path, content: bytes) -> None:
    assert load(folder, content) is None


@quick
@given(content=contents | st.dictionaries(st.sampled_from([*COMMITTED]), contents).map(lambda new: COMMITTED | new))
def test_any_yaml_as_parameters(folder: Path, content: Any) -> None:
    params = load(folder, yaml.safe_dump(content, allow_unicode=True).encode("utf-8", "surrogatepass"))
    assert params is None or set(params.model_dump()) == set(COMMITTED)


@pytest.mark.parametrize(
    "text",
    [
        "[" * 100_000,
        "!!int ''",
        "!!bool maybe",
        "!!timestamp never",
        "&a [*a]",
        "9" * 5000,
        "".join(f"\n- &l{level} [{f'*l{level - 1}, ' * 9}x]" for level in range(1, 12)).replace("*l0", "x"),
        "&a x\n<<: *a",
    ],
    ids=lambda text: text[:20],
)
def test_what_breaks_readers_of_yaml_is_a_short_message(folder: Path, text: str) -> None:
    """The last but one is nine to the power of eleven values."""
    (folder / "params.yaml").write_text((ROOT / "params.yaml").read_text().replace("\nlr:", f"\nlr: {text} #"))
    with pytest.raises(PipelineError) as caught:
        load_params(folder / "params.yaml")
    assert len(str(caught.value)) < 500


@quick
@given(values=valid_params)
def test_valid_parameters_are_read_as_they_were_written(folder: Path, values: dict[str, Any]) -> None:
    params = load(folder, yaml.safe_dump(values, allow_unicode=True).encode())
    assert params is not None
    assert params.model_dump() == values
    assert load(folder, yaml.safe_dump(params.model_dump()).encode()) == params


# Tables

names = printable.filter(lambda name: not {"", ".", ".."} & set(name.split("/")))
labels = st.integers(0, 10**18 - 1)
values = st.sampled_from(["a", "./a", "b", "../a", "/a", "", "0", "9", "-1", "x"]) | st.text(max_size=5)


@quick
@given(content=st.binary() | st.text(alphabet='a1,"\n\r\0 ./\\;é\ufefflabe').map(str.encode))
def test_any_bytes_as_a_table(folder: Path, content: bytes) -> None:
    fuzz_targets.annotations(folder, content)


@quick
@given(rows=st.lists(st.tuples(values, values | labels.map(str)) | st.lists(values)))
def test_any_table_is_read_exactly_or_refused(folder: Path, rows: list[list[str]]) -> None:
    path = folder / "labels.csv"
    with path.open("w", encoding="utf-8", errors="surrogatepass", newline="") as file:
        csv.writer(file, quoting=csv.QUOTE_ALL).writerows([["file", "label"], *rows])
    try:
        read = read_annotations(path)
    except PipelineError:
        return
    filled = [(number, row) for number, row in enumerate(rows, 2) if row]
    assert [*read.table_rows] == [number for number, _ in filled]
    assert read.labels.tolist() == [int(label.strip()) for _, (_, label) in filled]
    assert read.files == [re.sub(r"(^|/)(\./|/)+", r"\1", name).removesuffix("/") for _, (name, _) in filled]


@quick
@given(table=st.dictionaries(names, labels))
def test_a_written_table_is_read_back_the_same(folder: Path, table: dict[str, int]) -> None:
    write_csv(folder / "labels.csv", {"file": [*table], "label": np.array([*table.values()], np.int64)})
    files, read, rows, _ = read_annotations(folder / "labels.csv")
    assert dict(zip(files, read.tolist(), strict=True)) == table
    assert files == [*table]
    assert [*rows] == [*range(2, 2 + len(table))]


@quick
@given(classes=st.lists(printable.filter(str.strip), unique=True, min_size=1))
def test_written_class_names_are_read_back_the_same(folder: Path, classes: list[str]) -> None:
    write_csv(folder / "classes.csv", {"label": range(len(classes)), "name": classes})
    assert class_names(folder) == classes


# Archives

files = st.dictionaries(names, st.binary(max_size=300), min_size=1, max_size=5)


def damaged(content: bytes, seed: int) -> bytes:
    """Some bytes changed, and maybe some removed or put in."""
    generator = random.Random(seed)  # noqa: S311, no secret
    changed = bytearray(content)
    for _ in range(generator.randint(1, 6)):
        start = generator.randrange(len(changed) + 1)
        removed, put_in = (generator.choice([0, 1, 1, 1, 1, 2, 9]) for _ in range(2))
        changed[start : start + removed] = generator.randbytes(put_in)
    return bytes(changed)


@quick
@given(files=files)
def test_a_written_zip_is_read_back_the_same(folder: Path, files: dict[str, bytes]) -> None:
    write_zip(folder / "images.zip", files.items())
    images = ImageFiles(folder / "images.zip")
    assert {name: images.read(name) for name in files} == files


@quick
@given(content=st.binary() | st.binary().map(lambda content: b"PK\x05\x06" + content))
def test_any_bytes_as_a_zip(folder: Path, content: bytes) -> None:
    fuzz_targets.archive(folder, content)


@quick
@given(files=files, compression=st.sampled_from([0, 8, 12, 14]), seed=st.integers(0, 10**9))
def test_a_damaged_zip_gives_bytes_or_is_refused(
    folder: Path, files: dict[str, bytes], compression: int, seed: int
) -> None:
    with zipfile.ZipFile(folder / "whole.zip", "w", compression) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    content = (folder / "whole.zip").read_bytes()
    for number in range(10):
        fuzz_targets.archive(folder, damaged(content, seed + number))


# Images

pictures = arrays.arrays(
    np.uint8,
    st.tuples(st.integers(1, 40), st.integers(1, 40)) | st.tuples(st.integers(1, 9), st.integers(1, 9), st.just(3)),
)


@quick
@given(image=pictures)
def test_an_encoded_picture_is_decoded_the_same(image: np.ndarray) -> None:
    decoded = decode_image(encode_png(image))
    assert np.array_equal(decoded, image[None] if image.ndim == 2 else image.transpose(2, 0, 1))


@quick
@given(image=pictures, seed=st.integers(0, 10**9))
def test_a_damaged_picture_is_decoded_or_refused(image: np.ndarray, seed: int) -> None:
    content = encode_png(image)
    for number in range(10):
        try:
            decoded = decode_image(damaged(content, seed + number))
        except ValueError as error:
            assert type(error) is ValueError and str(error)  # noqa: PT017, PT018, or it is taken
        else:
            assert decoded.dtype == np.uint8
            assert decoded.shape[0] in (1, 3)
            assert decoded.size > 0


# By coverage


@pytest.mark.slow
@pytest.mark.skipif(not importlib.util.find_spec("atheris"), reason="Atheris has no wheels for this system")
@pytest.mark.parametrize("target", ["annotations", "archive"])
def test_fuzzer_finds_nothing(target: str, tmp_path: Path) -> None:
    fuzz(target, tmp_path, FUZZER_SECONDS)


@pytest.mark.nightly
@pytest.mark.skipif(not importlib.util.find_spec("atheris"), reason="Atheris has no wheels for this system")
@pytest.mark.parametrize("target", ["annotations", "archive"])
def test_fuzzer_finds_nothing_in_ten_minutes(target: str, tmp_path: Path) -> None:
    fuzz(target, tmp_path, NIGHTLY_FUZZER_SECONDS)


def fuzz(target: str, tmp_path: Path, seconds: int) -> None:
    (tmp_path / "corpus").mkdir()
    command = [sys.executable, f"{ROOT}/tests/fuzz_targets.py", target, "corpus", f"-max_total_time={seconds}"]
    # The fuzzer ends above 2 GiB, by a peak of memory that a process has from the one that starts it: here a shell, not
    # pytest, in which other tests may have used more
    done = subprocess.run(
        ["sh", "-c", '"$@"; exit $?', "sh", *command],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        errors="replace",
        timeout=seconds + 100,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    runs = re.search(r"Done (\d+) runs", done.stderr)
    assert runs, done.stderr
    assert int(runs[1]) > 100
    assert len(list((tmp_path / "corpus").iterdir())) > 10  # inputs that reached other lines
