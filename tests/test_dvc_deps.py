"""dvc.yaml against the code: what a stage imports and reads is what DVC watches; and the import rules."""

import ast
import inspect
import textwrap
from pathlib import Path
from typing import Any

import pytest
import yaml
from imports import ROOT, imported_names, project_file, project_files_behind

from classifier.pipeline import paths
from classifier.pipeline.params import UNTRACKED, Params, modules_in
from stages import runner

STAGES: dict[str, dict[str, Any]] = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]
NETWORKS = "classifier/networks"
MODULES = sorted(path.relative_to(ROOT).as_posix() for path in ROOT.glob("classifier/**/*.py"))

# Upper packages import lower ones; a package stands above those behind it.
LAYERS = (
    "cli", "provenance", "tracking", "export", "evaluation", "training", "networks", "preparation", "data", "sources",
    "compute", "pipeline", "progress",
)  # fmt: skip
# Decide what MLflow and the user are told, and no result: editing them, or what only they import, must not retrain.
NO_RESULT = {"classifier/progress.py", *(path for path in MODULES if path.startswith("classifier/tracking/"))}
# Found by name at run time, so the import statements do not show them: dvc.yaml names them by parameter.
BY_NAME = {
    "classifier/sources/__init__.py": "classifier/sources/${source}.py",
    "classifier/networks/__init__.py": "classifier/networks/${network}.py",
}


def behind_source(name: str) -> set[str]:
    path = f"classifier/sources/{name}.py"
    return project_files_behind(path, NO_RESULT) - {path}


def is_code(path: str) -> bool:
    """Whether a file holds more than a docstring."""
    return any(not isinstance(node, ast.Expr) for node in ast.parse((ROOT / path).read_text()).body)


def code_behind(stage: str) -> set[str]:
    """The files of code that a stage imports, directly or not."""
    code = project_files_behind(f"stages/{stage}.py", NO_RESULT)
    if "classifier/sources/__init__.py" in code:  # and what any of the sources imports, which is not known by name
        code |= {path for name in modules_in("sources") for path in behind_source(name)}
    return {path for path in code if is_code(path)} | {BY_NAME[path] for path in code if path in BY_NAME}


def declared_code(stage: str) -> set[str]:
    """The files and packages of code among the deps of a stage."""
    return {dep for dep in STAGES[stage]["deps"] if dep.startswith(("classifier/", "stages/"))}


def watched(stage: str, path: str) -> bool:
    """Whether DVC runs a stage again when a file of code changes."""
    return not declared_code(stage).isdisjoint([path, *(str(folder) for folder in Path(path).parents)])


@pytest.mark.parametrize("stage", STAGES)
def test_the_code_a_stage_imports_is_among_its_deps_and_no_other_package(stage: str) -> None:
    code = code_behind(stage)
    assert {path for path in code if not watched(stage, path)} == set()
    used = code | {str(Path(path).parent) for path in code}
    assert declared_code(stage) <= used


@pytest.mark.parametrize("stage", ["download", "train"])
def test_an_edit_of_code_that_they_do_not_use_reruns_neither_download_nor_train(stage: str) -> None:
    """They take longest; the other stages may run again for a little more than they import."""
    modules = [path for path in MODULES if is_code(path) and not path.startswith(("classifier/sources", NETWORKS))]
    beside = set() if stage == "download" else {"classifier/compute/launch.py"}  # which starts it
    assert {path for path in modules if watched(stage, path)} <= code_behind(stage) | beside


@pytest.mark.parametrize("name", modules_in("networks"))
def test_a_network_imports_nothing_that_dvc_does_not_watch(name: str) -> None:
    path = f"classifier/networks/{name}.py"
    for stage in ("train", "evaluate", "export"):
        assert {
            file for file in project_files_behind(path) - {path} if is_code(file) and not watched(stage, file)
        } == set()


@pytest.mark.parametrize("name", modules_in("sources"))
def test_a_source_imports_nothing_that_dvc_does_not_watch(name: str) -> None:
    for stage in ("download", "annotate"):
        assert {path for path in behind_source(name) if is_code(path) and not watched(stage, path)} == set()


def test_packages_import_only_those_below_them() -> None:
    for path in MODULES:
        if len(Path(path).parts) > 2:
            layer = LAYERS.index(Path(path).parts[1])
            for name in imported_names(ROOT / path):
                _, _, rest = name.partition("classifier.")
                if rest:
                    assert LAYERS.index(rest.split(".")[0]) >= layer, f"{path} imports {name}"


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
    return {field for name in read for field in fields_of(name)}


def fields_of(name: str) -> set[str]:
    """The fields that an attribute of Params is, or that a property of it reads."""
    if not isinstance(getattr(Params, name, None), property):
        return {name} & set(Params.model_fields)
    source = textwrap.dedent(inspect.getsource(getattr(Params, name).fget))
    attributes = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Attribute)]
    inner = {node.attr for node in attributes if isinstance(node.value, ast.Name) and node.value.id == "self"}
    return {field for attribute in inner for field in fields_of(attribute)}


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
    read = parameters_read(stage) | ({"launcher"} if stage == "train" else set())  # by stages/runner.py
    assert set(STAGES[stage]["params"]) == read - UNTRACKED


def test_no_parameter_is_part_of_a_command() -> None:
    """A shell would run what it says."""
    assert {name: stage["cmd"] for name, stage in STAGES.items()} == {
        name: f"python -m stages {name}" for name in STAGES
    }


def test_python_m_stages_runs_the_stages_of_dvc_yaml() -> None:
    modules = {path.stem for path in (ROOT / "stages").glob("*.py")} - {"__init__", "__main__", "runner"}
    assert tuple(STAGES) == runner.STAGES
    assert set(STAGES) == modules


@pytest.mark.parametrize("stage", ["check", "export"])
def test_the_check_and_the_manifest_are_of_all_params_that_decide_results(stage: str) -> None:
    assert set(STAGES[stage]["params"]) == set(Params.model_fields) - UNTRACKED


def test_every_stage_waits_for_the_check() -> None:
    assert str(paths.CHECKED) in STAGES["download"]["deps"]
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
            paths.CHECKED, paths.RAW, paths.IMAGES, paths.ANNOTATIONS, paths.REJECTED, paths.WEIGHTS, paths.EPOCHS,
            paths.TRAIN_METRICS, paths.ENVIRONMENT, paths.CLASS_METRICS, paths.PREDICTIONS, paths.PLOTS,
            paths.TEST_METRICS, paths.EXPORT,
        )
    )  # fmt: skip


def test_metrics_stay_in_git_and_other_outputs_in_the_cache() -> None:
    for stage in STAGES.values():
        assert all(isinstance(out, str) for out in stage["outs"])
        assert all(options == {"cache": False} for metric in stage.get("metrics", []) for options in metric.values())


@pytest.mark.parametrize(
    ("package", "only"),
    [
        ("mlflow", {"tracking/store", "tracking/sender", "tracking/registry", "tracking/pyfunc_model"}),
        ("matplotlib", {"evaluation/plots", "cli/charts"}),
        ("dvc", {"provenance/storage", "cli/experiment_queue"}),
        ("typer", {"cli/app"}),
    ],
)
def test_few_modules_import_what_the_others_do_without(package: str, only: set[str]) -> None:
    importers = {path for path in MODULES if any(n.split(".")[0] == package for n in imported_names(ROOT / path))}
    stage_importers = [stage for stage in STAGES if package in imported_names(ROOT / f"stages/{stage}.py")]
    assert importers == {f"classifier/{name}.py" for name in only}
    assert not stage_importers


@pytest.mark.parametrize("name", ["sender", "registry"])
def test_mlflow_is_imported_after_what_it_reads_is_set(name: str) -> None:
    """Such as that it sends no telemetry: tracking/store.py sets that before its own import of MLflow."""
    names = [
        node.module or "" if isinstance(node, ast.ImportFrom) else node.names[0].name
        for node in ast.parse((ROOT / f"classifier/tracking/{name}.py").read_text()).body
        if isinstance(node, ast.Import | ast.ImportFrom)
    ]
    first = next(index for index, module in enumerate(names) if module.split(".")[0] == "mlflow")
    assert {"classifier.tracking", "classifier.tracking.store"} & set(names[:first])


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
