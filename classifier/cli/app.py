"""The command `classifier`: one function for each subcommand."""

import dataclasses
import json
import os
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from classifier.pipeline.errors import PipelineError, printable, run_main
from classifier.pipeline.outputs import atomic
from classifier.pipeline.params import load_params
from classifier.pipeline.paths import WEIGHTS
from classifier.tracking.git import git
from classifier.tracking.journal import journals

if TYPE_CHECKING:
    import pandas as pd

REPORTS = Path("reports")  # ignored by Git

Settings = Annotated[
    list[str] | None, typer.Option("--set-param", "-S", help="Set a parameter, such as lr=0.01; may be repeated.")
]
Jobs = Annotated[int, typer.Option("--jobs", "-j", min=1, help="Number of experiments to run at the same time.")]

app = typer.Typer(no_args_is_help=True, add_completion=True, pretty_exceptions_enable=False)
queue = typer.Typer(no_args_is_help=True, help="DVC's experiment queue.")
app.add_typer(queue, name="queue")


def _tell_version(is_asked: bool) -> None:
    if is_asked:
        print(git("describe", "--tags", "--always", "--dirty"))
        raise typer.Exit


@app.callback()
def classifier(
    context: typer.Context,
    version: Annotated[
        bool,
        typer.Option(
            "--version",
            callback=_tell_version,
            is_eager=True,
            help="Show the version, a Git tag, and exit.",
        ),
    ] = False,
) -> None:
    """Trace, verify and promote the models of this repository."""
    if context.invoked_subcommand != "sync" and any(not journal.is_being_written() for journal in journals()):
        _send_journals()


@app.command()
def sync() -> None:
    """Upload tracking records queued while MLflow was unreachable. Exits with 1 if some could not be sent."""
    waiting = len(journals())
    if not _send_journals():
        raise PipelineError(f"{len(journals())} of {waiting} journals are not sent")
    print(f"{waiting} journals were waiting; nothing is left to send" if waiting else "Nothing is waiting to be sent")


@app.command()
def ui(port: Annotated[int, typer.Option(help="Port of the MLflow UI.")] = 5000) -> None:
    """Start the MLflow UI for this repository. Ctrl-C stops it."""
    from classifier.tracking.store import connect, serve_pages

    serve_pages(port, connect(load_params().experiment))


@app.command()
def predict(
    context: typer.Context,
    images: Annotated[
        list[str], typer.Argument(metavar="IMAGE|FOLDER|ZIP...", help="Images, folders or zips of them.")
    ],
    model: Annotated[
        str | None,
        typer.Option(
            help="An exported file with its manifest.json beside it, or champion; by default models/export/model.onnx."
        ),
    ] = None,
    trust: Annotated[
        bool, typer.Option("--trust", help="Open a .pth or .pt2 file from elsewhere, which can run code.")
    ] = False,
    form: Annotated[
        Literal["table", "csv", "json"] | None,
        typer.Option("--format", help="Output format; by default a table on a terminal and CSV elsewhere."),
    ] = None,
    output: Annotated[str | None, typer.Option("--output", "-o", help="Write to this file.")] = None,
) -> None:
    """Classify images. Unusable files are reported and skipped; the exit code is then 1."""
    from tqdm import tqdm

    from classifier.cli import prediction

    faults = 0

    def complain(fault: str) -> None:
        nonlocal faults
        faults += 1
        tqdm.write(fault, file=sys.stderr)

    caller = Path(context.obj)
    found = prediction.find_images(images, caller, complain)
    if not found:
        raise PipelineError("No images: give image files, or folders or zips of images")
    on_terminal = output is None and sys.stdout.isatty()
    with ExitStack() as stack:
        chosen = stack.enter_context(prediction.opened(model, caller, load_params().registered_model, trust))
        # A progress bar would mix with the table
        answers = prediction.predict(chosen, found, complain, hide_progress=on_terminal)
        file = sys.stdout
        if output is not None:
            written = stack.enter_context(atomic(caller / output))
            file = stack.enter_context(written.open("w", encoding="utf-8", newline=""))
        form = form or ("table" if on_terminal else "csv")
        if form == "table":
            width = max(len(image.name) for image in found)
            prediction.write_table(answers, chosen.classes, width, file)
        else:
            write = prediction.write_csv if form == "csv" else prediction.write_json
            write(answers, chosen.classes, file)
        file.flush()
    if faults:
        raise PipelineError(f"{faults} not classified, for the reasons above; all other images were")


@app.command()
def lineage(
    context: typer.Context,
    target: Annotated[
        str | None,
        typer.Argument(help="A model file, MLflow run id, DVC experiment or Git commit; by default the model here."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, with all runs and versions.")] = False,
    patch: Annotated[
        bool, typer.Option("--patch", help="Print the uncommitted code changes of a run, for git apply.")
    ] = False,
) -> None:
    """Show which data, code and parameters made a model, and how to restore that state."""
    from classifier.provenance.lineage import describe, patch_of, trace, trace_here

    if patch:
        sys.stdout.buffer.write(patch_of(target or "no target"))
        return
    found = trace(_from_caller(context, target)) if target else trace_here()
    if as_json:
        print(json.dumps(dataclasses.asdict(found), indent=2))
    else:
        _print_lines(describe(found))


@app.command()
def restore() -> None:
    """Restore the committed parameters and results. Code is not touched."""
    from classifier.provenance.restore import restore_committed

    _print_lines("\n".join(restore_committed(REPORTS / "before-restore")))


@app.command()
def verify(
    revision: Annotated[str | None, typer.Argument(help="A Git commit; by default this checkout as it is.")] = None,
) -> None:
    """Rebuild every output in a clean clone and compare. Exits with 1 if one has drifted."""
    from classifier.provenance.verify import verify

    found = verify(revision)
    width = max(len(verdict.path) for verdict in found.verdicts)
    for verdict in found.verdicts:
        _print_lines(f"{verdict.path:{width}}  {verdict.verdict}{verdict.reason and ': '}{verdict.reason}")
    for key, (recorded, here) in found.environment.items():
        print(f"environment: {key}: recorded {recorded}, here {here}")
    if not found.environment:
        print("environment: the same as recorded")
    if found.drifted:
        raise PipelineError(
            f"{len(found.drifted)} of {len(found.verdicts)} outputs drifted: {', '.join(found.drifted)}"
        )


@app.command()
def push() -> None:
    """Push all results in DVC's cache to the remote, so that `dvc repro --pull` in another clone finds them."""
    from classifier.provenance.storage import push_results

    print(f"{push_results()} files pushed")


@app.command()
def promote(
    context: typer.Context,
    target: Annotated[
        str, typer.Argument(help="A model file, MLflow run id, DVC experiment or Git commit, or a version number.")
    ] = str(WEIGHTS),
    force: Annotated[
        bool, typer.Option("--force", help="Promote even if it is not clearly better, or cannot be compared.")
    ] = False,
) -> None:
    """Make a version the champion if it is clearly more accurate than the current one on the same test images."""
    from classifier.provenance.lineage import trace
    from classifier.tracking.registry import find_version, promote, version_called

    name = load_params().registered_model
    if target.isdecimal():
        found = find_version(name, target)
        versions = [found] if found else []
    else:
        versions = trace(_from_caller(context, target)).versions
    version = version_called(name, versions, target)
    _print_lines(promote(version, force))


@app.command()
def seeds(
    count: Annotated[
        int, typer.Option("--count", "-n", min=2, help="Number of seeds, counted up from the one in params.yaml.")
    ] = 5,
    settings: Settings = None,
    workers: Jobs = 1,
) -> None:
    """Train with several seeds in DVC's queue; print mean and standard deviation of each metric."""
    from classifier.cli.repetitions import run_seeds

    _print_spread(run_seeds(count, settings or [], workers, REPORTS), count, "seed")


@app.command()
def folds(
    count: Annotated[int, typer.Option("--count", "-n", min=2, max=100, help="Number of folds.")] = 5,
    settings: Settings = None,
    workers: Jobs = 1,
) -> None:
    """Cross-validate in DVC's queue; print mean and standard deviation of the validation metrics."""
    from classifier.cli.repetitions import run_folds

    _print_spread(run_folds(count, settings or [], workers, REPORTS), count, "fold")


@app.command()
def upgrade_store() -> None:
    """Back up mlflow.db, then migrate it to the schema of the installed MLflow."""
    from classifier.tracking.store import upgrade_store

    print(f"Upgraded; backup: {upgrade_store()}")


@queue.command()
def resume(
    workers: Jobs = 1,
) -> None:
    """Requeue experiments whose workers were killed, and remove the repository copies that they left."""
    from classifier.cli.experiment_queue import dvc, recover

    names, copies = recover()
    print(f"Queued again: {', '.join(names) or 'nothing'}")
    print(f"Abandoned copies removed: {len(copies)}")
    print(dvc("queue", "start", "--jobs", str(workers)).strip())


@app.command()
def report(
    against: Annotated[
        str | None,
        typer.Option(help="A commit or DVC experiment to compare with; by default HEAD, or the commit before."),
    ] = None,
) -> None:
    """Write an HTML report about the model in this checkout. It can be read offline."""
    from classifier.cli.report import write_report
    from classifier.provenance.lineage import describe, trace_here

    target = REPORTS / "report.html"
    try:
        text = describe(trace_here())
    except PipelineError as unknown:  # the report is still useful without the lineage
        text = str(unknown)
    write_report(target, against, text)
    print(f"Written: {target}")


@app.command()
def samples() -> None:
    """Draw the first training images as the network sees them, with balance and augmentation from params.yaml."""
    from classifier.cli.samples import draw_samples

    target = REPORTS / "samples.png"
    draw_samples(target)
    print(f"Written: {target}")


def _print_lines(text: str) -> None:
    """Print text that may hold names from files, Git or MLflow, with control characters escaped."""
    for line in text.split("\n"):
        print(printable(line))


def _print_spread(table: "pd.DataFrame", count: int, what: str) -> None:
    print(f"\n{count} {what}s, mean ± standard deviation (lowest to highest)")
    for metric, row in table.iterrows():
        print(f"{metric:20} {row['mean']:.4f} ± {row['std']:.4f} ({row['min']:.4f} to {row['max']:.4f})")
    print(f"Each {what}: {REPORTS / f'{what}s.csv'}; picture: {REPORTS / f'{what}s.png'}")


def _send_journals() -> bool:
    """Upload queued tracking records and print what failed. Returns whether all were sent."""
    from classifier.tracking.sender import send_to_every_store

    faults = send_to_every_store()
    for folder, fault in faults.items():
        print(f"{folder}: not sent: {printable(str(fault))}", file=sys.stderr)
    return not faults


def _from_caller(context: typer.Context, target: str) -> str:
    """The path of a file given relative to the caller's folder; other targets unchanged."""
    file = Path(context.obj) / target
    return str(file) if file.is_file() else target


def main() -> None:
    """Run the command in the repository of this code, whatever the current folder."""
    called_in = Path.cwd()
    os.chdir(Path(__file__).parents[2])
    run_main(lambda: app(prog_name="classifier", obj=called_in))
