"""Files of the user's own that params.yaml names and Git does not have: where they are, also for DVC's copies.

`dvc exp run --temp` and DVC's queue run experiments in copies of the repository that hold what Git has.
"""

import os
from pathlib import Path

from classifier.pipeline.errors import PipelineError
from classifier.pipeline.outputs import is_there
from classifier.pipeline.paths import repository_root


def is_copy() -> bool:
    """Whether this folder is one of DVC's copies of the repository."""
    return repository_root().resolve() != Path.cwd()


def find_data(data_path: Path) -> None:
    """Make sure that there is something at `data_path`, in DVC's copies by links to what the main checkout has.

    A file that the copy has stays as it is. Raises PipelineError if there is nothing, with the places looked at.
    """
    if is_copy() and not data_path.is_absolute():
        _link(data_path, repository_root() / data_path)
    if not is_there(data_path):
        places = "" if data_path.is_absolute() else f" in {repository_root()}"
        if places and is_copy():
            places = f", neither{places} nor in the copy of it that this experiment runs in, {Path.cwd()}"
        raise PipelineError(
            f"params.yaml: data_path: there is no {data_path}{places}.\n"
            "Put your images there, or give their whole path, from / on: -S data_path=/where/they/are"
        )


def _link(link: Path, original: Path) -> None:
    if ".." in Path(os.path.normpath(link)).parts:
        raise PipelineError(
            f"params.yaml: data_path: {link} is outside of the repository. This experiment runs in a copy elsewhere.\n"
            f"Give the whole path: -S data_path={Path(os.path.normpath(original))}"
        )
    if not link.exists():
        if is_there(original):
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(original.absolute(), target_is_directory=original.is_dir())
    elif link.is_dir() and original.is_dir():  # of which Git has a part, as of data/own
        for file in original.rglob("*"):
            target = link / file.relative_to(original)
            if file.is_file() and not target.exists():
                target.parent.mkdir(parents=True, exist_ok=True)
                # No symbolic link: images behind one are not taken, lest a folder leads out of itself
                target.hardlink_to(file)
