"""A store of another version of MLflow: the error says how to upgrade it, and the upgrade makes a backup."""

import sqlite3
from contextlib import closing
from pathlib import Path

import pytest
import sqlalchemy
from alembic import command
from alembic.script import ScriptDirectory
from mlflow.store.db.utils import _get_alembic_config
from mlflow.store.tracking.dbmodels.initial_models import Base

from classifier.pipeline.errors import PipelineError
from classifier.tracking.store import find_runs, upgrade_store

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def old(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A database as the schema was before MLflow's last change of it."""
    database = tmp_path_factory.mktemp("old") / "mlflow.db"
    config = _get_alembic_config(f"sqlite:///{database}")  # type: ignore[no-untyped-call]
    script = ScriptDirectory.from_config(config)
    newest = script.get_revision(script.get_current_head() or "")
    engine = sqlalchemy.create_engine(f"sqlite:///{database}")
    Base.metadata.create_all(engine)
    with engine.begin() as connection:
        config.attributes["connection"] = connection
        command.upgrade(config, str(newest.down_revision))
    engine.dispose()
    return database


@pytest.fixture
def database(old: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    (tmp_path / "mlflow.db").write_bytes(old.read_bytes())
    return tmp_path / "mlflow.db"


def version(database: Path) -> str:
    with closing(sqlite3.connect(database)) as store:
        (found,) = store.execute("SELECT version_num FROM alembic_version").fetchone()
        return str(found)


def test_an_old_store_is_upgraded_after_a_copy(database: Path) -> None:
    before = version(database)
    copy = upgrade_store()
    assert copy.parent == database.parent
    assert version(copy) == before
    assert version(database) != before
    assert find_runs() == []


@pytest.mark.parametrize("server", [False, True])
def test_of_an_old_store_the_way_on_is_told(
    old: Path, database: Path, monkeypatch: pytest.MonkeyPatch, server: bool
) -> None:
    """MLflow upgrades by itself where a table is missing, and refuses where columns are."""
    upgrade_store()
    with closing(sqlite3.connect(database)) as store, store:
        store.execute("UPDATE alembic_version SET version_num = ?", (version(old),))
    if server:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{database}")
    with pytest.raises(PipelineError) as error:
        find_runs()
    advice = (
        "ask its administrator to run: mlflow db upgrade" if server else "`classifier upgrade-store` makes a backup"
    )
    assert advice in str(error.value)


def test_a_store_that_cannot_be_upgraded_is_as_it_was(database: Path) -> None:
    with closing(sqlite3.connect(database)) as store, store:
        store.execute("UPDATE alembic_version SET version_num = 'of the future'")
    before = database.read_bytes()
    with pytest.raises(PipelineError, match="created by a newer version of MLflow than the installed one"):
        find_runs()
    with pytest.raises(PipelineError, match=r"mlflow\.db: the upgrade failed, and the file is unchanged: "):
        upgrade_store()
    assert database.read_bytes() == before


def test_there_is_nothing_to_upgrade(database: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    database.unlink()
    with pytest.raises(PipelineError, match="no SQLite file to upgrade"):
        upgrade_store()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://me:secret@127.0.0.1:9")
    with pytest.raises(PipelineError, match=r"^http://\*\*\*@127\.0\.0\.1:9: no SQLite file to upgrade"):
        upgrade_store()
