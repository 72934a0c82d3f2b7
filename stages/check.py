"""Check stage: validate the parameters before any other stage runs.

Reads   params.yaml
Writes  data/checked, whose content is constant; all other stages depend on it

DVC removes the outputs of a stage before it runs the stage, so wrong parameters must be found earlier. In DVC's
temporary copies of the repository, this stage also links the images at data_path that Git does not track.
"""

from pathlib import Path

from classifier.compute.launch import launcher_command
from classifier.pipeline.errors import PipelineError
from classifier.pipeline.outputs import atomic
from classifier.pipeline.params import load_params
from classifier.pipeline.paths import CHECKED, PARAMS
from classifier.preparation.own_files import find_data, is_copy


def main() -> None:
    try:
        params = load_params()
        launcher_command(params.launcher)
        find_data(Path(params.data_path))
    except PipelineError as error:
        hint = "" if is_copy() else f" `classifier restore` brings back the committed {PARAMS}."
        raise PipelineError(f"{error}\nNo other stage has run, and no result was removed.{hint}") from None
    with atomic(CHECKED) as path:
        path.write_text("All parameters are right.\n", encoding="utf-8")
