"""Mistral: Llama's shape with attention over a sliding window (7B v0.1) or without."""

from __future__ import annotations

from megatron_mod.conversion.families import decoder
from megatron_mod.conversion.families.base import Family, value_of
from megatron_mod.model.architecture import Architecture


def architecture_of(hf_config: dict) -> Architecture:
    """The shape a Mistral ``config.json`` describes.

    Raises:
        ValueError: a feature that is not built, named by its field.
    """
    value_of(hf_config, "num_key_value_heads")  # Transformers' default is not the number of heads
    # A file that does not name the window has Transformers' default; null is no window.
    return decoder.read_decoder(hf_config, window_size=hf_config.get("sliding_window", 4096))


FAMILY = Family("mistral", "MistralForCausalLM", architecture_of, decoder.table, decoder.ignored)
