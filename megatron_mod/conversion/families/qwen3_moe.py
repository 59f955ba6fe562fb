"""Qwen3-MoE: Qwen3's attention, each of whose layers is a mixture of experts."""

from __future__ import annotations

from functools import partial

from megatron_mod.conversion.families import decoder, mixture
from megatron_mod.conversion.families.base import Family, require, value_of
from megatron_mod.model.architecture import Architecture

_NAMES = mixture.Names()


def architecture_of(hf_config: dict) -> Architecture:
    """The shape a Qwen3-MoE ``config.json`` describes.

    Raises:
        ValueError: a feature that is not built, named by its field.
    """
    value_of(hf_config, "num_key_value_heads")  # Transformers' default is not the number of heads
    require(hf_config, "attention_bias", (False,), default=False)
    require(hf_config, "decoder_sparse_step", (1,), default=1)
    require(hf_config, "mlp_only_layers", ([], None), default=None)
    decoder.require_full_attention(hf_config)
    experts = mixture.read_mixture(
        hf_config,
        ffn="moe_intermediate_size",
        normalizes_weights=bool(hf_config.get("norm_topk_prob")),
        auxiliary_loss=0.001,
    )
    return decoder.read_decoder(
        hf_config, qk_norm=True, mixture=experts, ffn_hidden_size=experts.ffn_hidden_size
    )


FAMILY = Family(
    "qwen3_moe",
    "Qwen3MoeForCausalLM",
    architecture_of,
    partial(decoder.table, mlp=_NAMES.rows),
    decoder.ignored,
    _NAMES.fused,
)
