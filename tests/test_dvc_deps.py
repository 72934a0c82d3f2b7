"""dvc.yaml against the code: what a stage imports and reads is what DVC watches; and the import rules."""

import ast
from typing import Any

import pytest
import yaml
from imports import ROOT, imported_names, project_file, project_files_behind

from classifier import files
from classifier.params import UNTRACKED, Params, modules_in

STAGES: dict[str, dict[str, Any]] = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]
MODULES = sorted(path.relative_to(ROOT).as_posix() for path in ROOT.glob("classifier/**/*.py"))

# Decide what MLflow and the user are told, and no result: editing them, or what only they import, must not retrain.
NO_RESULT = {"classifier/tracking.py", "classifier/progress.py"}
# Found by name at run time, so the import statements do not show them: dvc.yaml names them by parameter.
BY_NAME = {
    "classifier/sources/__init__.py": "classifier/sources/${source}.py",
    "classifier/networks/__init__.py": "classifier/networks/${network}.py",
}


def behind_source(name: str) -> set[str]:
    path = f"classifier/sources/{name}.py"
    return project_files_behind(path, NO_RESULT) - {path}


def has_code(path: str) -> bool:
    """Whether a file holds more than a docstring."""
    return any(not isinstance(node, ast.Expr) for node in ast.parse((ROOT / path).read_text()).body)


@pytest.mark.parametrize("stage", STAGES)
def test_every_module_a_stage_imports_is_among_its_deps(stage: str) -> None:
    code = {path for path in project_files_behind(f"stages/{stage}.py", NO_RESULT) if has_code(path)}
    if "classifier/sources/__init__.py" in code:  # and what any of the sources imports, which is not known by name
        code |= {path for name in modules_in("sources") for path in behind_source(name) if has_code(path)}
    code |= {BY_NAME[path] for path in code if path in BY_NAME}
    declared = {dep for dep in STAGES[stage]["deps"] if dep.endswith(".py")}
    assert declared == code


@pytest.mark.parametrize("name", [f"networks/{name}" for name in modules_in("networks")])
def test_a_network_imports_nothing_that_dvc_does_not_watch(name: str) -> None:
    watched = set(STAGES["train"]["deps"]) & set(STAGES["evaluate"]["deps"]) & set(STAGES["export"]["deps"])
    assert project_files_behind(f"classifier/{name}.py") - {f"classifier/{name}.py"} <= watched


@pytest.mark.parametrize("name", [f"sources/{name}" for name in modules_in("sources")])
def test_a_source_imports_nothing_that_dvc_does_not_watch(name: str) -> None:
    watched = set(STAGES["download"]["deps"]) & set(STAGES["annotate"]["deps"])
    assert behind_source(name.removeprefix("sources/")) <= watched


def parameters_read(stage: str) -> set[str]:
    """The keys of params.yaml that a stage script reads, itself or in a function that it hands `params` to."""
    script = ast.parse((ROOT / f"stages/{stage}.py").read_text())
    homes = {
        alias.name: path
        for node in ast.walk(script)
        if isinstance(node, ast.ImportFrom) and node.module and (path := project_file(node.module))
        for alias in node.names
    }
    read = attributes_of_params(script)
    for name in given_params(script) & homes.keys():
        module = ast.parse((ROOT / homes[name]).read_text())
        functions = {node.name: node for node in module.body if isinstance(node, ast.FunctionDef)}
        waiting = [name]
        while waiting:
            function = functions[waiting.pop()]
            read |= attributes_of_params(function)
            waiting += given_params(function) & functions.keys()
    return read & set(Params.model_fields)


def attributes_of_params(tree: ast.AST) -> set[str]:
    attributes = [node for node in ast.walk(tree) if isinstance(node, ast.Attribute)]
    return {node.attr for node in attributes if isinstance(node.value, ast.Name) and node.value.id == "params"}


def given_params(tree: ast.AST) -> set[str]:
    """The functions that are called with a variable `params`, also by `partial`."""
    names = set()
    for call in [node for node in ast.walk(tree) if isinstance(node, ast.Call)]:
        given = {
            node.id for node in (call.func, *call.args, *(k.value for k in call.keywords)) if isinstance(node, ast.Name)
        }
        names |= given - {"params"} if "params" in given else set()
    return names


@pytest.mark.parametrize("stage", ["download", "annotate", "train", "evaluate"])
def test_the_params_of_a_stage_are_those_it_reads(stage: str) -> None:
    # val_size and the like reach a later stage through the files of an earlier one
    read = parameters_read(stage) | ({"launcher"} if stage == "train" else set())  # by stages/__init__.py
    assert set(STAGES[stage]["params"]) == read - UNTRACKED


def test_no_parameter_is_part_of_a_command() -> None:
    """A shell would run what it says."""
    assert {name: stage["cmd"] for name, stage in STAGES.items()} == {
        name: f"python -m stages.{name}" for name in STAGES
    }


@pytest.mark.parametrize("stage", ["check", "export"])
def test_the_check_and_the_manifest_are_of_all_params_that_decide_results(stage: str) -> None:
    assert set(STAGES[stage]["params"]) == set(Params.model_fields) - UNTRACKED


def test_every_stage_waits_for_the_check() -> None:
    assert str(files.CHECKED) in STAGES["download"]["deps"]
    made = {out for stage in STAGES.values() for out in stage["outs"]}
    assert all(made & set(STAGES[name]["deps"]) for name in STAGES if name != "check")


def test_outputs_are_the_files_of_the_contract() -> None:
    written = []
    for stage in STAGES.values():
        for out in [*stage["outs"], *stage.get("metrics", [])]:
            written.append(out if isinstance(out, str) else next(iter(out)))
    assert sorted(written) == sorted(
        str(path)
        for path in (
            files.CHECKED, files.RAW, files.IMAGES, files.ANNOTATIONS, files.ORIGINALS, files.WEIGHTS, files.EPOCHS,
            files.TRAIN_METRICS, files.ENVIRONMENT, files.CLASS_METRICS, files.PREDICTIONS, files.PLOTS,
            files.TEST_METRICS, files.EXPORT,
        )
    )  # fmt: skip


def test_metrics_stay_in_git_and_other_outputs_in_the_cache() -> None:
    for stage in STAGES.values():
        assert all(isinstance(out, str) for out in stage["outs"])
        assert all(options == {"cache": False} for metric in stage.get("metrics", []) for options in metric.values())


@pytest.mark.parametrize(
    ("package", "only"),
    [
        ("mlflow", {"store", "sync", "registry", "serving"}),
        ("matplotlib", {"plots", "charts"}),
        ("dvc", {"storage", "experiment_queue"}),
        ("typer", {"cli"}),
    ],
)
def test_few_modules_import_what_the_others_do_without(package: str, only: set[str]) -> None:
    importers = {path for path in MODULES if any(n.split(".")[0] == package for n in imported_names(ROOT / path))}
    stage_importers = [stage for stage in STAGES if package in imported_names(ROOT / f"stages/{stage}.py")]
    assert importers == {f"classifier/{name}.py" for name in only}
    assert not stage_importers


def test_imports_go_one_way() -> None:
    for path in MODULES:
        assert not any(name.split(".")[0] == "stages" for name in imported_names(ROOT / path)), path
    for stage in STAGES:
        assert not any(name.split(".")[0] == "stages" for name in imported_names(ROOT / f"stages/{stage}.py")), stage


@pytest.mark.parametrize("stage", ["check", "download", "annotate"])
def test_a_stage_without_a_network_does_not_wait_for_torch_or_mlflow(stage: str) -> None:
    paths = project_files_behind(f"stages/{stage}.py") | {"classifier/sources/fashion_mnist.py"}
    packages = {name.split(".")[0] for path in paths for name in imported_names(ROOT / path)}
    assert not packages & {"torch", "torchvision", "mlflow", "matplotlib"}
