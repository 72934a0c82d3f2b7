"""Seconds of an epoch of the tutorial's network in JAX, on the device that JAX finds: for benchmarks.accelerator.

python -m benchmarks.jax_scan FOLDER ROUNDS
"""

import json
import sys
import tempfile
from pathlib import Path

from benchmarks.train_step import jax


def main(raw: Path, rounds: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "FashionMNIST").mkdir()
        (Path(folder) / "FashionMNIST/raw").symlink_to(raw.resolve())
        epoch = jax(Path(folder))
        seconds = [epoch()[0] for _ in range(rounds + 1)][1:]  # the first compiles
    import jax as library

    print(json.dumps({"seconds": seconds, "device": str(library.devices()[0])}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
