"""MLflow's model registry: each export is a version, and the best one has the alias `champion`."""

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
# After classifier.tracking.store, which sets the variables that MLflow reads when it is imported
import mlflow
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient

CHAMPION = "champion"
EXPORT_TAG = "export"
ABSENT = "RESOURCE_DOES_NOT_EXIST"  # MLflow's error code for a missing model or version
SIGNIFICANCE_LEVEL = 0.05  # of McNemar's test


@dataclass(frozen=True)
class Version:
    """A version of a registered model; run_id is the run that trained it."""

    name: str
    number: int
    run_id: str
    aliases: list[str]

    def __str__(self) -> str:
        return f"{self.name} version {self.number}"


def register(run_id: str, registered_model: str, onnx: Path, manifest: Path, export: str) -> None:
    """Log the exported network to a run and register it as a new version of `registered_model`.

    classifier/tracking/pyfunc_model.py is the registered model. The SHA-256 of each file in the manifest becomes a tag,
    so that `find_versions` can find the version of a file.
    export: name of this export; the same name is registered only once.
    """
    package = Path(__file__).parent.parent
    client = MlflowClient()
    if client.search_model_versions(f"name = '{registered_model}' and tags.`{EXPORT_TAG}` = '{export}'"):
        return
    packages = ("mlflow", "numpy", "onnxruntime", "pandas", "pillow", "pi-heif")
    with mlflow.start_run(run_id) as run:
        for partial in client.search_logged_models([run.info.experiment_id], f"tags.`{EXPORT_TAG}` = '{export}'"):
            client.delete_logged_model(partial.model_id)  # the process that logged it was killed before registering it
        logged = mlflow.pyfunc.log_model(
            name="model",
            python_model=str(package / "tracking/pyfunc_model.py"),
            artifacts={"model": str(onnx), "manifest": str(manifest), "decoding": str(package / "data/decoding.py")},
            pip_requirements=[
                f"{package}=={version(package)}" for package in packages
            ],  # MLflow's own detection takes seconds
            tags={EXPORT_TAG: export},
        )
    hashes = {f"sha256.{name}": file["sha256"] for name, file in read_json(manifest)["files"].items()}
    with redirect_stderr(io.StringIO()):  # MLflow reports success on standard error
        mlflow.register_model(logged.model_uri, registered_model, tags=hashes | {EXPORT_TAG: export})


def find_versions(filter_string: str) -> list[Version]:
    """Return the versions that match MLflow's filter, newest first; none if there is no store.

    Raises PipelineError if the store cannot be read.
    """
    if not open_store():
        return []
    with store_errors(), time_limit(SEARCH_SECONDS):
        client = MlflowClient()
        found = client.search_model_versions(filter_string, order_by=["version_number DESC"])
        # Search results have no aliases.
        return [_version(client.get_model_version(version.name, version.version)) for version in found]


def find_champion(name: str) -> Version | None:
    """Return the version with the alias `champion`, or None.

    Raises PipelineError if the store cannot be read.
    """
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
    """Return the version with this number, or None. Raises PipelineError if the store cannot be read."""
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
    """Return the newest of a target's versions that is registered as `name`.

    target: what the user asked for, for the message.
    Raises PipelineError, with the command that registers a version, if there is none.
    """
    if found := [version for version in versions if version.name == name]:
        return max(found, key=lambda version: version.number)
    others = ", ".join(dict.fromkeys(version.name for version in versions))
    known = f"{target}: registered as {others}, not as {name} (registered_model in params.yaml)"
    raise PipelineError(
        f"{known if others else f'{target}: not registered as {name}'}; to register the model in models/:\n"
        "dvc repro --force --single-item export"
    )


@contextmanager
def exported_files(version: Version) -> Iterator[Path]:
    """Yield a temporary folder with model.onnx and manifest.json of a version.

    Raises PipelineError if the store does not have them.
    """
    with tempfile.TemporaryDirectory() as folder:
        with store_errors():
            uri = f"models:/{version.name}/{version.number}/artifacts"
            files = mlflow.artifacts.download_artifacts(artifact_uri=uri, dst_path=folder)
        yield Path(files)


def promote(candidate: Version, force: bool = False) -> str:
    """Move the alias `champion` to the candidate if it is significantly more accurate; return a report.

    Both must have been evaluated on the same test data. The test is McNemar's exact test, on the images that only one
    of the two classifies correctly.
    force: move the alias regardless.
    Raises PipelineError, and keeps the alias, if the candidate is not better, not significantly better, or not
    comparable.
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
    """The evaluation of a version.

    test_set: md5 of the test images and labels, from `CustomImageDataset.md5`.
    correct: (N,) bool, whether each image is classified correctly, in the order of test.csv.
    """

    test_set: str
    correct: pd.Series

    @property
    def accuracy(self) -> float:
        return float(self.correct.mean())

    @classmethod
    def of(cls, version: Version) -> "Evaluation":
        """Read the evaluation from the version's run. Raises PipelineError if it was not evaluated."""
        for run in find_runs(f"attributes.run_id = '{version.run_id}' and tags.`{TEST_SET_TAG}` != ''"):
            with artifact(run.run_id, "plots/confusion.csv") as path:
                if path:
                    answers = pd.read_csv(path, dtype=str, keep_default_na=False)
                    return cls(run.tags[TEST_SET_TAG], answers.actual == answers.predicted)
        raise PipelineError(
            f"{version}: its run {version.run_id} has no evaluation; to log one:\n"
            "dvc repro --force --single-item evaluate"
        )


def _compared(candidate: Version, new: Evaluation, champion: Version, old: Evaluation, force: bool) -> str:
    if new.test_set != old.test_set:
        text = f"{candidate} was tested on different images than the champion, version {champion.number}"
        if not force:
            raise PipelineError(f"{text}: not promoted.\nEvaluate both on the same test data, or give --force.")
        return f"{text}; champion by force, accuracy {new.accuracy:.4f}"
    gained = int((new.correct & ~old.correct).sum())
    lost = int((old.correct & ~new.correct).sum())
    p_value = mcnemar(gained, lost)
    is_significant = p_value < SIGNIFICANCE_LEVEL
    verdict = "significant" if is_significant else "not significant"
    text = (
        f"{candidate}: accuracy {new.accuracy:.4f}; champion, version {champion.number}: {old.accuracy:.4f}\n"
        f"Of {len(new.correct)} test images, only the candidate is correct on {gained} and only the champion on "
        f"{lost}: {verdict} (McNemar's exact test, p = {p_value:.2g})"
    )
    is_better = new.accuracy > old.accuracy
    if is_better and is_significant:
        return f"{text}\nVersion {candidate.number} is the new champion."
    reason = "Better, but not significantly" if is_better else "Not better"
    if force:
        return f"{text}\n{reason}; champion by force."
    raise PipelineError(f"{text}\n{reason}: version {champion.number} stays champion. --force overrides this.")


def _version(found: ModelVersion) -> Version:
    return Version(found.name, int(found.version), found.run_id or "", list(found.aliases))
