"""A real PostgreSQL server on loopback, Debian's, with the databases of a team's tracker."""

import os
import pwd
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psycopg2
import pytest
from tracker import free_port, wait_for

PASSWORD = "password-of-the-database"  # noqa: S105


class Postgres:
    """Its address, in the variables that its clients take it from."""

    def __init__(self, port: int) -> None:
        self.environment = {"PGHOST": "127.0.0.1", "PGPORT": str(port), "PGUSER": "mlflow", "PGPASSWORD": PASSWORD}

    def connect(self, database: str) -> Any:
        host, port, user, password = self.environment.values()
        return psycopg2.connect(host=host, port=port, user=user, password=password, dbname=database)

    def query(self, statement: str, *values: str) -> list[tuple[Any, ...]]:
        """What MLflow's database answers."""
        with self.connect("mlflow") as connection, connection.cursor() as cursor:
            cursor.execute(statement, values)
            return list(cursor.fetchall())


def programs() -> Path | None:
    """The folder of the newest server's programs, which Debian does not put on the PATH."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"), key=lambda path: int(path.parts[-3]))
    return found[-1].parent if found else None


@contextmanager
def postgres() -> Iterator[Postgres]:
    folder = programs()
    if folder is None:
        if "CI" in os.environ and sys.platform == "linux":
            pytest.fail("there is no PostgreSQL: apt-get install postgresql")
        pytest.skip("there is no PostgreSQL: apt-get install postgresql")
    # Not below pytest's own folder, which only its user may enter: the server refuses to run as root
    data = Path(tempfile.mkdtemp(prefix="postgres-"))
    account: dict[str, Any] = {}
    if os.geteuid() == 0:
        entry = pwd.getpwnam("postgres")
        os.chown(data, entry.pw_uid, entry.pw_gid)
        account = {"user": entry.pw_uid, "group": entry.pw_gid, "extra_groups": []}
    secret = data / "password"
    secret.write_text(PASSWORD)
    secret.chmod(0o644)
    server = Postgres(free_port())
    subprocess.run(
        [folder / "initdb", "--pgdata", data / "data", "--username", "mlflow", "--pwfile", secret,
         "--auth", "scram-sha-256"],
        check=True, stdout=subprocess.DEVNULL, cwd=data, **account,
    )  # fmt: skip
    options = ["listen_addresses=127.0.0.1", f"unix_socket_directories={data}", "fsync=off"]
    command: list[str | Path] = [folder / "postgres", "-D", data / "data", "-p", server.environment["PGPORT"]]
    for option in options:
        command += ["-c", option]
    with subprocess.Popen(
        command, cwd=data, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, **account
    ) as process:
        try:
            wait_for(lambda: _answers(server))
            connection = server.connect("postgres")
            connection.autocommit = True  # no database is made within a transaction
            for database in ("mlflow", "mlflow_auth"):
                connection.cursor().execute(f"CREATE DATABASE {database}")
            connection.close()
            yield server
        finally:
            process.send_signal(signal.SIGINT)  # it waits for no client
            process.wait()
            shutil.rmtree(data)


def _answers(server: Postgres) -> bool:
    try:
        server.connect("postgres").close()
    except psycopg2.OperationalError:
        return False
    return True
