"""Run a stage of the pipeline: `python -m stages train`."""

import os
import shutil
import sys
from pathlib import Path

BYTECODE_BYTES = 2**26  # free bytes below which Python writes no bytecode

# On a full disk, Python 3.11 leaves truncated bytecode behind if it takes more than a page, as that of this file does
# not. Every later start fails on it, even when the disk has room again.
if shutil.disk_usage(Path(__file__).parent).free < BYTECODE_BYTES:
    sys.dont_write_bytecode = True
    os.environ["PYTHONDONTWRITEBYTECODE"] = "1"

from stages.runner import main  # noqa: E402

if __name__ == "__main__":  # worker processes import this file too
    main()
