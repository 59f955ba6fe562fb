"""OLMoE: each layer a mixture of experts, and a norm on a token's whole query and key."""

from __future__ import annotations

from functools import partial

from megatron_mod.conversion.families import decoder, mixture
from megatron_mod.conversion.families.base import Family, require
from megatron_mod.model.architecture import Architecture

_NAMES = mixture.Names()


def architecture_of(hf_config: dict) -> Architecture:
    """The shape an OLMoE ``config.json`` describes.

    Raises:
        ValueError: a feature that is not built, named by its field.
    """
    require(hf_config, "attention_bias", (False,), default=False)
    require(hf_config, "clip_qkv", (None,), default=None)
    experts = mixture.read_mixture(
        hf_config,
        ffn="intermediate_size",
        normalizes_weights=bool(hf_config.get("norm_topk_prob")),
        auxiliary_loss=0.01,
    )
    return decoder.read_decoder(hf_config, qk_norm_across_heads=True, mixture=experts)


FAMILY = Family(
    "olmoe",
    "OlmoeForCausalLM",
    architecture_of,
    partial(decoder.table, mlp=_NAMES.rows),
    decoder.ignored,
    _NAMES.fused,
)
