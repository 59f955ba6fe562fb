"""What a family is: how to read its config.json, and its table of weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from megatron_mod.conversion.mappings import Mapping
from megatron_mod.model.architecture import Architecture


@dataclass(frozen=True)
class Family:
    """``architecture_of`` raises ``ValueError`` on anything in config.json we do not build."""

    model_type: str
    architecture: str
    architecture_of: Callable[[dict], Architecture]
    table: Callable[[Architecture], list[Mapping]]
    # Tensors a file may hold that carry no information of their own.
    ignored: Callable[[Architecture, str], bool]


def value_of(hf_config: dict, field: str):
    """A field every config.json of the family has.

    Raises:
        ValueError: it is missing.
    """
    if field not in hf_config:
        raise ValueError(f"config.json: {field} is missing.")
    return hf_config[field]


def require(hf_config: dict, field: str, allowed: tuple, *, default: object) -> None:
    """Refuse a config.json whose ``field`` is none of ``allowed``."""
    value = hf_config.get(field, default)
    if value not in allowed:
        options = " or ".join(repr(a) for a in allowed)
        raise ValueError(
            f"config.json: {field} = {value!r} is not supported; it must be {options}."
        )
