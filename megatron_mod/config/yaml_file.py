"""A YAML file with the line of each setting."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

Lines = dict[tuple[str, ...], int]  # (section,) or (section, field) -> line, from 1


def read_yaml(path: Path) -> tuple[Any, Lines]:
    """The content of a file, and the line of every key of its first two levels.

    Raises:
        ValueError: no file, not UTF-8, not YAML, or a key that is set twice.
    """
    if not path.is_file():
        raise ValueError(f"{path}: no such file.")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise ValueError(
            f"{path}, line {line}: is not UTF-8 ({error.reason}); save the file as UTF-8."
        ) from error
    return parse_yaml(text, name=str(path))


def parse_yaml(text: str, *, name: str) -> tuple[Any, Lines]:
    """As ``read_yaml``, of a text that messages call ``name``."""
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        content = loader.construct_document(node) if node else None
    except (yaml.YAMLError, RecursionError) as error:
        raise ValueError(f"{name}{_line(error)}: not valid YAML: {_what(error)}.") from error
    return content, dict(_lines(node, ()))


class _Loader(yaml.SafeLoader):
    """PyYAML takes the last of several values of a key; that would lose a whole section."""

    def construct_mapping(self, node: yaml.Node, deep: bool = False) -> dict:
        first: dict[str, int] = {}
        for key, _ in node.value if isinstance(node, yaml.MappingNode) else ():
            name = str(key.value)
            if name in first and name != "<<":
                raise yaml.constructor.ConstructorError(
                    problem=f"{name!r} is set twice, first in line {first[name]}",
                    problem_mark=key.start_mark,
                )
            first[name] = key.start_mark.line + 1
        return super().construct_mapping(node, deep=deep)


def _lines(node: yaml.Node | None, above: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], int]]:
    if isinstance(node, yaml.MappingNode) and len(above) < 2:
        for key, value in node.value:
            yield (*above, str(key.value)), key.start_mark.line + 1
            yield from _lines(value, (*above, str(key.value)))


def _line(error: Exception) -> str:
    mark = getattr(error, "problem_mark", None)
    return f", line {mark.line + 1}" if mark else ""


def _what(error: Exception) -> str:
    return str(getattr(error, "problem", None) or error).splitlines()[0]
