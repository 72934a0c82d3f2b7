"""Check stage: parameters in, a file that says that they are right out.

Reads   params.yaml
Writes  data/checked, which never changes, and on which all other stages depend

DVC removes the outputs of a stage before it runs it, so a wrong parameter has to be found before it comes to that.
In DVC's copies of the repository, images that Git does not have are made available too.
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
        way_back = "" if is_copy() else f" `classifier restore` brings back the committed {PARAMS}."
        raise PipelineError(f"{error}\nNo other stage has run, and no result was removed.{way_back}") from None
    with atomic(CHECKED) as path:
        path.write_text("All parameters are right.\n", encoding="utf-8")
