"""params.yaml: what is accepted, and the one line that each mistake gets."""

import ast
import os
import re
import subprocess
from pathlib import Path

import pytest
from imports import ROOT
from project import python

from classifier.pipeline.errors import PipelineError
from classifier.pipeline.params import UNTRACKED, Params, data_name, load_params, modules_in

COMMITTED = (ROOT / "params.yaml").read_text(encoding="utf-8")


def with_values(values: dict[str, str]) -> str:
    """The committed parameters with some lines replaced: YAML text by key."""
    text = re.sub(r"(?m)^export_formats:.*\n(- .*\n)+", "", COMMITTED)
    text += "export_formats: [pth, pt2, onnx]\n"
    for key, value in values.items():
        text, found = re.subn(rf"(?m)^{key}:.*$", lambda _, line=f"{key}: {value}": line, text)  # type: ignore[misc]
        assert found == 1, key
    return text


def without(key: str) -> str:
    return re.sub(rf"(?m)^{key}:.*\n", "", with_values({}))


def load(folder: Path, text: str) -> Params:
    (folder / "params.yaml").write_text(text, encoding="utf-8")
    return load_params(folder / "params.yaml")


def complaints(folder: Path, text: str) -> list[str]:
    """The lines of the error, each without the file that it starts with."""
    with pytest.raises(PipelineError) as caught:
        load(folder, text)
    lines = str(caught.value).splitlines()
    start = f"{folder / 'params.yaml'}: "
    assert all(line.startswith(start) for line in lines)
    return [line.removeprefix(start) for line in lines]


def run_module(folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [python(), "-m", "classifier.pipeline.params"],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )


# The committed file


def test_committed_parameters_load() -> None:
    params = load_params(ROOT / "params.yaml")
    assert list(type(params).model_fields) == list(params.model_dump())
    assert set(params.model_dump()) >= UNTRACKED


def test_committed_parameters_are_in_dvcs_spelling(tmp_path: Path) -> None:
    """Or the first `dvc exp run -S` would change lines that nobody meant."""
    from dvc.utils.serialize import modify_yaml

    (tmp_path / "params.yaml").write_text(COMMITTED, encoding="utf-8")
    with modify_yaml(tmp_path / "params.yaml"):
        pass
    assert (tmp_path / "params.yaml").read_text(encoding="utf-8") == COMMITTED
    with modify_yaml(tmp_path / "params.yaml") as content:
        content["lr"] = 1e-06
        content["optimizer"] = "adam"
    changed = load_params(tmp_path / "params.yaml")
    assert changed == load_params(ROOT / "params.yaml").model_copy(update={"lr": 1e-06, "optimizer": "adam"})


def test_every_parameter_says_what_is_allowed() -> None:
    assert [key for key, field in Params.model_fields.items() if not field.description] == []


def test_parameters_are_frozen() -> None:
    with pytest.raises(ValueError, match="frozen"):
        load_params(ROOT / "params.yaml").lr = 1.0  # type: ignore[misc]


def test_modules_in() -> None:
    assert "mlp" in modules_in("networks")
    assert "fashion_mnist" in modules_in("sources")
    assert "__init__" not in modules_in("networks")


# Values that are accepted


@pytest.mark.parametrize(
    ("written", "read"),
    [
        ("1e-06", 1e-06),
        ("1E3", 1000.0),
        ("1.5e3", 1500.0),
        ("1.e3", 1000.0),
        (".5e-3", 0.0005),
        ("+1e+0", 1.0),
        ("0.1", 0.1),
        ("1", 1.0),
    ],
)
def test_numbers_as_dvc_and_people_write_them(tmp_path: Path, written: str, read: float) -> None:
    lr = load(tmp_path, with_values({"lr": written})).lr
    assert (lr, type(lr)) == (read, float)


@pytest.mark.parametrize(
    ("key", "written", "read"),
    [
        ("weights", "1e5.pth", "1e5.pth"),
        ("weights", "", None),
        ("weights", "null", None),
        ("target_transform", "one_hot", "one_hot"),
        ("val_size", "0", 0),
        ("val_size", "0.1", 0.1),
        ("val_size", "1e-1", 0.1),
        ("threads", "3", 3),
        ("device", "cuda:1", "cuda:1"),
        ("launcher", "torchrun --nproc-per-node=2", "torchrun --nproc-per-node=2"),
        ("freeze", '["*.0.*", "*bias"]', ["*.0.*", "*bias"]),
        ("augment", "[erase, flip, crop]", ["erase", "flip", "crop"]),
        ("export_formats", "[onnx]", ["onnx"]),
        ("image_size", "", None),
        ("image_size", "224", 224),
        ("image_size", "[48, 64]", [48, 64]),
        ("group", "", None),
        ("group", "'^(p\\d+)_'", "^(p\\d+)_"),
        ("folds", "5", 5),
        ("background", "'#0a0b0c'", "#0a0b0c"),
        ("crop_scale", "1.0", 1.0),
        ("channels", "3", 3),
        ("balance", "none", "none"),
        ("seed", "0", 0),
        ("split_seed", "7", 7),
        ("workers", "0", 0),
        ("memory_limit_gib", "0.5", 0.5),
    ],
)
def test_allowed_values(tmp_path: Path, key: str, written: str, read: object) -> None:
    assert getattr(load(tmp_path, with_values({key: written})), key) == read


# Values that are refused


@pytest.mark.parametrize(
    ("key", "written", "complaint"),
    [
        ("lr", "fast", "'fast' is not a number above 0"),
        ("lr", "0", "0 is not a number above 0"),
        ("lr", ".nan", "nan is not a number above 0"),
        ("lr", ".inf", "inf is not a number above 0"),
        ("lr", "1e999", "inf is not a number above 0"),
        ("lr", "true", "True is not a number above 0"),
        ("lr", "", "an empty value is not a number above 0"),
        ("lr", "'0.1'", "'0.1' is not a number above 0"),
        ("lr", "[0.1, 0.2]", "[0.1, 0.2] is not a number above 0"),
        ("epochs", "-1", "-1 is not a whole number above 0"),
        ("epochs", "0", "0 is not a whole number above 0"),
        ("epochs", "2.5", "2.5 is not a whole number above 0"),
        ("epochs", "1e1", "10.0 is not a whole number above 0"),
        ("epochs", "true", "True is not a whole number above 0"),
        ("batch_size", "0", "0 is not a whole number above 0"),
        ("accumulate_steps", "0", "0 is not a whole number above 0"),
        ("seed", "-1", "-1 is not a whole number from 0 to 4294967295"),
        ("split_seed", "", "an empty value is not a whole number from 0 to 4294967295"),
        ("seed", "4294967296", "4294967296 is not a whole number from 0 to 4294967295"),
        ("device", "gpu", "'gpu' is not auto, cpu, mps, cuda or cuda:<number>"),
        ("threads", "0", "0 is not auto or a whole number from 1 to 1024"),
        ("threads", "all", "'all' is not auto or a whole number from 1 to 1024"),
        ("launcher", "mpirun", "'mpirun' is not python, or a torchrun command line"),
        ("launcher", "python; rm x", "'python; rm x' is not python, or a torchrun command line"),
        ("val_size", "-5", "-5 is not a count of images (0 or more), or a fraction below 1"),
        ("val_size", "1.0", "1.0 is not a count of images (0 or more), or a fraction below 1"),
        ("val_size", ".nan", "nan is not a count of images (0 or more), or a fraction below 1"),
        ("val_size", "true", "True is not a count of images (0 or more), or a fraction below 1"),
        ("val_size", "many", "'many' is not a count of images (0 or more), or a fraction below 1"),
        ("shuffle", "1", "1 is not true or false"),
        ("optimizer", "SGD", "'SGD' is not one of sgd, adam, adamw, rmsprop"),
        ("momentum", "1.0", "1.0 is not a number from 0 to below 1"),
        ("weight_decay", "-0.1", "-0.1 is not a number, 0 or more"),
        ("schedule", "step", "'step' is not one of constant, linear, cosine, onecycle"),
        ("label_smoothing", "1", "1 is not a number from 0 to below 1"),
        ("target_transform", "onehot", "'onehot' is not one_hot, or empty"),
        (
            "augment",
            "[flop]",
            "['flop'] is not a list of any of crop, flip, vflip, erase, color, mixup, cutmix, resized_crop, "
            "rotate, trivial, randaugment",
        ),
        (
            "augment",
            "flip",
            "'flip' is not a list of any of crop, flip, vflip, erase, color, mixup, cutmix, resized_crop, "
            "rotate, trivial, randaugment",
        ),
        ("freeze", "[1, 2]", "[1, 2] is not a list of parameter-name patterns"),
        ("precision", "float64", "'float64' is not one of float32, tf32, bfloat16, float16"),
        ("deterministic", "1", "1 is not true or false"),
        ("compile", "inductor", "'inductor' is not true or false"),
        ("cuda_graphs", "auto", "'auto' is not true or false"),
        ("test_flip", "left", "'left' is not true or false"),
        ("image_size", "0", "0 is not a whole number of pixels from 1 to 4096, or [height, width], or empty"),
        (
            "image_size",
            "[1, 2, 3]",
            "[1, 2, 3] is not a whole number of pixels from 1 to 4096, or [height, width], or empty",
        ),
        ("stored_size", "256", "256 is not possible without image_size; set both"),
        ("group", "'('", "'(' is not a regular expression: missing ), unterminated subpattern at position 0"),
        ("folds", "1", "1 is not 0, or a number of folds from 2 to 100"),
        ("fold", "1", "1 is not 0, as folds is 0"),
        ("background", "red", "'red' is not white, black, or #rrggbb"),
        ("fit", "squeeze", "'squeeze' is not one of pad, crop, stretch"),
        ("intensity", "half", "'half' is not one of full, image"),
        ("on_bad_image", "go", "'go' is not one of stop, skip"),
        ("crop_scale", "0", "0 is not a number above 0, at most 1"),
        ("channels", "2", "2 is not 1, 3, or empty"),
        ("balance", "", "an empty value is not one of none, sampler, loss"),
        ("export_formats", "[]", "[] is not a list of at least one of pth, pt2, onnx, safetensors, int8"),
        ("weights", "''", "'' is not a weights file, a name of torchvision's weights, or empty"),
        ("experiment", "''", "'' is not a name, or empty"),
        ("memory_limit_gib", "0", "0 is not a number above 0"),
        ("batch_size", f"{2**31}", "2147483648 is not a whole number above 0"),
        (
            "data_path",
            "https://me:pass/w@rd@host/data",
            "'https://***@host/data' is not free of passwords, which Git, MLflow and the manifest would keep",
        ),
        ("registered_model", "a's", '"a\'s" is not a name without / and : and quotes, or empty'),
        ("workers", "-1", "-1 is not a whole number, 0 or more"),
    ],
)
def test_a_wrong_value_gets_one_line(tmp_path: Path, key: str, written: str, complaint: str) -> None:
    assert complaints(tmp_path, with_values({key: written})) == [f"{key}: {complaint}"]


@pytest.mark.parametrize(
    ("source", "data_path", "name"),
    [
        ("fashion_mnist", "data/own", "fashion-mnist"),
        ("folder", "photos.zip", "photos"),
        ("folder", "/data/my photos (1).ZIP", "my-photos-1"),
        ("folder", "../holiday 2.5/", "holiday-2.5"),
        ("folder", "data/own/Blüten", "Blüten"),
        ("folder", "a/b's, c@d", "b-s-c-d"),
        ("folder", "..", "data"),
    ],
)
def test_without_names_of_ones_own_mlflow_has_that_of_the_data(
    tmp_path: Path, source: str, data_path: str, name: str
) -> None:
    written = {"source": source, "data_path": f'"{data_path}"'}
    params = load(tmp_path, with_values(written))
    assert (params.experiment, params.registered_model) == (name, name)
    params = load(tmp_path, with_values(written | {"experiment": "mine"}))
    assert (params.experiment, params.registered_model) == ("mine", name)


def test_a_data_set_is_called_as_its_source_where_that_is_no_folder() -> None:
    assert data_name("my_digits", "data/own") == "my-digits"


@pytest.mark.parametrize(("key", "folder"), [("network", "networks"), ("source", "sources")])
@pytest.mark.parametrize("name", ["mpl", "__init__", "../params", ""])
def test_a_module_that_is_not_there(tmp_path: Path, key: str, folder: str, name: str) -> None:
    names = ", ".join(modules_in(folder))
    expected = f"{key}: {name!r} is not one of {names} (the modules in classifier/{folder})"
    assert complaints(tmp_path, with_values({key: f"'{name}'"})) == [expected]


def test_values_that_do_not_go_together(tmp_path: Path) -> None:
    text = with_values({"shuffle": "false", "balance": "sampler"})
    assert complaints(tmp_path, text) == [
        "balance: 'sampler' is not possible with shuffle: false; set shuffle: true, or balance: loss"
    ]


@pytest.mark.parametrize("stage", ["download", "annotate", "train", "evaluate", "export"])
def test_every_stage_checks_all_parameters_before_anything_else(stage: str) -> None:
    """So a wrong `augment` is told by annotate, if that is the first to run."""
    script = ast.parse((ROOT / f"stages/{stage}.py").read_text())
    (main,) = [node for node in script.body if isinstance(node, ast.FunctionDef) and node.name == "main"]
    assert ast.unparse(main.body[0]) == "params = load_params()"


# Keys


def test_a_misspelt_key_gets_one_line(tmp_path: Path) -> None:
    text = with_values({}).replace("\noptimizer:", "\noptimiser:")
    expected = "optimiser: 'sgd' is given, but there is no such key; did you mean optimizer?"
    assert complaints(tmp_path, text) == [expected]


def test_an_additional_key(tmp_path: Path) -> None:
    expected = "optimiser: 'adam' is given, but there is no such key; did you mean optimizer?"
    assert complaints(tmp_path, with_values({}) + "optimiser: adam\n") == [expected]
    (line,) = complaints(tmp_path, with_values({}) + "zzz: 1\n")
    assert line.startswith("zzz: 1 is given, but there is no such key; the keys are seed, device, ")


@pytest.mark.parametrize(("written", "shown"), [("1", "1"), ("yes", "True"), ("null", "None"), ("2.5", "2.5")])
def test_keys_that_are_not_text(tmp_path: Path, written: str, shown: str) -> None:
    (line,) = complaints(tmp_path, with_values({}) + f"{written}: 7\n")
    assert line.startswith(f"{shown}: 7 is given, but there is no such key")


@pytest.mark.parametrize("key", ["seed", "lr", "weights", "registered_model"])
def test_a_missing_key(tmp_path: Path, key: str) -> None:
    expected = f"{key}: missing; it must be {Params.model_fields[key].description}"
    assert complaints(tmp_path, without(key)) == [expected]


def test_several_mistakes_are_listed_together(tmp_path: Path) -> None:
    text = without("momentum").replace("\nlr: 0.001", "\nlr: fast").replace("\nschedule:", "\nshedule:")
    assert complaints(tmp_path, text + "surprise: 1\n") == [
        "lr: 'fast' is not a number above 0",
        "momentum: missing; it must be a number from 0 to below 1",
        "shedule: 'constant' is given, but there is no such key; did you mean schedule?",
        f"surprise: 1 is given, but there is no such key; the keys are {', '.join(Params.model_fields)}",
    ]


# Files


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "not a list of `key: value` lines"),
        ("# only a comment\n", "not a list of `key: value` lines"),
        ("- 1\n- 2\n", "not a list of `key: value` lines"),
        ("lr: [1\n", "not readable as YAML: "),
        ("lr: {\n\tx", "not readable as YAML: "),
        ("!!python/object/apply:os.getcwd []\n", "not readable as YAML: "),
        (
            "a: &a {x: 1}\nb:\n  <<: *a\n",
            'not readable as YAML: the key << is not supported in "<unicode string>", line 3, column 3',
        ),
        ("lr: !!bool x\n", "not readable as YAML: KeyError: 'x'"),
        ("experiment: 2026-13-01\n", "not readable as YAML: "),
        ("lr: \0\n", "not readable as YAML: "),
    ],
)
def test_a_file_that_holds_no_parameters(tmp_path: Path, text: str, complaint: str) -> None:
    (line,) = complaints(tmp_path, text)
    assert line.startswith(complaint)


def test_a_file_that_is_not_utf_8(tmp_path: Path) -> None:
    (tmp_path / "params.yaml").write_bytes(b"experiment: B\xe4r\n")
    with pytest.raises(PipelineError, match="not readable as YAML: 'utf-8' codec"):
        load_params(tmp_path / "params.yaml")


def test_a_folder(tmp_path: Path) -> None:
    with pytest.raises(PipelineError, match="a folder, not a file"):
        load_params(tmp_path)


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(PipelineError, match=r"params\.yaml: missing; run from the folder that holds dvc\.yaml"):
        load_params(tmp_path / "params.yaml")


# As a command


def test_the_command_is_silent_when_all_is_right(tmp_path: Path) -> None:
    (tmp_path / "params.yaml").write_text(COMMITTED, encoding="utf-8")
    done = run_module(tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.parametrize(
    ("text", "line"),
    [
        (with_values({"lr": "fast"}), "params.yaml: lr: 'fast' is not a number above 0"),
        (with_values({"epochs": "-1"}), "params.yaml: epochs: -1 is not a whole number above 0"),
        (
            with_values({}).replace("\noptimizer:", "\noptimiser:"),
            "params.yaml: optimiser: 'sgd' is given, but there is no such key; did you mean optimizer?",
        ),
        (
            with_values({"network": "mpl"}),
            f"params.yaml: network: 'mpl' is not one of {', '.join(modules_in('networks'))} "
            "(the modules in classifier/networks)",
        ),
        (None, "params.yaml: missing; run from the folder that holds dvc.yaml"),
    ],
    ids=["lr", "epochs", "optimiser", "network", "no file"],
)
def test_the_command_prints_one_line_and_fails(tmp_path: Path, text: str | None, line: str) -> None:
    if text is not None:
        (tmp_path / "params.yaml").write_text(text, encoding="utf-8")
    done = run_module(tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (1, "", line + "\n")
