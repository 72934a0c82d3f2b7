"""How fast each exported format answers, opened as users open it.

python -m benchmarks.inference [--seconds S] [--small]

The files of models/export, with int8 made of the ONNX file where it was not exported, each opened by
`classifier.export.formats.open_model` in a process of its own, with the library's own number of threads. For batches of
1 and 256 images of noise, the formats take turns of a second, after one that does not count, until each has had S
seconds.

With --small, the models are those of a project of its own, trained on 160 images: the same network, other weights.
"""

import sys
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from time import perf_counter

import numpy as np

from benchmarks.measuring import ROOT, Contender, Report, in_turns, parser
from classifier.pipeline.errors import PipelineError, run_main
from classifier.pipeline.outputs import read_json
from classifier.pipeline.paths import EXPORT, exported_name

sys.path.insert(0, str(ROOT / "tests"))
from project import small_project

FORMATS = ("pth", "pt2", "onnx", "safetensors", "int8")
BATCHES = (1, 256)
TURN_SECONDS = 1.0


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--seconds", type=int, default=10, help="of each format and batch (default 10)")
    arguments.add_argument("--small", action="store_true", help="models that are trained in some seconds")
    given = arguments.parse_args()

    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        export = small_export(folder) if given.small else ROOT / EXPORT
        if not (export / "manifest.json").is_file():
            raise PipelineError(f"{export}: no exported models; `make repro` makes them")
        shape = tuple(read_json(export / "manifest.json")["input"]["shape"][1:])
        report = Report("Inference", ("torch", "onnxruntime"), given.page)
        files = {name: export / exported_name(name) for name in FORMATS}
        if not files["int8"].exists():
            files["int8"] = folder / exported_name("int8")
            write_int8(files["onnx"], shape, files["int8"])
        for batch in BATCHES:
            contenders = {
                name: Contender(open_format, file, batch, shape) for name, file in files.items() if file.exists()
            }
            turns = in_turns(contenders, given.seconds)
            for contender in contenders.values():
                contender.close()
            report.line(f"\nbatch of {batch}, {given.seconds} turns of {TURN_SECONDS:g} s each")
            report.line("format       images/s    p50 ms    p99 ms  calls  to pth")
            rates = {}
            for name, answers in turns.items():
                calls = np.concatenate(answers)
                rates[name] = batch * len(calls) / calls.sum()
                p50, p99 = np.percentile(calls, [50, 99]) * 1000
                ratio = rates[name] / rates["pth"]
                report.line(f"{name:11} {rates[name]:9,.0f} {p50:9.3f} {p99:9.3f} {len(calls):6} {ratio:7.2f}")
        report.save()


def small_export(folder: Path) -> Path:
    project = small_project(folder, export_formats="[pth, pt2, onnx, safetensors]")
    project.dvc("repro")
    return project.root / EXPORT


def write_int8(onnx: Path, shape: tuple[int, ...], path: Path) -> None:
    """As export does, but calibrated on noise: the speed does not depend on the numbers."""
    from classifier.export.quantization import quantize

    quantize(onnx, noise(64, shape), path)


def noise(count: int, shape: tuple[int, ...]) -> np.ndarray:
    """(count, C, H, W) float32 in [0, 1)."""
    return np.random.default_rng(0).random((count, *shape), np.float32)


def open_format(path: Path, batch: int, shape: tuple[int, ...]) -> Callable[[], np.ndarray]:
    from classifier.export.formats import open_model

    return partial(seconds_of_calls, open_model(path), noise(batch, shape))


def seconds_of_calls(logits: Callable[[np.ndarray], np.ndarray], pixels: np.ndarray) -> np.ndarray:
    """Seconds of each call in a turn, (calls,) float64."""
    seconds = []
    started = ended = perf_counter()
    while ended - started < TURN_SECONDS:
        before = ended
        logits(pixels)
        ended = perf_counter()
        seconds.append(ended - before)
    return np.array(seconds)


if __name__ == "__main__":
    run_main(main)
