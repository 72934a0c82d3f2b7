"""Download stage: the data source's original files.

Reads   what the source reads: the network, or data_path
Writes  data/raw/
"""

from pathlib import Path

from classifier.pipeline.errors import PipelineError, printable, run_main
from classifier.pipeline.params import load_params
from classifier.pipeline.paths import RAW
from classifier.pipeline.signals import Interrupted
from classifier.sources import load_source

SHOWN_FILES = 8
# DVC removes a stage's outputs before it starts.
WAY_BACK = "If there was an earlier download, `dvc checkout data/raw` brings it back."


def main() -> None:
    params = load_params()
    try:
        load_source(params.source).fetch(RAW, Path(params.data_path))
    except PipelineError as error:
        raise PipelineError(f"{error}\n{WAY_BACK}") from None
    except Interrupted as interrupt:
        interrupt.add_note(WAY_BACK)
        raise
    sizes = {file: file.stat().st_size for file in sorted(RAW.rglob("*")) if file.is_file()}
    for file in list(sizes)[:SHOWN_FILES]:
        print(f"{printable(str(file))}  {sizes[file]:,} bytes")
    print(f"files: {len(sizes):,}, {sum(sizes.values()):,} bytes")


if __name__ == "__main__":
    run_main(main)
