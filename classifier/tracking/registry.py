"""MLflow's model registry: a version for each export, and the alias `champion` on the best of them."""

import io
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import pandas as pd

from classifier.evaluation.metrics import mcnemar
from classifier.pipeline.errors import PipelineError
from classifier.pipeline.outputs import read_json
from classifier.tracking.store import (
    EXCHANGE_SECONDS,
    SEARCH_SECONDS,
    artifact,
    find_runs,
    open_store,
    store_errors,
    time_limit,
)
from classifier.tracking.tracker import TEST_SET_TAG

# isort: split
# After classifier.tracking.store, which sets what is read when mlflow is imported
import mlflow
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient

CHAMPION = "champion"
EXPORT_TAG = "export"
ABSENT = "RESOURCE_DOES_NOT_EXIST"  # as opposed to a store that cannot be asked
SIGNIFICANCE_LEVEL = 0.05  # a difference that noise alone makes more often than this is not told apart from noise


@dataclass(frozen=True)
class Version:
    """A version of a registered model, and the run whose network it is."""

    name: str
    number: int
    run_id: str
    aliases: list[str]

    def __str__(self) -> str:
        return f"{self.name} version {self.number}"


def register(run_id: str, registered_model: str, onnx: Path, manifest: Path, export: str) -> None:
    """Log the exported network to a run and register it as a new version of `registered_model`.

    The version gives class names and probabilities for images: classifier/tracking/pyfunc_model.py says how. The
    SHA-256 of each file in the manifest becomes a tag, by which `find_versions` finds the version of a file.
    export: a name for this export; it is registered once.
    """
    package = Path(__file__).parent.parent
    client = MlflowClient()
    if client.search_model_versions(f"name = '{registered_model}' and tags.`{EXPORT_TAG}` = '{export}'"):
        return
    packages = ("mlflow", "numpy", "onnxruntime", "pandas", "pillow")
    with mlflow.start_run(run_id) as run:
        for partial in client.search_logged_models([run.info.experiment_id], f"tags.`{EXPORT_TAG}` = '{export}'"):
            client.delete_logged_model(partial.model_id)  # logged by a process that was killed before it was registered
        logged = mlflow.pyfunc.log_model(
            name="model",
            python_model=str(package / "tracking/pyfunc_model.py"),
            artifacts={"model": str(onnx), "manifest": str(manifest), "decoding": str(package / "data/decoding.py")},
            pip_requirements=[f"{package}=={version(package)}" for package in packages],  # finding out takes seconds
            tags={EXPORT_TAG: export},
        )
    hashes = {f"sha256.{name}": file["sha256"] for name, file in read_json(manifest)["files"].items()}
    with redirect_stderr(io.StringIO()):  # on which it tells that it was done
        mlflow.register_model(logged.model_uri, registered_model, tags=hashes | {EXPORT_TAG: export})


def find_versions(filter_string: str) -> list[Version]:
    """The versions that MLflow's filter lets through, the newest first; none where there is no store."""
    if not open_store():
        return []
    with store_errors(), time_limit(SEARCH_SECONDS):
        client = MlflowClient()
        found = client.search_model_versions(filter_string, order_by=["version_number DESC"])
        # A search does not give the aliases.
        return [_version(client.get_model_version(version.name, version.version)) for version in found]


def find_champion(name: str) -> Version | None:
    """The version of a registered model that has the alias, if one has."""
    if not open_store():
        return None
    with store_errors(), time_limit(EXCHANGE_SECONDS):
        try:
            number = MlflowClient().get_registered_model(name).aliases.get(CHAMPION)
        except MlflowException as error:
            if error.error_code != ABSENT:
                raise
            return None
    return find_version(name, number) if number else None


def find_version(name: str, number: str) -> Version | None:
    """A version by its number, if there is one."""
    if not open_store():
        return None
    with store_errors(), time_limit(EXCHANGE_SECONDS):
        try:
            return _version(MlflowClient().get_model_version(name, number))
        except MlflowException as error:
            if error.error_code != ABSENT:
                raise
            return None


def version_called(name: str, versions: list[Version], target: str) -> Version:
    """Return the newest of a target's versions that has the name which `registered_model` says.

    Raises PipelineError if there is none, with the way to register one.
    """
    if found := [version for version in versions if version.name == name]:
        return max(found, key=lambda version: version.number)
    others = ", ".join(dict.fromkeys(version.name for version in versions))
    known = f"{target}: registered as {others}, and not as registered_model in params.yaml says: {name}"
    raise PipelineError(
        f"{known if others else f'{target}: not registered as {name}'}; to register the model in models/ so:\n"
        "dvc repro --force --single-item export"
    )


@contextmanager
def exported_files(version: Version) -> Iterator[Path]:
    """A folder with local copies of model.onnx and manifest.json of a version, for as long as the block lasts.

    Raises PipelineError if the store does not have them any more.
    """
    with tempfile.TemporaryDirectory() as folder:
        with store_errors():
            uri = f"models:/{version.name}/{version.number}/artifacts"
            files = mlflow.artifacts.download_artifacts(artifact_uri=uri, dst_path=folder)
        yield Path(files)


def promote(candidate: Version, force: bool = False) -> str:
    """Give the alias `champion` to the candidate if it is more accurate than the present one; return what was done.

    Both must have been evaluated on the same test data. The difference is tested on the images that only one of the
    two classifies rightly (McNemar's exact test). Raises PipelineError, and leaves the alias, if the candidate is not
    better, is better by what may be noise, or is not comparable; `force` moves it all the same.
    """
    champion = find_champion(candidate.name)
    new = Evaluation.of(candidate)
    if champion is None:
        text = f"{candidate} is the first champion: accuracy {new.accuracy:.4f} on {len(new.correct)} test images"
    elif champion.number == candidate.number:
        return f"{candidate} is the champion already: accuracy {new.accuracy:.4f}"
    else:
        try:
            old = Evaluation.of(champion)
        except PipelineError as gone:
            if not force:
                raise
            text = f"{gone}\n{candidate} is the champion by force: accuracy {new.accuracy:.4f}"
        else:
            text = _compared(candidate, new, champion, old, force)
    with store_errors():
        MlflowClient().set_registered_model_alias(candidate.name, CHAMPION, str(candidate.number))
    return text


@dataclass(frozen=True)
class Evaluation:
    """What `evaluate` found out about a version.

    test_set: md5 of the test images and labels, as `CustomImageDataset.md5` gives it.
    correct: (N,) bool, which of them it classifies rightly, in the order of test.csv.
    """

    test_set: str
    correct: pd.Series

    @property
    def accuracy(self) -> float:
        return float(self.correct.mean())

    @classmethod
    def of(cls, version: Version) -> "Evaluation":
        """Read from the run of a version. Raises PipelineError if it was not evaluated."""
        for run in find_runs(f"attributes.run_id = '{version.run_id}' and tags.`{TEST_SET_TAG}` != ''"):
            with artifact(run.run_id, "plots/confusion.csv") as path:
                if path:
                    answers = pd.read_csv(path, dtype=str, keep_default_na=False)
                    return cls(run.tags[TEST_SET_TAG], answers.actual == answers.predicted)
        raise PipelineError(
            f"{version}: its run {version.run_id} holds no evaluation; to log one:\n"
            "dvc repro --force --single-item evaluate"
        )


def _compared(candidate: Version, new: Evaluation, champion: Version, old: Evaluation, force: bool) -> str:
    if new.test_set != old.test_set:
        text = f"{candidate} was tested on other images than the champion, version {champion.number}"
        if not force:
            raise PipelineError(f"{text}: not promoted.\nEvaluate both on the same test data, or give --force.")
        return f"{text}; champion by force, accuracy {new.accuracy:.4f}"
    gained = int((new.correct & ~old.correct).sum())
    lost = int((old.correct & ~new.correct).sum())
    p_value = mcnemar(gained, lost)
    is_told_apart = p_value < SIGNIFICANCE_LEVEL
    verdict = "more than noise" if is_told_apart else "may be noise"
    text = (
        f"{candidate}: accuracy {new.accuracy:.4f}; champion, version {champion.number}: {old.accuracy:.4f}\n"
        f"Of {len(new.correct)} test images, only the candidate is right on {gained} and only the champion on {lost}: "
        f"{verdict} (McNemar's exact test, p = {p_value:.2g})"
    )
    is_better = new.accuracy > old.accuracy
    if is_better and is_told_apart:
        return f"{text}\nVersion {candidate.number} is the champion now."
    reason = "Better, by what may be noise" if is_better else "Not better"
    if force:
        return f"{text}\n{reason}, but champion by force now."
    raise PipelineError(f"{text}\n{reason}: version {champion.number} stays champion. --force moves it all the same.")


def _version(found: ModelVersion) -> Version:
    return Version(found.name, int(found.version), found.run_id or "", list(found.aliases))
