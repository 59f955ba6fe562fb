"""Qwen2 and Qwen2.5: Llama's shape with biases on query, key and value."""

from __future__ import annotations

from megatron_mod.conversion.families import decoder
from megatron_mod.conversion.families.base import Family, value_of
from megatron_mod.model.architecture import Architecture


def architecture_of(hf_config: dict) -> Architecture:
    """The shape a Qwen2 ``config.json`` describes.

    Raises:
        ValueError: a feature that is not built, named by its field.
    """
    value_of(hf_config, "num_key_value_heads")  # Transformers' default is not the number of heads
    decoder.require_full_attention(hf_config)
    return decoder.read_decoder(hf_config, qkv_bias=True)


FAMILY = Family("qwen2", "Qwen2ForCausalLM", architecture_of, decoder.table, decoder.ignored)
