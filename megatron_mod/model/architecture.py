"""The shape of a language model, independent of who stores its weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from megatron_mod.config.ranks import SETTINGS, degree


@dataclass(frozen=True)
class Architecture:
    """What Megatron must build to hold a checkpoint of one of the families."""

    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_attention_heads: int
    num_query_groups: int
    kv_channels: int
    vocab_size: int
    max_sequence_length: int
    layernorm_epsilon: float
    rotary_base: float
    tied_embeddings: bool
    rope_scaling_factor: float | None = None  # Llama-3's scaling; None: none
    window_size: int | None = None  # tokens a query attends to, its own included; None: all before
    qkv_bias: bool = False
    qk_norm: bool = False  # an RMSNorm on each head's query and key


def check_parallel(
    arch: Architecture,
    *,
    tensor: int,
    pipeline: int,
    virtual_pipeline: int | None = None,
    first_stage_layers: int | None = None,
    names: Mapping[str, str] = SETTINGS,
) -> None:
    """Refuse degrees that do not divide the model.

    ``names``: what the user calls the degrees, ``SETTINGS`` or ``OPTIONS``.

    Raises:
        ValueError: naming the field, its value, the constraint and what would fit.
    """
    for what, number in (
        ("attention heads", arch.num_attention_heads),
        ("query groups (num_key_value_heads)", arch.num_query_groups),
        ("MLP channels (intermediate_size)", arch.ffn_hidden_size),
    ):
        if number % tensor:
            fits = _divisors(arch.num_attention_heads, arch.num_query_groups, arch.ffn_hidden_size)
            raise ValueError(
                f"{degree('tensor', tensor, names)}: does not divide this model's {number} {what}; "
                f"use one of {fits}."
            )
    if virtual_pipeline is not None:
        _check_virtual(arch, pipeline=pipeline, virtual=virtual_pipeline, first=first_stage_layers)
    if first_stage_layers is not None:
        _check_first_stage(arch, pipeline=pipeline, layers=first_stage_layers)
    elif arch.num_layers % pipeline:
        uneven = ", or set parallel.num_layers_in_first_pipeline_stage" * (names is SETTINGS)
        raise ValueError(
            f"{degree('pipeline', pipeline, names)}: does not divide this model's "
            f"{arch.num_layers} layers; use one of {_divisors(arch.num_layers)}{uneven}."
        )


def balanced_first_stage(num_layers: int, pipeline: int, *, computed: range) -> int | None:
    """How many layers the first of several stages takes, the others sharing the rest evenly, so
    that the largest share of the ``computed`` ones, which alone cost something, is smallest;
    ``None``: the others cannot share any rest evenly."""

    def largest(first: int) -> int:
        others = (num_layers - first) // (pipeline - 1)
        starts = [0, *range(first, num_layers, others)]
        stages = [range(a, b) for a, b in zip(starts, [*starts[1:], num_layers], strict=True)]
        return max(sum(layer in computed for layer in stage) for stage in stages)

    fits = [n for n in range(1, num_layers) if (num_layers - n) % (pipeline - 1) == 0]
    return min(fits, key=largest, default=None)


def _check_first_stage(arch: Architecture, *, pipeline: int, layers: int) -> None:
    rest = arch.num_layers - layers
    if pipeline == 1 or layers < 1 or rest < pipeline - 1 or rest % (pipeline - 1):
        raise ValueError(
            f"parallel.num_layers_in_first_pipeline_stage = {layers}: of {arch.num_layers} layers "
            f"it must leave the other {pipeline - 1} stage(s) the same number each, at least one; "
            "change it or parallel.pipeline_model_parallel_size (2 or more)."
        )


def _check_virtual(arch: Architecture, *, pipeline: int, virtual: int, first: int | None) -> None:
    name = f"parallel.virtual_pipeline_model_parallel_size = {virtual}"
    if pipeline == 1 or virtual < 2:
        raise ValueError(
            f"{name}: chunks a pipeline rank, needs 2 or more, and "
            f"parallel.pipeline_model_parallel_size ({pipeline}) 2 or more; raise them or leave it "
            "out."
        )
    if first is not None:
        raise ValueError(
            f"{name}: deals the layers evenly, so it excludes "
            "parallel.num_layers_in_first_pipeline_stage; set one of the two."
        )
    if arch.num_layers % (pipeline * virtual):
        raise ValueError(
            f"{name}: times the pipeline degree ({pipeline}) it does not divide this model's "
            f"{arch.num_layers} layers; use another, or leave it out."
        )


def _divisors(*numbers: int) -> list[int]:
    return [d for d in range(1, min(numbers) + 1) if all(n % d == 0 for n in numbers)]
