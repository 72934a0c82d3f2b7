"""YAML as DVC writes it, read safely and fast."""

import re
from typing import Any

import yaml

MAX_MARKS = 2_000  # more are parsed in Python


class _Rules(yaml.constructor.SafeConstructor):
    """YAML 1.1 as PyYAML reads it, with two changes.

    1e-06, which DVC writes, and 1.5e3 are numbers, as in YAML 1.2. The merge key `<<` is an error: a few nested ones
    use up all memory.
    """

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        for key, _ in node.value:
            if key.tag == "tag:yaml.org,2002:merge":
                raise yaml.constructor.ConstructorError(None, None, "the key << is not supported", key.start_mark)
        super().flatten_mapping(node)


class _Loader(_Rules, yaml.SafeLoader):
    """The parser in Python. It raises an error where nesting is too deep."""


class _FastLoader(_Rules, getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
    """The parser in C if PyYAML has it. It is seven times as fast; very deep nesting crashes it."""


for _loader in (_Loader, _FastLoader):
    _loader.add_implicit_resolver(
        "tag:yaml.org,2002:float",
        re.compile(r"^[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)[eE][-+]?[0-9]+$"),
        list("-+.0123456789"),
    )


def read_yaml(content: str | bytes) -> Any:
    """Parse params.yaml or dvc.lock, unchecked. Raises yaml.YAMLError or ValueError if it is not YAML."""
    text = content.decode("latin-1") if isinstance(content, bytes) else content
    # Each nested level starts with one of these; nesting by indentation alone needs long lines
    is_flat = sum(text.count(mark) for mark in "[{-?") < MAX_MARKS
    try:
        return yaml.load(content, Loader=_FastLoader if is_flat else _Loader)  # noqa: S506, both are SafeLoaders
    except (yaml.YAMLError, ValueError):
        raise
    except Exception as error:  # PyYAML's bugs: `!!bool x`, `!!int ''`, endless nested lists
        raise ValueError(f"{type(error).__name__}: {error}") from None
