"""What a family is, and how its file reads a config.json."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from megatron_mod.conversion.mappings import Mapping, Part
from megatron_mod.model.architecture import Architecture

# What Megatron's Llama-3 RoPE scaling fixes; only the factor can be set.
_LLAMA3_ROPE = {
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


# Transformers' default of rope_theta, where it is not 10000.
_THETAS = {"mixtral": 1e6}


@dataclass(frozen=True)
class Family:
    """``architecture_of`` raises ``ValueError`` on anything in config.json we do not build."""

    model_type: str
    architecture: str
    architecture_of: Callable[[dict], Architecture]
    table: Callable[[Architecture], list[Mapping]]
    # Tensors a file may hold that carry no information of their own.
    ignored: Callable[[Architecture, str], bool]
    # Where the table's tensors are in files that keep a layer's experts in one tensor, of a family
    # whose files may; tensors that are the same in both are not named.
    fused: Callable[[Architecture], dict[str, Part]] = lambda arch: {}


def value_of(hf_config: dict, field: str):
    """A field every config.json of the family has; its type is ``config_types``'s to check.

    Raises:
        ValueError: it is missing, or null.
    """
    value = hf_config.get(field)
    if value is None:
        raise ValueError(f"config.json: {field} is missing.")
    return value


def require(hf_config: dict, field: str, allowed: tuple, *, default: object) -> None:
    """Refuse a config.json whose ``field`` is none of ``allowed``."""
    value = hf_config.get(field, default)
    if value not in allowed:
        options = " or ".join(repr(a) for a in allowed)
        raise ValueError(
            f"config.json: {field} = {value!r} is not supported; it must be {options}."
        )


def rope_theta_of(hf_config: dict) -> float:
    """The base of a ``config.json``'s rotary positions, in either Transformers release's place."""
    rope = hf_config.get("rope_parameters") or hf_config.get("rope_scaling") or {}
    default = _THETAS.get(hf_config.get("model_type", ""), 10000.0)
    return rope.get("rope_theta") or hf_config.get("rope_theta") or default


def read_rope(hf_config: dict) -> tuple[float, float | None]:
    """``(base, llama-3 factor or None)`` from either Transformers release's way of writing it.

    Raises:
        ValueError: a rotary embedding that is not built, named by its field.
    """
    rope = hf_config.get("rope_parameters") or hf_config.get("rope_scaling") or {}
    base = float(rope_theta_of(hf_config))
    require({**hf_config, **rope}, "partial_rotary_factor", (1, 1.0), default=1.0)
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return base, None
    if kind != "llama3":
        raise ValueError(
            f"config.json: rope type {kind!r} is not supported; it must be 'default' or 'llama3'."
        )
    for field, value in _LLAMA3_ROPE.items():
        if rope.get(field) != value:
            raise ValueError(
                f"config.json: {field} = {rope.get(field)!r} of the llama3 rope scaling is not "
                f"supported; Megatron fixes it at {value}."
            )
    return base, float(value_of(rope, "factor"))
