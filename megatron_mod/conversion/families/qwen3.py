"""Qwen3: Llama's shape with a norm on each head's query and key, and its own head size."""

from __future__ import annotations

from megatron_mod.conversion.families import decoder
from megatron_mod.conversion.families.base import Family, require, value_of
from megatron_mod.model.architecture import Architecture


def architecture_of(hf_config: dict) -> Architecture:
    """The shape a Qwen3 ``config.json`` describes.

    Raises:
        ValueError: a feature that is not built, named by its field.
    """
    value_of(hf_config, "num_key_value_heads")  # Transformers' default is not the number of heads
    require(hf_config, "attention_bias", (False,), default=False)
    decoder.require_full_attention(hf_config)
    return decoder.read_decoder(
        hf_config, qk_norm=True, kv_channels=hf_config.get("head_dim") or 128
    )


FAMILY = Family("qwen3", "Qwen3ForCausalLM", architecture_of, decoder.table, decoder.ignored)
