"""What is said of a name or a value that a user wrote and that is not taken."""

from __future__ import annotations

import argparse
import difflib
import types
import typing
from collections.abc import Iterable
from typing import Any, Literal

import jsonargparse

_WORDS = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}


class Help(jsonargparse.DefaultHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Defaults beside the options, and the description as it was written."""


def nearest(name: str, known: Iterable[str]) -> str:
    """The known name that is most like another one, as a whole or in what follows its last dot; of
    equals the first, or if the name has a dot the one that is most like it as a whole."""

    def likeness(candidate: str) -> tuple[float, float]:
        whole = _ratio(name, candidate)
        likeness = max(whole, _ratio(_last(name), _last(candidate)))
        return likeness, whole if "." in name else 0.0

    return max(known, key=likeness)


def accepts(hint: Any, value: Any, *, key: str = "") -> bool:
    """Whether the command line (a text), or a file, may give a value to a setting of this type.

    ``key``: of a mapping, if the value is for that one alone.
    """
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_argument("--value", type=hint)
    try:
        if isinstance(value, str):
            parser.parse_args([f"--value{key and f'.{key}'}={value}"])
        else:
            parser.parse_object({"value": value})
    except argparse.ArgumentError:
        return False
    return True


def describe(hint: Any) -> str:
    """A type in words, such as ``a number or a list of numbers``."""
    if hint in _WORDS:
        return _WORDS[hint]
    kind, parts = typing.get_origin(hint), typing.get_args(hint)
    if kind in (typing.Union, types.UnionType):
        return _or(word for part in parts for word in _alternatives(part))
    if kind is Literal:
        return _or(_alternatives(hint))
    if kind in (list, tuple):
        return f"a list of {_many(parts[0])}"
    assert kind is dict, hint
    return "a mapping" if parts[1] is Any else f"a mapping to {_many(parts[1])}"


def _alternatives(hint: Any) -> list[str]:
    if typing.get_origin(hint) is Literal:
        return [str(part) for part in typing.get_args(hint)]
    return ["null" if hint is type(None) else describe(hint)]


def _many(hint: type) -> str:
    return _WORDS[hint].removeprefix("a ") + "s" * (hint is not str)


def _or(words: Iterable[str]) -> str:
    *first, last = words
    return f"{', '.join(first)} or {last}" if first else last


def _last(name: str) -> str:
    return name.rsplit(".", 1)[-1]


def _ratio(a: str, b: str) -> float:
    return difflib.SequenceMatcher(None, a, b).ratio()
