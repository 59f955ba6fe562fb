"""The command lines of the tools, each made from one documented dataclass."""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import sys
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import docstring_parser
import jsonargparse

from megatron_mod.config import mistakes, rules
from megatron_mod.config.mistakes import Help

Schema = TypeVar("Schema")


class Options:
    """A command's options; a subclass is a frozen dataclass whose docstring describes the command
    and, under ``Args:``, each option.

    A field ``batch_size`` is the option ``--batch-size``, which may also be written
    ``--batch_size``; a ``bool`` is a flag, a tuple takes several values. Metadata of a field
    (``rules.setting``): ``aliases``, further names of the option; ``positional``, what the usage
    calls a value without a name; ``may_be_empty``, for a tuple; ``alone``, the value of an option
    that is named without one.

    Raises:
        ValueError: a value that its field's rule refuses.
    """

    def __post_init__(self) -> None:
        titles = {f.name: f.metadata.get("positional") for f in dataclasses.fields(self)}
        rules.check(
            self, name=lambda field, value: f"{titles[field] or option(field)} {_shown(value)}"
        )


def option(field: str) -> str:
    """What the command line calls a field of ``Options``."""
    return f"--{field.replace('_', '-')}"


def parse_options(schema: type[Schema], arguments: Sequence[str] | None = None) -> Schema:
    """A command's options (default: of ``sys.argv``).

    Raises:
        ValueError: an unknown option (with the nearest name), a value of the wrong type, a required
            option that is missing, or what the dataclass itself refuses.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    fields = sorted(dataclasses.fields(schema), key=lambda field: field.kw_only)  # shared ones last
    entries = [_Entry.of(schema, field) for field in fields]
    named = {name: entry for entry in entries for name in entry.names}
    arguments = [_hyphenated(argument) for argument in arguments]
    for name, _ in _given(arguments):
        if name not in (*named, "--help"):
            nearest = mistakes.nearest(name, named)
            raise ValueError(f"{name}: no such option; did you mean {nearest}?")
    parser = _parser(schema, entries)
    try:
        values = parser.parse_args(arguments)
    except argparse.ArgumentError as error:
        raise ValueError(_explain(error, arguments, entries)) from error
    return schema(**{entry.field: entry.value(values[entry.field]) for entry in entries})


@dataclass(frozen=True)
class _Entry:
    """A field as the parser takes it; ``hint`` is the type of one value."""

    field: str
    names: tuple[str, ...]
    hint: Any
    default: Any
    metadata: Mapping[str, Any]

    @classmethod
    def of(cls, schema: type, field: dataclasses.Field) -> _Entry:
        names = (option(field.name), *field.metadata.get("aliases", ()))
        hint = typing.get_type_hints(schema)[field.name]
        if typing.get_origin(hint) in (typing.Union, types.UnionType):
            (hint,) = (part for part in typing.get_args(hint) if part is not type(None))
        if "positional" in field.metadata:
            names = ()
        return cls(field.name, names, hint, field.default, field.metadata)

    @property
    def is_required(self) -> bool:
        return self.default is dataclasses.MISSING

    @property
    def is_list(self) -> bool:
        return typing.get_origin(self.hint) is tuple

    @property
    def one(self) -> Any:
        """The type of one value."""
        return typing.get_args(self.hint)[0] if self.is_list else self.hint

    def value(self, parsed: Any) -> Any:
        return tuple(parsed or ()) if self.is_list else parsed

    def add_to(self, parser: jsonargparse.ArgumentParser, text: str) -> None:
        if not self.names:
            parser.add_argument(
                self.field, metavar=self.metadata["positional"], type=self.one, help=text
            )
            return
        if self.hint is bool:
            parser.add_argument(*self.names, action="store_true", help=text)
            return
        many = {"nargs": "*" if self.metadata.get("may_be_empty") else "+"} if self.is_list else {}
        if "alone" in self.metadata:
            many = {"nargs": "?", "const": self.metadata["alone"]}
        if self.is_required:
            many["required"] = True
        else:
            many["default"] = list(self.default) if self.is_list else self.default
        parser.add_argument(*self.names, type=self.one, help=text, **many)


def _parser(schema: type, entries: list[_Entry]) -> jsonargparse.ArgumentParser:
    documented = [docstring_parser.parse(kind.__doc__ or "") for kind in schema.__mro__]
    texts = {each.arg_name: each.description for doc in documented for each in doc.params}
    parser = jsonargparse.ArgumentParser(
        description=inspect.cleandoc(schema.__doc__).partition("\n\nArgs:")[0],
        exit_on_error=False,
        formatter_class=Help,
    )
    for entry in entries:
        entry.add_to(parser, texts[entry.field])
    return parser


def _hyphenated(argument: str) -> str:
    name, equals, value = argument.partition("=")
    return name.replace("_", "-") + equals + value if name.startswith("--") else argument


def _given(arguments: Sequence[str]) -> Iterator[tuple[str, str | None]]:
    """Each option with each of its values; once with ``None`` where it is named."""
    name = None
    for argument in arguments:
        if argument.startswith("--"):
            name, equals, value = argument.partition("=")
            yield name, None
            if equals:
                yield name, value
        elif name:
            yield name, argument


def _explain(error: argparse.ArgumentError, arguments: Sequence[str], entries: list[_Entry]) -> str:
    """The parser's message in one line that says what the user has to change."""
    named = {name: entry for entry in entries for name in entry.names}
    given = list(_given(arguments))
    for name, value in given:
        entry = named[name]
        if value is not None and entry.hint is not bool and not mistakes.accepts(entry.one, value):
            return f"{name} {value}: must be {mistakes.describe(entry.one)}."
    present = {named[name].field for name, _ in given}
    missing = [
        entry.names[0]
        for entry in entries
        if entry.names and entry.is_required and entry.field not in present
    ]
    if str(error).startswith("the following arguments are required"):
        missing += [entry.metadata["positional"] for entry in entries if not entry.names]
    if missing:
        return f"{', '.join(missing)}: required; --help says what for."
    return f"{str(error).splitlines()[0].removeprefix('argument ')}; --help says more."


def _shown(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
