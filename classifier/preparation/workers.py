"""What prepares the images: threads or processes of this machine, or a Dask cluster."""

import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import contextmanager
from typing import NamedTuple

from classifier.compute.cores import usable_cores
from classifier.pipeline.errors import PipelineError

# Files from which on processes are worth their start, of about half a second: reading many small files takes more of
# Python's time, which threads cannot share, than of the decoders'
FILES_FOR_PROCESSES = 2000
CLUSTER_SECONDS = 10  # to reach the scheduler


class Pool(NamedTuple):
    """An executor, and how many tasks it works on at a time."""

    executor: Executor
    workers: int


@contextmanager
def start_workers(files: int, cluster: str | None = None) -> Iterator[Pool]:
    """Start what prepares images.

    files: how many of them are files; with many, processes are started instead of threads. cluster: address of a Dask
    scheduler, whose workers need this environment, this checkout and the same file system. Raises PipelineError if the
    scheduler does not answer, or has no workers.
    """
    if cluster:
        with _cluster(cluster) as pool:
            yield pool
        return
    count = usable_cores()
    if files < FILES_FOR_PROCESSES or count == 1:
        executor: Executor = ThreadPoolExecutor(count)  # decoders let other threads run
    else:
        # A fork of this process would have its threads' locks as they happen to be
        method = "forkserver" if sys.platform == "linux" else "spawn"
        executor = ProcessPoolExecutor(count, multiprocessing.get_context(method), _start_process)
    try:
        yield Pool(executor, count)
    finally:
        executor.shutdown(cancel_futures=True)


@contextmanager
def _cluster(address: str) -> Iterator[Pool]:
    try:
        from distributed import Client
    except ImportError:
        raise PipelineError(f"cluster: {address}: needs the package distributed; `pip install distributed`") from None
    try:
        client = Client(address, timeout=CLUSTER_SECONDS, set_as_default=False)
    except (OSError, ValueError) as error:  # OSError: TimeoutError too
        raise PipelineError(f"cluster: {address}: no Dask scheduler answers there: {error}") from None
    with client:
        threads = sum(client.nthreads().values())
        if threads == 0:
            raise PipelineError(f"cluster: {address}: the scheduler has no workers; start some with `dask worker`")
        print(f"Dask cluster {address}: {threads} threads", flush=True)
        yield Pool(client.get_executor(pure=False), threads)  # pure: a task would be recognised by hashing its images


def _start_process() -> None:
    """Leave signals to the parent process, and end with it."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)

    def end_with_parent() -> None:
        if parent := multiprocessing.parent_process():
            parent.join()
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()
