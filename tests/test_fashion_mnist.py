"""The Fashion-MNIST source: the download stage in processes of its own, against servers on this machine that misbehave.

`http_proxy` leads a process to such a server: it answers in place of the mirror, and of Debian's for apt.
"""

import gzip
import os
import re
import shutil
import signal
import socket
import socketserver
import struct
import subprocess
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from imports import ROOT
from project import python
from small_data import write_idx, write_idx_dataset

from classifier.pipeline.errors import PipelineError
from classifier.pipeline.outputs import hash_file
from classifier.sources import fashion_mnist
from classifier.sources.fashion_mnist import FILES, LARGEST_BYTES, MIRRORS, read_idx

FIRST, *_ = FILES
WITHIN_SECONDS = 60  # a place is left in about 5; the rest is for a busy machine
DEBIAN = Path("/") / fashion_mnist.DEBIAN_FOLDER
needs_apt = pytest.mark.skipif(not shutil.which("apt-get") or DEBIAN.is_dir(), reason="apt-get would not be used here")

Answer = Callable[[socket.socket, str], None]


class Download(NamedTuple):
    """What a run of the download stage in `folder` ended in."""

    folder: Path
    code: int
    stdout: str
    stderr: str
    seconds: float

    def check_complete(self) -> None:
        assert self.code == 0, self.stderr
        raw = self.folder / "data/raw"
        assert {file.name: hash_file(file) for file in raw.iterdir()} == FILES
        assert [path.name for path in (self.folder / "data").iterdir()] == ["raw"]
        assert not list((self.folder / "tmp").iterdir())

    def check_failed_cleanly(self) -> None:
        assert self.code == 1
        assert "Traceback" not in self.stderr
        assert not list((self.folder / "data").iterdir())
        assert not list((self.folder / "tmp").iterdir())


def start(folder: Path, env: dict[str, str], *command: str) -> "subprocess.Popen[str]":
    """Start the stage, or another command of Python, in a folder that holds params.yaml only.

    Without PATH in `env` it finds no apt-get.
    """
    (folder / "tmp").mkdir(parents=True, exist_ok=True)
    params = (ROOT / "params.yaml").read_text(encoding="utf-8")
    (folder / "params.yaml").write_text(re.sub(r"(?m)^source: \S+", "source: fashion_mnist", params), encoding="utf-8")
    ours = {"PYTHONPATH": str(ROOT), "TMPDIR": str(folder / "tmp"), "PATH": str(folder / "tmp")}
    return subprocess.Popen(
        [python(), *(command or ("-m", "stages", "download"))],
        cwd=folder,
        env=ours | env,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def download(folder: Path, *command: str, **env: str) -> Download:
    begin = time.monotonic()
    with start(folder, env, *command) as process:
        stdout, stderr = process.communicate()
    return Download(folder, process.returncode, stdout, stderr, time.monotonic() - begin)


@contextmanager
def server(answer: Answer) -> Iterator[dict[str, str]]:
    """A server that calls `answer` with every connection and the address asked for; gives the way to it."""

    class Handler(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            with suppress(OSError):  # the other side has gone
                request = self.request.recv(1 << 16).decode()
                answer(self.request, request.split(" ")[1] if " " in request else "")

    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Handler, bind_and_activate=False) as running:
        running.daemon_threads = True
        running.request_queue_size = 50
        running.server_bind()
        running.server_activate()
        thread = threading.Thread(target=running.serve_forever, args=(0.05,))
        thread.start()
        try:
            yield proxy(running.server_address[1])
        finally:
            running.shutdown()
            thread.join()


def proxy(port: int) -> dict[str, str]:
    return {"http_proxy": f"http://127.0.0.1:{port}", "https_proxy": f"http://127.0.0.1:{port}"}


def refusing() -> dict[str, str]:
    """The way to a port at which nothing listens."""
    with socket.create_server(("127.0.0.1", 0)) as unused:
        return proxy(unused.getsockname()[1])


# What a mirror may do


def head(length: object = None) -> bytes:
    return b"HTTP/1.1 200 OK\r\n" + (b"" if length is None else f"Content-Length: {length}\r\n".encode()) + b"\r\n"


def stall(connection: socket.socket, address: str) -> None:
    while connection.recv(1 << 16):
        pass


def trickle(connection: socket.socket, address: str) -> None:
    connection.sendall(head(1_000_000))
    while True:
        connection.sendall(b"x")
        time.sleep(1)


def trickle_headers(connection: socket.socket, address: str) -> None:
    """Each byte comes in time for a timeout that looks at one byte only."""
    connection.sendall(b"HTTP/1.1 200 OK\r\nServer: ")
    while True:
        connection.sendall(b"x")
        time.sleep(1)


def endless(connection: socket.socket, address: str) -> None:
    connection.sendall(head())
    while True:
        connection.sendall(bytes(1 << 20))


def saying(content: bytes) -> Answer:
    return lambda connection, address: connection.sendall(content)


def serving(packed: Path) -> Answer:
    """A mirror as it should be."""

    def answer(connection: socket.socket, address: str) -> None:
        content = (packed / address.rpartition("/")[2]).read_bytes()
        connection.sendall(head(len(content)) + content)

    return answer


@pytest.fixture(scope="module")
def packed(fashion_mnist_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the four files, packed."""
    folder = tmp_path_factory.mktemp("packed")
    for name in FILES:
        (folder / f"{name}.gz").write_bytes(gzip.compress((fashion_mnist_dir / name).read_bytes(), 1))
    return folder


def bomb() -> bytes:
    """100 megabytes of zeros, in a hundred kilobytes."""
    return gzip.compress(bytes(100 * 2**20), 9)


BAD_MIRRORS = {  # what it does: why it is left
    "never answers": "stalled, 0 bytes in 5 s",
    "trickles": r"stalled, \d bytes in 5 s",
    "trickles headers": "stalled, 0 bytes in 5 s",
    "refuses": "Connection refused",
    "never ends": f"more than {LARGEST_BYTES} bytes",
    "cuts off": r"cut off after \d+ of \d+ bytes",
    "gives a page": "is truncated or not gzip: Not a gzipped file",
    "gives another of the files": r"has the wrong content, 60008 bytes with md5 9018921c3c673c538a1fc5bad174d6f9",
    "gives a bomb": f"unpacks to more than {LARGEST_BYTES} bytes",
    "gives other data": "has the wrong content, 5 bytes with md5 2bda2998d9b0ee197da142a0447f6725",
    "has no file": "HTTP Error 404: Not Found",
    "does not speak HTTP": "SSH-2.0-none",
    "gives no number as length": "is truncated or not gzip",
}


@pytest.fixture(scope="module")
def left_mirrors(packed: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Download]:
    """A download from each bad mirror, all at a time: the first three take five seconds each."""
    content = (packed / f"{FIRST}.gz").read_bytes()
    page = b"<html><body>Please log in</body></html>"
    answers: dict[str, Answer] = {
        "never answers": stall,
        "trickles": trickle,
        "trickles headers": trickle_headers,
        "never ends": endless,
        "cuts off": saying(head(len(content)) + content[: len(content) // 2]),
        "gives a page": saying(head(len(page)) + page),
        "gives another of the files": saying(head() + (packed / "train-labels-idx1-ubyte.gz").read_bytes()),
        "gives a bomb": saying(head() + bomb()),
        "gives other data": saying(head() + gzip.compress(b"wrong")),
        "has no file": saying(b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n"),
        "does not speak HTTP": saying(b"SSH-2.0-none\r\n"),
        "gives no number as length": saying(head("many") + page),
    }

    def run(name: str) -> Download:
        folder = tmp_path_factory.mktemp("mirror")
        if name not in answers:
            return download(folder, **refusing())
        with server(answers[name]) as way:
            return download(folder, **way)

    with ThreadPoolExecutor(len(BAD_MIRRORS)) as pool:
        return dict(zip(BAD_MIRRORS, pool.map(run, BAD_MIRRORS), strict=True))


@pytest.mark.skipif(DEBIAN.is_dir(), reason="the next place has the data here")
@pytest.mark.parametrize("name", BAD_MIRRORS)
def test_bad_mirror_is_left_for_the_next_place(left_mirrors: dict[str, Download], name: str) -> None:
    done = left_mirrors[name]
    announced, why, following, _ = done.stdout.splitlines()
    assert announced == f"Fashion-MNIST from {MIRRORS[0]}"
    assert re.search(rf"not used: {FIRST}.*{BAD_MIRRORS[name]}", why), why
    assert following == "Fashion-MNIST from Debian's package dataset-fashion-mnist"
    assert done.seconds < WITHIN_SECONDS
    done.check_failed_cleanly()
    assert why.partition("not used: ")[2] in done.stderr


# Places with the right data


def test_local_folder_is_used_first(fashion_mnist_dir: Path, tmp_path: Path) -> None:
    done = download(tmp_path, FASHION_MNIST_DIR=str(fashion_mnist_dir), **refusing())
    done.check_complete()
    assert done.stdout.splitlines()[0] == f"Fashion-MNIST from FASHION_MNIST_DIR={fashion_mnist_dir}"
    assert "not used" not in done.stdout
    assert [line for line in done.stderr.splitlines() if not line.endswith(" elapsed")] == []  # as on a busy machine


def test_local_folder_may_have_packed_files(fashion_mnist_dir: Path, packed: Path, tmp_path: Path) -> None:
    mixed = tmp_path / "mixed"
    mixed.mkdir()
    for index, name in enumerate(FILES):
        source = packed / f"{name}.gz" if index % 2 else fashion_mnist_dir / name
        (mixed / source.name).symlink_to(source)
    done = download(tmp_path / "run", FASHION_MNIST_DIR="../mixed", **refusing())
    done.check_complete()


def test_mirror_and_what_an_earlier_download_left(packed: Path, tmp_path: Path) -> None:
    (tmp_path / "data/raw").mkdir(parents=True)
    write_idx_dataset(tmp_path / "data/raw")
    with server(serving(packed)) as way:
        done = download(tmp_path, **way)
    done.check_complete()
    assert done.stdout.splitlines()[0] == f"Fashion-MNIST from {MIRRORS[0]}"


@pytest.mark.parametrize("fault", ["wrong", "cut", "missing", "bomb", "endless"])
def test_wrong_local_folder_is_named_and_left_as_it_is(
    fashion_mnist_dir: Path, packed: Path, tmp_path: Path, fault: str
) -> None:
    own = tmp_path / "own"
    own.mkdir()
    for name in FILES:
        (own / name).symlink_to(fashion_mnist_dir / name)
    bad = list(FILES)[1]
    (own / bad).unlink()
    if fault == "wrong":
        write_idx(own / bad, np.zeros(60_000, np.uint8))
        why = f"{bad} has the wrong content, 60008 bytes with md5 {hash_file(own / bad)}, not {FILES[bad]}"
    elif fault == "cut":
        (own / f"{bad}.gz").write_bytes((packed / f"{bad}.gz").read_bytes()[:1000])
        why = f"{bad}.gz is truncated or not gzip"
    elif fault == "bomb":
        (own / f"{bad}.gz").write_bytes(bomb())
        why = f"{bad}.gz unpacks to more than {LARGEST_BYTES} bytes"
    elif fault == "endless":
        with (own / bad).open("wb") as file:
            file.truncate(1 << 40)  # takes no room on disk
        why = f"{bad} has {1 << 40} bytes, more than {LARGEST_BYTES}"
    else:
        why = f"there is no {bad} or {bad}.gz in {own}"
    before = {file.name: file.stat().st_mtime_ns for file in own.iterdir()}
    with server(serving(packed)) as way:
        done = download(tmp_path / "run", FASHION_MNIST_DIR=str(own), **(way if fault == "wrong" else refusing()))
    if fault == "wrong":
        done.check_complete()
    assert f"  not used: {why}" in done.stdout
    assert f"\nFashion-MNIST from {MIRRORS[0]}\n" in done.stdout
    assert {file.name: file.stat().st_mtime_ns for file in own.iterdir()} == before


# When nothing helps


@pytest.mark.skipif(DEBIAN.is_dir(), reason="the last place has the data here")
def test_every_place_and_its_fault_are_listed(tmp_path: Path) -> None:
    done = download(tmp_path, FASHION_MNIST_DIR="nowhere", PATH=os.environ["PATH"], **refusing())
    done.check_failed_cleanly()
    title, local, mirror, debian, *advice = done.stderr.splitlines()
    assert title == "Fashion-MNIST could not be had:"
    assert local == f"  FASHION_MNIST_DIR=nowhere: there is no {FIRST} or {FIRST}.gz in nowhere"
    assert mirror.startswith(f"  {MIRRORS[0]}: {FIRST}.gz: <urlopen error ")
    assert debian.startswith("  Debian's package dataset-fashion-mnist: ")
    assert "Connection refused" in debian or "no apt-get" in debian
    assert advice == [
        "Put its four files (packed or not) into a folder and set FASHION_MNIST_DIR to it.",
    ]
    assert done.seconds < WITHIN_SECONDS


def test_interrupted_download_leaves_nothing(tmp_path: Path) -> None:
    asked = threading.Event()

    def answer(connection: socket.socket, address: str) -> None:
        asked.set()
        stall(connection, address)

    with server(answer) as way, start(tmp_path, way) as process:
        assert asked.wait(WITHIN_SECONDS)
        process.send_signal(signal.SIGINT)
        _, stderr = process.communicate(timeout=WITHIN_SECONDS)
    assert (process.returncode, stderr) == (130, "interrupted\n")
    assert not list((tmp_path / "data").iterdir())


# Debian's package


def apt_state() -> dict[Path, tuple[int, int]]:
    """Size and time of every file in which apt and dpkg keep what they know about this system."""
    folders = [Path("/var/lib/apt"), Path("/var/cache/apt"), Path("/var/lib/dpkg")]
    files = [path for folder in folders for path in folder.rglob("*") if path.is_file()]
    return {path: (path.stat().st_size, path.stat().st_mtime_ns) for path in files}


def through_proxy(connection: socket.socket, address: str) -> None:
    """Stall for the mirror, and fetch for apt what it asks for."""
    if address.startswith(MIRRORS[0]):
        stall(connection, address)
    try:
        with urllib.request.urlopen(address) as response:
            content = response.read()
    except urllib.error.HTTPError as error:
        with error:
            connection.sendall(f"HTTP/1.1 {error.code} {error.reason}\r\nContent-Length: 0\r\n\r\n".encode())
    else:
        connection.sendall(head(len(content)) + content)


# Whoever may read the project, apt must work for a user who may not write to the system.
AS_NOBODY = """
import encodings.idna, os
from pathlib import Path
from classifier.sources import fashion_mnist
if os.geteuid() == 0:
    os.setgroups([])
    os.setgid(65534)
    os.setuid(65534)
fashion_mnist.fetch(Path("data/raw"), Path("data/own"))
"""


@needs_apt
@pytest.mark.slow
def test_debian_package_takes_the_place_of_a_stalled_mirror() -> None:
    """For a user who is not root; and what apt knows about the system stays as it is."""
    before = apt_state()
    own = {name: os.environ[name] for name in ("PATH", "https_proxy") if name in os.environ}
    with tempfile.TemporaryDirectory() as name, server(through_proxy) as way:
        folder = Path(name)
        for path in (folder, folder / "run", folder / "run/tmp"):
            path.mkdir(exist_ok=True)
            path.chmod(0o777)
        done = download(folder / "run", "-c", AS_NOBODY, **way | {"https_proxy": ""} | own)
        done.check_complete()
    assert re.search(r"not used: .*stalled, 0 bytes", done.stdout)
    assert apt_state() == before


@needs_apt
@pytest.mark.slow
@pytest.mark.parametrize("answer", [stall, trickle])
def test_stalled_debian_is_given_up(tmp_path: Path, answer: Answer) -> None:
    with server(answer) as way:
        done = download(tmp_path, PATH=os.environ["PATH"], **way)
    done.check_failed_cleanly()
    assert re.search(r"dataset-fashion-mnist: apt-get update: stalled, \d+ bytes in 12 s", done.stderr)
    assert done.seconds < 5 + 12 + WITHIN_SECONDS


# The files


@pytest.mark.parametrize("shape", [(5, 28, 28), (7,), (2, 3, 4, 5)])
def test_read_idx(tmp_path: Path, shape: tuple[int, ...]) -> None:
    values = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    write_idx(tmp_path / "values", values)
    assert np.array_equal(read_idx(tmp_path / "values", len(shape)), values)


def test_read_gives_both_splits(tmp_path: Path) -> None:
    write_idx_dataset(tmp_path, train=30, test=20)
    splits = fashion_mnist.read(tmp_path)
    assert {name: (np.asarray(data.images).shape, data.labels.shape) for name, data in splits.items()} == {
        "train": ((30, 28, 28), (30,)),
        "test": ((20, 28, 28), (20,)),
    }
    assert splits["train"].labels.dtype == np.int64
    assert np.bincount(splits["train"].labels).tolist() == [3] * 10
    assert len(fashion_mnist.class_names(tmp_path)) == 10


HEADER = struct.pack(">HBBII", 0, 8, 2, 3, 4)


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b"", "not an IDX file"),
        (HEADER[:3], "not an IDX file"),
        (b"\x1f\x8b\x08\x08" + bytes(100), "not an IDX file"),  # packed
        (b"\0\0\x0d\x01" + struct.pack(">If", 1, 0.5), "not an IDX file of unsigned bytes"),  # floats
        *((HEADER[:length], f"cut off after {length} bytes") for length in (4, 8, 11)),
        (HEADER, r"12 bytes do not hold shape \(3, 4\)"),
        (HEADER + bytes(11), r"23 bytes do not hold shape \(3, 4\)"),
        (HEADER + bytes(13), r"25 bytes do not hold shape \(3, 4\)"),
        (struct.pack(">HBB2I", 0, 8, 2, *[2**32 - 1] * 2), "12 bytes do not hold shape"),
        (struct.pack(">HBB2I", 0, 8, 2, 0, 2**32 - 1), "shape .* holds nothing"),
        (struct.pack(">HBB3I", 0, 8, 3, 1, 1, 1) + b"x", "3 dimensions, not 2"),
        (b"\0\0\x08\xff" + bytes(4 * 255), "255 dimensions, not 2"),
    ],
)
def test_broken_idx_file_is_named(tmp_path: Path, content: bytes, complaint: str) -> None:
    (tmp_path / FIRST).write_bytes(content)
    with pytest.raises(PipelineError, match=rf"{FIRST}: {complaint}.*; run the download stage again"):
        read_idx(tmp_path / FIRST, 2)


def test_swapped_files_are_named(tmp_path: Path) -> None:
    write_idx_dataset(tmp_path)
    shutil.copyfile(tmp_path / "train-labels-idx1-ubyte", tmp_path / FIRST)
    with pytest.raises(PipelineError, match=f"{FIRST}: 1 dimensions, not 3"):
        fashion_mnist.read(tmp_path)


def test_missing_idx_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(PipelineError, match=f"{FIRST}: missing"):
        fashion_mnist.read(tmp_path)
