"""Mixtral: Mistral's shape, each of whose layers is a mixture of experts."""

from __future__ import annotations

from functools import partial

from megatron_mod.conversion.families import decoder, mixture
from megatron_mod.conversion.families.base import Family, require, value_of
from megatron_mod.model.architecture import Architecture

_NAMES = mixture.Names("block_sparse_moe", gate="w1", up="w3", down="w2")


def architecture_of(hf_config: dict) -> Architecture:
    """The shape a Mixtral ``config.json`` describes.

    Raises:
        ValueError: a feature that is not built, named by its field.
    """
    value_of(hf_config, "num_key_value_heads")  # Transformers' default is not the number of heads
    require(hf_config, "router_jitter_noise", (0, 0.0), default=0.0)
    experts = mixture.read_mixture(
        hf_config, ffn="intermediate_size", normalizes_weights=True, auxiliary_loss=0.001
    )
    return decoder.read_decoder(
        hf_config, mixture=experts, window_size=hf_config.get("sliding_window")
    )


FAMILY = Family(
    "mixtral",
    "MixtralForCausalLM",
    architecture_of,
    partial(decoder.table, mlp=_NAMES.rows),
    decoder.ignored,
    _NAMES.fused,
)
