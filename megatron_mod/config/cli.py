"""A training's command line: a YAML file, overridden by ``--section.field value``."""

from __future__ import annotations

import argparse
import dataclasses
import sys
import typing
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jsonargparse
import yaml

from megatron_mod.config import mistakes
from megatron_mod.config.schema import Config
from megatron_mod.config.validate import check_values
from megatron_mod.config.yaml_file import parse_yaml, read_yaml

SECTIONS: dict[str, type] = typing.get_type_hints(Config)
FIELDS: dict[str, dataclasses.Field] = {
    f"{section}.{field.name}": field
    for section, schema in SECTIONS.items()
    for field in dataclasses.fields(schema)
}
SHORT = {"--log-level": "--logging.level"}
_OTHER_OPTIONS = ("config", "help", "print_config")


def parse(arguments: list[str] | None = None, *, description: str | None = None) -> Config:
    """The run's configuration from ``--config FILE`` and overrides (default: ``sys.argv``).

    Raises:
        ValueError: an unknown key (with the nearest name), one that is set twice in a file, a value
            of the wrong type or range, or a required setting that is missing.
    """
    arguments = list(map(_in_full, sys.argv[1:] if arguments is None else arguments))
    given = list(_given(arguments))
    _check_names(given)
    parser = _parser(description)
    try:
        values = parser.parse_args(arguments)
    except argparse.ArgumentError as error:
        raise ValueError(_explain(error, given)) from error
    values = parser.instantiate_classes(values)
    config = Config(**{section: values[section] for section in SECTIONS})
    source = {each.field: each for each in given}
    check_values(config, place=lambda name: source[name].in_file if name in source else "")
    return config


def check_names(arguments: Sequence[str]) -> None:
    """Refuse names that are no settings, as ``parse`` does.

    Raises:
        ValueError: with the nearest name.
    """
    _check_names(_given(list(map(_in_full, arguments))))


def split(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """A training's settings (``--section.field value``), and all other arguments."""
    return _divide(arguments, lambda name: "." in name)


def split_section(arguments: Sequence[str], section: str) -> tuple[list[str], list[str]]:
    """The settings of a section, and all other arguments."""
    return _divide(arguments, lambda name: name.startswith(f"{section}."))


def split_off(arguments: Sequence[str], options: Iterable[str]) -> tuple[list[str], list[str]]:
    """The arguments of these options (``--batch-size`` or ``--batch_size``), and all others."""
    names = set(options)
    return _divide(arguments, lambda name: f"--{name.replace('_', '-')}" in names)


def _divide(arguments: Sequence[str], chosen: Callable[[str], bool]) -> tuple[list[str], list[str]]:
    these: list[str] = []
    into = others = []
    for argument in arguments:
        if argument.startswith("--"):
            into = these if chosen(argument[2:].partition("=")[0]) else others
        into.append(argument)
    return these, others


def _in_full(argument: str) -> str:
    name, equals, value = argument.partition("=")
    return SHORT.get(name.replace("_", "-"), name) + equals + value


def to_yaml(config: Config) -> str:
    """The resolved configuration, as ``--config`` takes it."""
    return yaml.safe_dump(dataclasses.asdict(config), sort_keys=False)


def _parser(description: str | None) -> jsonargparse.ArgumentParser:
    parser = jsonargparse.ArgumentParser(
        description=description, exit_on_error=False, formatter_class=mistakes.Help
    )
    parser.add_argument("--config", action="config", help="YAML file with these settings")
    for section, schema in SECTIONS.items():
        parser.add_class_arguments(schema, section)
    return parser


@dataclass(frozen=True)
class Given:
    """A setting as the user wrote it: on the command line (as text), or in a line of a file."""

    name: str
    value: Any
    file: Path | None = None
    line: int | None = None

    @property
    def place(self) -> str:
        return self.in_file.strip(" ()") or "command line"

    @property
    def in_file(self) -> str:
        return f" ({self.file}, line {self.line})" if self.file else ""

    @property
    def field(self) -> str | None:
        """The field it sets, or one key of."""
        section, _, rest = self.name.partition(".")
        name = f"{section}.{rest.partition('.')[0]}"
        return name if name in FIELDS else None

    @property
    def is_accepted(self) -> bool:
        if self.field is None or (self.file is None and self.value is None):
            return True
        section, name = self.field.split(".")
        hint = typing.get_type_hints(SECTIONS[section])[name]
        return mistakes.accepts(hint, self.value, key=self.name[len(self.field) + 1 :])


def _given(arguments: Sequence[str]) -> Iterator[Given]:
    """Every setting, in the order in which the last one counts.

    Raises:
        ValueError: a file that cannot be read, or that sets a field twice.
    """
    for position, argument in enumerate(arguments):
        if not argument.startswith("--"):
            continue
        name, equals, value = argument[2:].partition("=")
        if not equals:
            value = next(iter(arguments[position + 1 : position + 2]), None)
        if name in ("config", *SECTIONS) and not value:
            raise ValueError(f"--{name}: needs a file.")
        if name == "config":
            yield from _in_file(Path(value))
        elif name in SECTIONS:
            yield from _in_section(name, value)
        else:
            yield Given(name, value)


def _in_file(path: Path) -> Iterator[Given]:
    content, lines = read_yaml(path)
    if not isinstance(content, dict):
        raise ValueError(f"{path}: must hold sections ({', '.join(SECTIONS)}).")
    for section, fields in content.items():
        line = lines.get((str(section),))
        if section not in SECTIONS:
            yield Given(str(section), fields, path, line)
        elif not isinstance(fields, dict):
            raise ValueError(
                f"{path}, line {line}: section {section!r} must hold fields, not {fields!r}."
            )
        else:
            for name, value in fields.items():
                yield Given(f"{section}.{name}", value, path, lines.get((section, str(name)), line))


def _in_section(section: str, text: str) -> Iterator[Given]:
    """``--section FILE`` or ``--section '{field: value, ...}'``."""
    path = None if text.lstrip().startswith("{") else Path(text)
    content, lines = read_yaml(path) if path else parse_yaml(text, name=f"--{section}")
    if not isinstance(content, dict):
        raise ValueError(f"--{section} {text}: must hold fields, or be a file that does.")
    for name, value in content.items():
        yield Given(f"{section}.{name}", value, path, lines.get((str(name),)))


def _check_names(given: Iterable[Given]) -> None:
    first: dict[tuple[Path, str], Given] = {}
    for each in given:
        if each.field is None and each.name not in (*SECTIONS, *_OTHER_OPTIONS):
            nearest = mistakes.nearest(each.name, (*FIELDS, *SECTIONS))
            raise ValueError(f"{each.place}: unknown key {each.name!r}; did you mean {nearest!r}?")
        if each.file and first.setdefault((each.file, each.name), each).line != each.line:
            line = first[each.file, each.name].line
            raise ValueError(f"{each.place}: {each.name} is set twice, first in line {line}.")


def _explain(error: argparse.ArgumentError, given: list[Given]) -> str:
    """The parser's message in one line that says what the user has to change, and where."""
    for each in given:
        if not each.is_accepted:
            section, name = each.field.split(".")
            hint = typing.get_type_hints(SECTIONS[section])[name]
            return f"{each.name} = {each.value}{each.in_file}: must be {mistakes.describe(hint)}."
    named = {each.field for each in given}
    for name, field in FIELDS.items():
        if name not in named and field.default is field.default_factory is dataclasses.MISSING:
            return f"{name}: must be set; give --{name} VALUE, or name it in the --config file."
    return str(error).splitlines()[0]
