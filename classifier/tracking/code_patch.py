"""The code patch of a run: differences from the commit, without files that may contain secrets.

New files are included only if they are code. All included lines are scanned with the rules of detect-secrets.
"""

import re
from itertools import groupby
from pathlib import PurePosixPath
from typing import NamedTuple

from classifier.tracking.git import changes, new_files

FOLDERS, SUFFIXES = ("classifier", "stages"), (".py", ".j2")  # of new files
MOST_LINES = 20_000  # scanned changed lines, at about 3,000 per second
# Rules that mistake hashes or versions for secrets
TOO_STRICT = ("Base64HighEntropyString", "HexHighEntropyString", "IPPublicDetector")


class CodePatch(NamedTuple):
    """Names of the changed files, their patch for `git apply`, and the reason for each file left out."""

    names: list[str]
    patch: bytes
    left_out: dict[str, str]


def code_patch(*paths: str) -> CodePatch:
    """Return the differences from the commit, without files that may contain secrets.

    paths: Git pathspecs that limit the patch.
    Raises PipelineError if Git cannot read a file.
    """
    names, patch = changes(*paths, takes=_is_code)
    left_out = {name: "no code of the pipeline" for name in new_files() if not _is_code(name)}
    secret = _secrets(names, patch) if patch else {}
    if secret:
        names, patch = changes(*paths, *(f":(exclude,literal){name}" for name in secret), takes=_is_code)
    return CodePatch(names, patch, left_out | secret)


def _is_code(name: str) -> bool:
    path = PurePosixPath(name)
    return path.parts[0] in FOLDERS and len(path.parts) > 1 and path.suffix in SUFFIXES


def _secrets(names: list[str], patch: bytes) -> dict[str, str]:
    """Return the files to leave out, with the reason: a possible secret, or too many changed lines to scan."""
    from detect_secrets.core.plugins.util import get_mapping_from_secret_type_to_class
    from detect_secrets.core.scan import scan_line
    from detect_secrets.settings import transient_settings

    kinds: list[type] = list(get_mapping_from_secret_type_to_class().values())
    rules = [kind.__name__ for kind in kinds if kind.__name__ not in TOO_STRICT]
    found, scanned = {}, 0
    with transient_settings({"plugins_used": [{"name": rule} for rule in rules]}):
        for name, lines in zip(names, _new_lines(patch), strict=True):
            scanned += len(lines)
            if scanned > MOST_LINES:
                found[name] = f"more than {MOST_LINES:,} changed lines"
            elif secrets := [secret for line in lines for secret in scan_line(line)]:
                found[name] = f"it may contain a secret ({secrets[0].type})"
    return found


def _new_lines(patch: bytes) -> list[list[str]]:
    """Return the added lines of each file of a patch."""
    parts = re.split(r"^diff --git ", patch.decode(errors="replace"), flags=re.MULTILINE)[1:]
    # A file that becomes a link, or a link that becomes a file, has two parts with the same first line
    files = [list(group) for _, group in groupby(parts, key=lambda part: part.partition("\n")[0])]
    return [
        [line[1:] for part in file for line in part.split("\n") if line.startswith("+") and not line.startswith("+++ ")]
        for file in files
    ]
