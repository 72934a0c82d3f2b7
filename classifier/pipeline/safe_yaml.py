"""YAML as DVC writes it, read safely and fast."""

import re
from typing import Any

import yaml

MOST_MARKS = 2_000  # in YAML that is read in C


class _Rules(yaml.constructor.SafeConstructor):
    """YAML 1.1 as PyYAML reads it, but 1e-06, which DVC writes, and 1.5e3 are numbers as in YAML 1.2.

    And without its merge key `<<`: a few lines of it, one within the other, take all memory.
    """

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        for key, _ in node.value:
            if key.tag == "tag:yaml.org,2002:merge":
                raise yaml.constructor.ConstructorError(None, None, "the key << is not taken", key.start_mark)
        super().flatten_mapping(node)


class _Loader(_Rules, yaml.SafeLoader):
    """In Python, which tells nesting that is too deep for it."""


class _FastLoader(_Rules, getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
    """In C where PyYAML has it, seven times as fast; very deep nesting crashes it."""


for _loader in (_Loader, _FastLoader):
    _loader.add_implicit_resolver(
        "tag:yaml.org,2002:float",
        re.compile(r"^[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)[eE][-+]?[0-9]+$"),
        list("-+.0123456789"),
    )


def read_yaml(content: str | bytes) -> Any:
    """What params.yaml or dvc.lock holds, unchecked. Raises yaml.YAMLError, or ValueError, if it is not YAML."""
    text = content.decode("latin-1") if isinstance(content, bytes) else content
    # What a deeper level begins with; by indentation alone, deep levels take long lines
    is_flat = sum(text.count(mark) for mark in "[{-?") < MOST_MARKS
    try:
        return yaml.load(content, Loader=_FastLoader if is_flat else _Loader)  # noqa: S506, both are SafeLoaders
    except (yaml.YAMLError, ValueError):
        raise
    except Exception as error:  # PyYAML's own, of `!!bool x`, `!!int ''`, or lists in lists without end
        raise ValueError(f"{type(error).__name__}: {error}") from None
