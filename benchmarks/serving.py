"""How many requests the server of the champion answers, and how fast.

python -m benchmarks.serving [--requests N] [--project FOLDER]

Starts `mlflow models serve` on the champion of this checkout's store. Clients, each with a connection of its own, send
PNG images in base64 as `{"inputs": [{"image": ...}]}`, one request after the other: N requests for each of 1 and 4
clients and 1 and 32 images a request, after some that are not measured. Server and clients share the machine. Exits
with 1 if a request is not answered with an answer for each image.

With --project, the champion is that of another checkout.
"""

import argparse
import base64
import json
import statistics
import sys
import threading
import time
from contextlib import ExitStack
from http.client import HTTPConnection, HTTPException
from pathlib import Path

import numpy as np

from benchmarks.measuring import ROOT, machine
from classifier.pipeline.errors import PipelineError, run_main
from classifier.pipeline.params import load_params

sys.path.insert(0, str(ROOT / "tests"))
from model_server import SECONDS, model_server
from pictures import encode_png

CLIENTS = (1, 4)
IMAGES = (1, 32)  # a request
WARM_UP = 10  # requests of each client
IMAGE_SHAPE = (28, 28)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=1000, help="for each row (default 1000)")
    parser.add_argument("--project", type=Path, default=ROOT, help="whose champion answers (default: this checkout's)")
    arguments = parser.parse_args()

    with ExitStack() as stack:
        print(machine(("torch", "mlflow", "onnxruntime", "uvicorn", "fastapi")))
        model = f"models:/{load_params().registered_model}@champion"
        port = stack.enter_context(model_server(arguments.project.resolve(), model))
        print(f"{arguments.requests} requests a row\n\nclients  images  requests/s  images/s   p50 ms   p99 ms  errors")
        errors = sum(measure(port, clients, images, arguments.requests) for images in IMAGES for clients in CLIENTS)
    if errors:
        raise PipelineError(f"{errors} requests were not answered")


def measure(port: int, clients: int, images: int, requests: int) -> int:
    """Print a row of figures; return how many requests failed."""
    body = request(images)
    seconds: list[float] = []
    errors: list[str] = []
    start = threading.Barrier(clients + 1)

    def client(count: int) -> None:
        connection = HTTPConnection("127.0.0.1", port, timeout=SECONDS)
        errors.extend(filter(None, [ask(connection, body, images) for _ in range(WARM_UP)]))
        start.wait()
        for _ in range(count):
            started = time.perf_counter()
            fault = ask(connection, body, images)
            seconds.append(time.perf_counter() - started)
            if fault:
                errors.append(fault)
        connection.close()

    counts = [requests // clients + (number < requests % clients) for number in range(clients)]
    threads = [threading.Thread(target=client, args=[count]) for count in counts]
    for thread in threads:
        thread.start()
    start.wait()
    started = time.perf_counter()
    for thread in threads:
        thread.join()
    rate = requests / (time.perf_counter() - started)
    p50, p99 = statistics.median(seconds) * 1000, float(np.percentile(seconds, 99)) * 1000
    print(f"{clients:7}  {images:6}  {rate:10.1f}  {rate * images:8.0f}  {p50:7.1f}  {p99:7.1f}  {len(errors):6}")
    for fault in sorted(set(errors)):
        print(f"  {fault}")
    return len(errors)


def request(images: int) -> bytes:
    """The JSON of a request with images of noise, of Fashion-MNIST's shape."""
    noise = np.random.default_rng(0).integers(0, 256, (images, *IMAGE_SHAPE), np.uint8)
    return json.dumps({"inputs": [{"image": base64.b64encode(encode_png(image)).decode()} for image in noise]}).encode()


def ask(connection: HTTPConnection, body: bytes, images: int) -> str:
    """Send a request; return what is wrong with the answer, or nothing."""
    try:
        connection.request("POST", "/invocations", body, {"Content-Type": "application/json"})
        response = connection.getresponse()
        text = response.read()
    except (OSError, HTTPException) as error:
        connection.close()
        return f"{type(error).__name__}: {error}"
    if response.status != 200:
        return f"status {response.status}: {text[:200].decode(errors='replace')}"
    answered = len(json.loads(text)["predictions"])
    return "" if answered == images else f"{answered} answers for {images} images"


if __name__ == "__main__":
    run_main(main)
