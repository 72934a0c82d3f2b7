"""A Python process that has imported the third-party packages. Tests fork it instead of starting Python.

A stage imports torch for two seconds, its sender imports MLflow for three, and DVC takes a second to start. A fork has
them at once. The server imports no module of this project, so a copy of the project imports its own.

`start` makes a folder with the programs `python` and `dvc` (tests/fork/python). Such a program sends its arguments,
environment and open files to the server, passes signals on to the fork, and exits as the fork exits. When it is killed,
the fork is killed too, with what that has started. A real Python runs for other options than -m, -c, -P and -u, and
for variables that libraries read when they are loaded.
"""

import atexit
import contextlib
import functools
import gc
import importlib
import marshal
import os
import resource
import runpy
import selectors
import shutil
import signal
import socket
import sqlite3
import struct
import subprocess
import sys
import tempfile
import threading
import types
import warnings
from pathlib import Path
from typing import Any

SHIM = Path(__file__).parent / "fork/python"
PACKAGES = Path(__file__).parent / "fork/packages.txt"
LENGTH = struct.Struct("!I")
STATUS = struct.Struct("!i")


def start() -> "tuple[subprocess.Popen[bytes], Path]":
    """Start a server; return it and its `python`. It ends when its standard input is closed."""
    folder = Path(tempfile.mkdtemp(prefix="fork-"))
    shim = folder / "python"
    source = SHIM.read_text(encoding="utf-8")
    for program in (shim, folder / "dvc"):
        program.write_text(f"#!{sys.executable} -ISE\n{source}", encoding="utf-8")
        program.chmod(0o755)
    # Bound here, so that a `python` that comes before the imports are done waits for them
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(folder / "socket"))
        listening.listen(1000)
        server = subprocess.Popen(
            [sys.executable, str(Path(__file__)), str(listening.fileno()), str(shim)], stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL, pass_fds=[listening.fileno()], start_new_session=True, cwd=folder,
            env={key: value for key, value in os.environ.items() if not key.startswith("COVERAGE_")},
        )  # fmt: skip
    return server, shim


def stop(server: "subprocess.Popen[bytes]", shim: Path) -> None:
    """End a server, and the forks that still run."""
    assert server.stdin is not None
    server.stdin.close()
    server.wait()
    shutil.rmtree(shim.parent)


def names_of_packages() -> list[str]:
    return PACKAGES.read_text(encoding="utf-8").split()


def import_packages(names: list[str]) -> None:
    """Import what stages, senders and DVC import."""
    # What classifier/tracking/store.py and stages/runner.py set before their imports
    os.environ |= {
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "MLFLOW_LOGGING_LEVEL": "WARNING",
        "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
        "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
        "GOMP_SPINCOUNT": "3000",
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in names:
            with contextlib.suppress(ImportError):  # of another version
                importlib.import_module(name)


def keep_operators() -> None:
    """Make torch read the source of its ONNX operators here once. It takes a second in each export."""
    from torch.onnx._constants import ONNX_DEFAULT_OPSET
    from torch.onnx._internal.exporter._registration import ONNXRegistry

    read = functools.cache(ONNXRegistry.from_torchlib)
    read(opset_version=ONNX_DEFAULT_OPSET)
    ONNXRegistry.from_torchlib = staticmethod(read)  # type: ignore[method-assign, assignment]


def copy_new_stores(folder: Path) -> None:
    """Make MLflow copy its new SQLite databases from one that is made here. Making one takes seconds."""
    import sqlalchemy
    from mlflow.store.db import utils

    make = utils._initialize_tables
    template = folder / "mlflow.db"
    engine = sqlalchemy.create_engine(f"sqlite:///{template}")
    make(engine)  # type: ignore[no-untyped-call]
    engine.dispose()

    def copy_or_make(engine: sqlalchemy.Engine) -> None:
        if engine.dialect.name != "sqlite" or sqlalchemy.inspect(engine).get_table_names():
            make(engine)  # type: ignore[no-untyped-call]
            return
        connection = engine.raw_connection()
        with contextlib.closing(connection), contextlib.closing(sqlite3.connect(template)) as source:
            source.backup(connection.driver_connection)  # type: ignore[arg-type]

    utils._initialize_tables = copy_or_make


class Server:
    """Forks for each request, and knows which connection waits for which process."""

    def __init__(self, listening: socket.socket, shim: str) -> None:
        self.listening = listening
        self.shim = shim
        self.path = sys.path[1:]  # without the folder of this file
        self.ready = False
        self.connections: dict[int, socket.socket] = {}  # by process
        self.selector = selectors.DefaultSelector()
        self.wakeup, write_end = os.pipe()
        os.set_blocking(write_end, False)
        signal.signal(signal.SIGCHLD, lambda number, frame: None)
        signal.set_wakeup_fd(write_end, warn_on_full_buffer=False)

    def serve(self) -> None:
        for file in (self.listening, self.wakeup, 0):
            self.selector.register(file, selectors.EVENT_READ)
        while True:
            for key, _ in self.selector.select():
                if key.fileobj is self.listening:
                    self.accept()
                elif key.fileobj == self.wakeup:
                    os.read(self.wakeup, 1000)
                    self.report_ended()
                elif key.fileobj == 0:  # the tests are over
                    for pid in self.connections:
                        kill_group(pid)
                    return
                else:
                    self.hear(key.data)

    def accept(self) -> None:
        connection, _ = self.listening.accept()
        if not self.ready:
            import_packages(names_of_packages())
            keep_operators()
            copy_new_stores(Path(self.shim).parent)
            gc.collect()
            gc.freeze()
            self.ready = True
        request, files = receive(connection)
        if request is None:  # its `python` was killed meanwhile
            connection.close()
            return
        pid = os.fork()
        if pid == 0:
            self.selector.close()
            self.listening.close()
            for other in self.connections.values():
                other.close()
            connection.close()
            become(request, files, self.shim, self.path)
        for file in files:
            os.close(file)
        self.connections[pid] = connection
        self.selector.register(connection, selectors.EVENT_READ, pid)

    def hear(self, pid: int) -> None:
        """Pass a signal on, or kill the fork if its `python` was killed."""
        if pid not in self.connections:
            return
        numbers = b""
        with contextlib.suppress(ConnectionError):
            numbers = self.connections[pid].recv(100)
        for number in numbers:
            os.kill(pid, number)
        if not numbers:
            kill_group(pid)
            self.selector.unregister(self.connections[pid])
            self.connections.pop(pid).close()

    def report_ended(self) -> None:
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            if connection := self.connections.pop(pid, None):
                self.selector.unregister(connection)
                with contextlib.suppress(OSError):
                    connection.sendall(STATUS.pack(os.waitstatus_to_exitcode(status)))
                connection.close()


def kill_group(pid: int) -> None:
    for kill in (os.killpg, os.kill):  # it may not have its group yet
        with contextlib.suppress(ProcessLookupError):
            kill(pid, signal.SIGKILL)


def receive(connection: socket.socket) -> tuple[dict[str, Any] | None, list[int]]:
    start, files, _, _ = socket.recv_fds(connection, LENGTH.size, 3)
    content = b""
    if len(start) == LENGTH.size:
        (length,) = LENGTH.unpack(start)
        while len(content) < length and (part := connection.recv(length - len(content))):
            content += part
        if len(content) == length:
            return marshal.loads(content), files  # noqa: S302, of the same user
    for file in files:
        os.close(file)
    return None, []


def become(request: dict[str, Any], files: list[int], shim: str, path: list[str]) -> None:
    """Turn this fork into the process that was asked for, and end with it."""
    code = 1
    try:
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.SIG_IGN if request["ignores_sigint"] else signal.default_int_handler)
        os.setsid()
        for number, file in enumerate(files):
            os.dup2(file, number)
            os.close(file)
        os.chdir(request["cwd"])
        os.umask(request["umask"])
        resource.setrlimit(resource.RLIMIT_FSIZE, request["file_limit"])
        os.environ.clear()
        os.environb.update(request["environment"])
        run(request["arguments"], shim, path)
        code = 0
    except SystemExit as end:
        if end.code is None or isinstance(end.code, int):
            code = end.code or 0
        else:
            print(end.code, file=sys.stderr)
    except KeyboardInterrupt:
        sys.excepthook(*sys.exc_info())
        code = -signal.SIGINT
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        end_process(code)


def run(arguments: list[str], shim: str, path: list[str]) -> None:
    sys.executable = shim
    sys.orig_argv = [shim, *arguments]
    is_safe = arguments[0] == "-P"
    kind, what, *rest = arguments[is_safe:]
    sys.argv = [kind, *rest]
    own = [entry for entry in os.environ.get("PYTHONPATH", "").split(os.pathsep) if entry]
    first = [] if is_safe else [str(Path.cwd()) if kind == "-m" else ""]
    sys.path[:] = [*first, *own, *(entry for entry in path if entry not in own)]
    tempfile.tempdir = None  # the environment may name another
    sys.path_importer_cache.clear()
    importlib.invalidate_caches()
    if os.environ.get("PYTHONUNBUFFERED"):
        sys.stdout.reconfigure(write_through=True)  # type: ignore[union-attr]
    sys.dont_write_bytecode = bool(os.environ.get("PYTHONDONTWRITEBYTECODE"))
    if os.environ.get("COVERAGE_PROCESS_CONFIG"):
        importlib.import_module("coverage").process_startup()
    main = types.ModuleType("__main__")
    sys.modules["__main__"] = main
    if "PROCESS_RECORD" in os.environ and "sitecustomize" in sys.modules:
        sys.modules["sitecustomize"].record(forked=True)
    if kind == "-m":
        runpy._run_module_as_main(what)  # type: ignore[attr-defined] # as `python -m` does
    else:
        exec(compile(what, "<string>", "exec"), main.__dict__)  # noqa: S102


def end_process(code: int) -> None:
    """End as an interpreter does, without freeing memory."""
    try:
        threading._shutdown()  # type: ignore[attr-defined]
        atexit._run_exitfuncs()
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
    finally:
        if code < 0:
            signal.signal(-code, signal.SIG_DFL)
            os.kill(os.getpid(), -code)
        os._exit(code & 0xFF)


if __name__ == "__main__":
    if sys.argv[1] == "compile":
        import_packages(names_of_packages()[::-1])
        sys.exit()
    # In a new environment each package is compiled by its first import: another core begins at the end of the list
    helper = subprocess.Popen(
        [sys.executable, __file__, "compile"], stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    Server(socket.socket(fileno=int(sys.argv[1])), sys.argv[2]).serve()
