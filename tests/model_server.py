"""MLflow's server of a registered model, as a user starts it, and requests to it."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

from project import clean_environment, python
from tracker import free_port, wait_for

SECONDS = 120  # for the server to start, and for an answer: a busy machine takes long
JSON = "application/json"


@contextmanager
def model_server(root: Path, model: str, limit: str = "") -> Iterator[int]:
    """The port on which `mlflow models serve` answers for a model of the store in the folder `root`.

    limit: a command for the shell that starts the server, such as `ulimit -v 8388608`.
    """
    port = free_port()
    serve = [
        sys.executable if limit else python(),
        "-m",
        "mlflow",
        "models",
        "serve",
        "--model-uri",
        model,
        "--env-manager",
        "local",
    ]
    command = ["bash", "-c", f'{limit or ":"}; exec "$@"', "bash", *serve, "--port", str(port)]
    log = root.parent / "model_server.log"
    with (
        log.open("w") as output,
        subprocess.Popen(
            command, cwd=root,
            env=clean_environment(root.parent, MLFLOW_TRACKING_URI=f"sqlite:///{root / 'mlflow.db'}"),
            stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, start_new_session=True,
        ) as process,
    ):  # fmt: skip
        try:
            wait_for(lambda: process.poll() is not None or is_up(port))
            assert process.poll() is None, log.read_text()
            yield port
        finally:
            os.killpg(process.pid, signal.SIGTERM)  # with the server that it starts


def is_up(port: int) -> bool:
    connection = HTTPConnection("127.0.0.1", port, timeout=SECONDS)
    try:
        connection.request("GET", "/ping")
        return connection.getresponse().status == 200
    except ConnectionError:
        return False
    finally:
        connection.close()


def post(port: int, content: Any, content_type: str = JSON) -> tuple[int, str]:
    """Status and text that the server answers; content: bytes, or what becomes JSON."""
    body = content if isinstance(content, bytes) else json.dumps(content).encode()
    connection = HTTPConnection("127.0.0.1", port, timeout=SECONDS)
    try:
        connection.request("POST", "/invocations", body, {"Content-Type": content_type})
        answer = connection.getresponse()
        return answer.status, answer.read().decode()
    finally:
        connection.close()
