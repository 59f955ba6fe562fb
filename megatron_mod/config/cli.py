"""The command line: a YAML file, overridden by ``--section.field value``."""

from __future__ import annotations

import dataclasses
import difflib
import sys
import typing
from collections.abc import Iterable
from pathlib import Path

import jsonargparse
import yaml

from megatron_mod.config.schema import Config
from megatron_mod.config.validate import check_values

SECTIONS: dict[str, type] = typing.get_type_hints(Config)
FIELDS = tuple(
    f"{section}.{field.name}"
    for section, schema in SECTIONS.items()
    for field in dataclasses.fields(schema)
)


def parse(arguments: list[str] | None = None, *, description: str | None = None) -> Config:
    """The run's configuration from ``--config FILE`` and overrides (default: ``sys.argv``).

    Raises:
        ValueError: an unknown key (with the nearest name), a value of the wrong type or range,
            or a required setting that is missing.
    """
    parser = _parser(description)
    arguments = sys.argv[1:] if arguments is None else arguments
    _check_names(_option_names(arguments), where="command line")
    for path in _config_files(arguments):
        _check_names(_file_names(path), where=str(path))
    try:
        values = parser.parse_args(arguments)
    except jsonargparse.ArgumentError as error:
        raise ValueError(str(error)) from error
    values = parser.instantiate_classes(values)
    config = Config(**{section: values[section] for section in SECTIONS})
    check_values(config)
    return config


def to_yaml(config: Config) -> str:
    """The resolved configuration, as ``--config`` takes it."""
    return yaml.safe_dump(dataclasses.asdict(config), sort_keys=False)


def _parser(description: str | None) -> jsonargparse.ArgumentParser:
    parser = jsonargparse.ArgumentParser(description=description, exit_on_error=False)
    parser.add_argument("--config", action="config", help="YAML file with these settings")
    for section, schema in SECTIONS.items():
        parser.add_class_arguments(schema, section)
    return parser


def _option_names(arguments: list[str]) -> Iterable[str]:
    for argument in arguments:
        if argument.startswith("--"):
            yield argument[2:].split("=", 1)[0]


def _config_files(arguments: list[str]) -> Iterable[Path]:
    for position, argument in enumerate(arguments):
        if argument == "--config" and position + 1 < len(arguments):
            yield Path(arguments[position + 1])
        elif argument.startswith("--config="):
            yield Path(argument.split("=", 1)[1])


def _file_names(path: Path) -> Iterable[str]:
    if not path.is_file():
        raise ValueError(f"--config {path}: no such file.")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: not valid YAML: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: must hold sections ({', '.join(SECTIONS)}).")
    for section, fields in content.items():
        if section in SECTIONS and not isinstance(fields, dict):
            raise ValueError(f"{path}: section {section!r} must hold fields, not {fields!r}.")
        if isinstance(fields, dict) and section in SECTIONS:
            yield from (f"{section}.{name}" for name in fields)
        else:
            yield str(section)


def _check_names(names: Iterable[str], *, where: str) -> None:
    for name in names:
        known = any(name == f or name.startswith(f + ".") for f in FIELDS)
        if known or name in ("config", "help", "print_config") or name in SECTIONS:
            continue
        nearest = difflib.get_close_matches(name, (*FIELDS, *SECTIONS), n=1, cutoff=0.0)[0]
        raise ValueError(f"{where}: unknown key {name!r}; did you mean {nearest!r}?")
