"""Download stage: get the original files of the data source.

Reads   the internet or data_path, depending on the source
Writes  data/raw/
"""

from pathlib import Path

from classifier.pipeline.errors import printable
from classifier.pipeline.params import load_params
from classifier.pipeline.paths import RAW
from classifier.sources import load_source

SHOWN_FILES = 8


def main() -> None:
    params = load_params()
    load_source(params.source).fetch(RAW, Path(params.data_path))
    sizes = {file: file.stat().st_size for file in sorted(RAW.rglob("*")) if file.is_file()}
    for file in list(sizes)[:SHOWN_FILES]:
        print(f"{printable(str(file))}  {sizes[file]:,} bytes")
    print(f"files: {len(sizes):,}, {sum(sizes.values()):,} bytes")
