"""Which of the project's modules a module imports, found in the source: imports inside functions count too."""

import ast
from collections.abc import Collection
from itertools import accumulate
from pathlib import Path

ROOT = Path(__file__).parent.parent


def imported_names(path: Path) -> set[str]:
    """Dotted names that a file imports, and the packages they are in; `from a.b import c` gives `a` and `a.b.c` too."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names | {package for name in names for package in accumulate(name.split("."), "{}.{}".format)}


def project_file(name: str) -> str | None:
    """The file of a dotted module name, relative to the repository, or None for other people's modules."""
    path = Path(*name.split("."))
    for candidate in (path.with_suffix(".py"), path / "__init__.py"):
        if name.split(".")[0] in ("classifier", "stages") and (ROOT / candidate).is_file():
            return candidate.as_posix()
    return None


def project_files_behind(path: str, passed_over: Collection[str] = ()) -> set[str]:
    """The file itself and every file of the project that it imports, directly or not, save for those passed over."""
    found: set[str] = set()
    waiting = [path]
    while waiting:
        file = waiting.pop()
        if file not in found and file not in passed_over:
            found.add(file)
            waiting += [f for name in imported_names(ROOT / file) if (f := project_file(name))]
    return found
