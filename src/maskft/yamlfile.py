"""YAML from strangers: plain values alone, bounded in length, depth and, aliases spelt out, in size."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

MAX_CHARACTERS = 1 << 18
"""Of a file."""
MAX_DEPTH = 32
"""Of mappings and lists inside each other."""
MAX_NODES = 20_000
"""Keys and values, those of aliases counted as often as they are used."""


class YamlError(ValueError):
    """The text is not YAML, or goes beyond what is read."""


class _Loader(yaml.SafeLoader):
    """YAML that reads 1e-3 as a number, and `no` and dates as words, as YAML 1.2 does."""

    yaml_implicit_resolvers = {  # noqa: RUF012 (typed by the base class)
        first: [(tag, pattern) for tag, pattern in resolvers if tag.rpartition(":")[2] not in ("bool", "timestamp")]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    _depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        self._depth += 1
        if self._depth > MAX_DEPTH:
            raise YamlError(f"it is nested more than {MAX_DEPTH} deep")
        node = super().compose_node(parent, index)
        self._depth -= 1
        return node


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile("^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF")
)


class _Dumper(yaml.SafeDumper):
    """YAML that quotes what `_Loader` would read as a number."""


for _side in (_Loader, _Dumper):
    _side.add_implicit_resolver(
        "tag:yaml.org,2002:float", re.compile(r"[-+]?\d+(?:\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
    )


def read_yaml(path: Path) -> Any:
    """The content of a file; errors as `parse_yaml`, and OSError."""
    with path.open(encoding="utf-8") as file:
        return parse_yaml(file.read(MAX_CHARACTERS + 1))


def parse_yaml(text: str) -> Any:
    """Mappings with strings as keys, lists, strings, numbers, true, false and null.

    Raises:
        YamlError: the text is not YAML, holds anything else, or is too long, too deep or too large.
    """
    if len(text) > MAX_CHARACTERS:
        raise YamlError(f"it has more than {MAX_CHARACTERS:,} characters")
    try:
        loader = _Loader(text)
        try:
            node = loader.get_single_node()
            if node is None:
                return None
            _count(node, {})
            value = loader.construct_document(node)
        finally:
            loader.dispose()
    except (yaml.YAMLError, ValueError) as error:  # the latter also of numbers
        raise YamlError(str(error)) from error
    _refuse_others(value)
    return value


def dump_yaml(value: Any) -> str:
    """Text that `parse_yaml` reads as `value`."""
    text: str = yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True)
    return text


def _count(node: Any, known: dict[int, int]) -> int:
    """Nodes of a tree, aliases spelt out; `known` holds those of inner trees, and 0 while one is being counted."""
    if id(node) in known:
        if not known[id(node)]:
            raise YamlError("an alias stands inside what it names")
        return known[id(node)]
    known[id(node)] = 0
    total = 1
    for child in [] if isinstance(node, yaml.ScalarNode) else node.value:
        total += sum(_count(one, known) for one in (child if isinstance(child, tuple) else (child,)))
    if total > MAX_NODES:
        raise YamlError(f"it has more than {MAX_NODES:,} keys and values")
    known[id(node)] = total
    return total


def _refuse_others(value: Any) -> None:
    if isinstance(value, dict):
        for key, inner in value.items():
            if not isinstance(key, str):
                raise YamlError(f"the key {key!r} is no string; put it in quotes")
            _refuse_others(inner)
    elif isinstance(value, list):
        for inner in value:
            _refuse_others(inner)
    elif value is not None and not isinstance(value, str | int | float):
        raise YamlError(f"it holds a {type(value).__name__}; write a string, a number, true, false or null")
