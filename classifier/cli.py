"""The command line: `classifier lineage`, and what else is asked of a trained model after the pipeline has run."""

import dataclasses
import json
import sys
from typing import Annotated

import typer

from classifier.errors import run_main

app = typer.Typer(no_args_is_help=True, add_completion=True, pretty_exceptions_enable=False)


@app.callback()
def _classifier() -> None:
    """Trace, verify, compare and promote the models of this repository."""


@app.command()
def lineage(
    target: Annotated[str, typer.Argument(help="A model file, MLflow run id, DVC experiment or Git commit.")] = "HEAD",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    patch: Annotated[
        bool, typer.Option("--patch", help="Print the patch of a run: code that its commit has not.")
    ] = False,
) -> None:
    """Print what made a model, and the commands that bring exactly that state back."""
    from classifier.lineage import describe, patch_of, trace

    if patch:
        sys.stdout.buffer.write(patch_of(target))
        return
    found = trace(target)
    print(json.dumps(dataclasses.asdict(found), indent=2) if as_json else describe(found))


def main() -> None:
    run_main(lambda: app(prog_name="classifier", standalone_mode=False))
