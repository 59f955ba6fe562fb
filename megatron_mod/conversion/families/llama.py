"""Llama 2 and 3.x, and every model published under its architecture (SmolLM2, ...)."""

from __future__ import annotations

from megatron_mod.conversion.families import decoder
from megatron_mod.conversion.families.base import Family, require
from megatron_mod.model.architecture import Architecture


def architecture_of(hf_config: dict) -> Architecture:
    """The shape a Llama ``config.json`` describes.

    Raises:
        ValueError: a feature that is not built, named by its field.
    """
    require(hf_config, "attention_bias", (False,), default=False)
    require(hf_config, "mlp_bias", (False,), default=False)
    require(hf_config, "pretraining_tp", (1,), default=1)
    return decoder.read_decoder(hf_config)


FAMILY = Family("llama", "LlamaForCausalLM", architecture_of, decoder.table, decoder.ignored)
