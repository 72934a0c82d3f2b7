"""Files that were changed behind the pipeline's back, and files that were made to do harm."""

import ast
import pickle
import re
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest
import torch
import yaml
from hostile import RunsCodeWhenUnpickled
from imports import ROOT
from project import Project, reproduced_project

from classifier.data.lockfile import locked_md5s, verified
from classifier.pipeline.errors import PipelineError
from classifier.pipeline.outputs import hash_file, hash_path
from classifier.pipeline.paths import LOCK

# By output: the stages that read it
READERS = {
    "data/raw": ["annotate"],
    "data/images": ["train", "evaluate", "export"],
    "data/annotations": ["train", "evaluate", "export"],
    "models/model_weights.pth": ["evaluate", "export"],
}
CHANGED = {  # a file of each
    "data/raw": "data/raw/t10k-images-idx3-ubyte",
    "data/images": "data/images/images-00000.npy",
    "data/annotations": "data/annotations/train.csv",
    "models/model_weights.pth": "models/model_weights.pth",
}


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """A project in which `dvc repro` ran. Tests leave it as it is."""
    return reproduced_project(tmp_path_factory, export_formats="[pth]")


@pytest.fixture
def copied(reference: Project, tmp_path: Path) -> Project:
    return reference.copy(tmp_path / "project")


def change_a_byte(path: Path) -> None:
    """Change a byte in the middle, in a file of its own: DVC may have made it a link into its cache."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.unlink()
    path.write_bytes(content)


def stage(project: Project, name: str) -> subprocess.CompletedProcess[str]:
    return project.run(sys.executable, "-m", "stages", name, check=False)


def complaint(output: str) -> str:
    return f"{output}: changed since the stage that wrote it; `dvc checkout --force {output}` brings back what was "


# `verified`, which every stage calls on what it reads


@pytest.fixture
def locked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The weights of a folder whose dvc.lock knows them."""
    monkeypatch.chdir(tmp_path)
    weights = Path("models/model_weights.pth")
    weights.parent.mkdir()
    weights.write_text("weights")
    out = {"path": str(weights), "md5": hash_file(weights)}
    Path("dvc.lock").write_text(yaml.safe_dump({"stages": {"train": {"outs": [out]}}}))
    return weights


def test_what_is_as_dvc_lock_says_is_given_back(locked: Path) -> None:
    assert verified(locked, locked_md5s(LOCK)) == locked


def test_a_change_is_told_with_the_way_back(locked: Path) -> None:
    change_a_byte(locked)
    with pytest.raises(PipelineError, match=re.escape(complaint(str(locked)))):
        verified(locked, locked_md5s(LOCK))


@pytest.mark.parametrize("lock", [None, "", "schema: '2.0'\n", "stages:\n  train:\n    cmd: python -m stages train\n"])
def test_what_never_ran_through_dvc_is_taken_as_it_is(locked: Path, lock: str | None) -> None:
    if lock is None:
        Path("dvc.lock").unlink()
    else:
        Path("dvc.lock").write_text(lock)
    change_a_byte(locked)
    assert verified(locked, locked_md5s(LOCK)) == locked


def test_what_is_missing_is_not_called_changed(locked: Path) -> None:
    locked.unlink()
    with pytest.raises(PipelineError, match="missing; `dvc repro` makes it"):
        verified(locked, locked_md5s(LOCK))


@pytest.mark.parametrize("change", ["a byte", "a name", "one more", "one less"])
def test_every_change_of_a_folder_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str) -> None:
    monkeypatch.chdir(tmp_path)
    folder = Path("data/annotations")
    folder.mkdir(parents=True)
    for name in ("train.csv", "val.csv"):
        (folder / name).write_text(name)
    out = {"path": str(folder), "md5": hash_path(folder)}
    Path("dvc.lock").write_text(yaml.safe_dump({"stages": {"annotate": {"outs": [out]}}}))
    assert verified(folder, locked_md5s(LOCK)) == folder
    if change == "a byte":
        change_a_byte(folder / "val.csv")
    elif change == "a name":
        (folder / "val.csv").rename(folder / "test.csv")
    elif change == "one more":
        (folder / "test.csv").touch()
    else:
        (folder / "val.csv").unlink()
    with pytest.raises(PipelineError, match=re.escape(complaint(str(folder)))):
        verified(folder, locked_md5s(LOCK))


# After a complete run


@pytest.mark.slow
@pytest.mark.parametrize("output", READERS)
def test_a_changed_byte_is_refused_by_all_that_read_it_and_comes_back(
    copied: Project, reference: Project, output: str
) -> None:
    change_a_byte(copied.root / CHANGED[output])
    changed = copied.outputs()
    for name in READERS[output]:
        done = stage(copied, name)
        assert done.returncode == 1
        assert done.stderr.startswith(complaint(output))
        assert len(done.stderr.splitlines()) == 1
        assert copied.outputs() == changed

    copied.dvc("checkout", "--force", output)  # as the message says
    assert copied.outputs() == reference.outputs()
    assert copied.dvc("status").stdout.strip() == "Data and pipelines are up to date."


@pytest.mark.slow
@pytest.mark.parametrize("output", READERS)
def test_dvc_hands_the_message_on_and_its_repro_mends_the_change(
    copied: Project, reference: Project, output: str
) -> None:
    change_a_byte(copied.root / CHANGED[output])
    done = copied.dvc("repro", "--single-item", READERS[output][0], check=False)
    assert done.returncode != 0
    assert complaint(output) in done.stderr
    assert "Traceback" not in done.stderr

    copied.dvc("repro")
    assert copied.outputs() == reference.outputs()
    assert copied.dvc("status").stdout.strip() == "Data and pipelines are up to date."


@pytest.mark.slow
@pytest.mark.parametrize("link", ["hardlink", "symlink"])
def test_a_changed_link_into_the_cache_comes_back(copied: Project, reference: Project, link: str) -> None:
    copied.dvc("config", "--local", "cache.type", link)
    copied.dvc("checkout", "--relink")
    weights = copied.root / "models/model_weights.pth"
    assert weights.is_symlink() if link == "symlink" else weights.stat().st_nlink > 1
    assert stage(copied, "evaluate").returncode == 0
    change_a_byte(weights)
    assert stage(copied, "evaluate").stderr.startswith(complaint("models/model_weights.pth"))
    copied.dvc("checkout", "--force", "models/model_weights.pth")
    assert copied.outputs() == reference.outputs()


# Weights that are code


def write_hostile_weights(path: Path, ran: Path, kind: str) -> None:
    """Weights that make the folder `ran` when they are unpickled."""
    hostile = RunsCodeWhenUnpickled(ran)
    if kind == "torch":
        torch.save({"linear_relu_stack.0.weight": hostile}, path)
    elif kind == "old torch":
        torch.save(hostile, path, _use_new_zipfile_serialization=False)
    else:
        path.write_bytes(pickle.dumps(hostile))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["torch", "old torch", "pickle"])
@pytest.mark.parametrize("place", ["weights", "models/model_weights.pth"])
def test_weights_that_are_code_are_refused_and_not_run(copied: Project, tmp_path: Path, kind: str, place: str) -> None:
    ran = tmp_path / "ran"
    if place == "weights":
        path, name = tmp_path / "pretrained.pth", str(tmp_path / "pretrained.pth")
        copied.set_params(weights=name)
    else:
        path, name = copied.root / place, place
    known = hash_file(copied.root / "models/model_weights.pth")
    write_hostile_weights(path, ran, kind)
    lock = copied.root / "dvc.lock"
    lock.write_text(lock.read_text().replace(known, hash_file(copied.root / "models/model_weights.pth")))
    for reader in ["train"] if place == "weights" else READERS[place][:1]:
        done = stage(copied, reader)
        assert done.returncode == 1
        (line,) = [line for line in done.stderr.splitlines() if not line.startswith("MLflow does not have")]
        assert line.startswith(f"weights: {name} cannot be read; it must be a complete file that holds only tensors")
    assert not ran.exists()
    with suppress(RuntimeError):  # afterwards, of a plain pickle
        torch.load(path, weights_only=False)  # it would have run
    assert ran.exists()


# Where the code may read pickles: exchange.read_logits, of what the export has just written, in a process of its own
SAFE_LOADERS = ("yaml.SafeLoader", "_FastLoader if is_flat else _Loader")
READS_PICKLES = {("classifier/export/formats.py", "torch.load"), ("classifier/export/formats.py", "torch.export.load")}
UNSAFE_MODULES = {"pickle", "cloudpickle", "dill", "joblib", "shelve", "marshal"}


def unsafe_reads(path: str, source: str) -> set[tuple[str, str]]:
    """The file's calls that may run code from what they read, and its imports of modules that do, by the file."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            found |= {(path, name) for name in names if name.split(".")[0] in UNSAFE_MODULES}
            if isinstance(node, ast.ImportFrom) and names[0].split(".")[0] in ("torch", "numpy", "yaml"):
                found |= {(path, f"{names[0]}.load") for alias in node.names if "load" in alias.name}
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        options = {option.arg: ast.unparse(option.value) for option in node.keywords}
        if (
            (called in ("torch.load", "torch.hub.load_state_dict_from_url") and options.get("weights_only") != "True")
            or called in ("torch.export.load", "torch.jit.load", "torch.package.PackageImporter", "eval", "exec")
            or (called in ("np.load", "numpy.load") and options.get("allow_pickle", "False") != "False")
            or called in ("pd.read_pickle", "yaml.unsafe_load", "yaml.full_load")
            or (called == "yaml.load" and options.get("Loader") not in SAFE_LOADERS)
        ):
            found.add((path, called))
    return found


def test_no_other_place_in_the_code_reads_pickles() -> None:
    found = set()
    for folder in ("classifier", "stages"):
        for path in (ROOT / folder).rglob("*.py"):
            found |= unsafe_reads(path.relative_to(ROOT).as_posix(), path.read_text(encoding="utf-8"))
    assert found == READS_PICKLES


@pytest.mark.parametrize(
    "source",
    [
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "torch.load(path, weights_only=trusted)",
        "from torch import load",
        "import pickle",
        "from joblib import load",
        "np.load(path, allow_pickle=True)",
        "yaml.load(text, Loader=yaml.Loader)",
    ],
)
def test_a_new_one_would_be_found(source: str) -> None:
    assert unsafe_reads("new.py", source)


def test_the_loader_of_yaml_makes_no_objects(tmp_path: Path) -> None:
    from classifier.pipeline.safe_yaml import read_yaml

    with pytest.raises(yaml.YAMLError, match="could not determine a constructor"):
        read_yaml(f"lr: !!python/object/apply:os.mkdir [{tmp_path / 'ran'}]")
    assert not (tmp_path / "ran").exists()


# Names that lead elsewhere


@pytest.mark.slow
@pytest.mark.parametrize(
    "names", [["../../../../../../etc/passwd", "/etc/passwd"], ["a\x1b[2J.png", "..\\\\..\\\\/../secret"]]
)
def test_names_in_the_annotations_that_lead_out_of_the_folder_are_refused(copied: Project, names: list[str]) -> None:
    """Although images are read by row: the names reach tables, pictures and terminals."""
    (copied.root / "dvc.lock").unlink()  # the annotations are the user's
    csv = copied.root / "data/annotations/train.csv"
    header, *rows = csv.read_text().splitlines()
    csv.write_text("\n".join([header, *(f"{name},0,{row}" for row, name in enumerate(names)), *rows]) + "\n")
    before = copied.outputs()
    done = stage(copied, "train")
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    faults = done.stderr.splitlines()
    assert faults[0] == "data/annotations/train.csv: 2 faults:"
    for row in range(2, 4):
        assert faults[row - 1].startswith(f"  row {row}: ")
    assert copied.outputs() == before
