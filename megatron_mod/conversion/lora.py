"""Adapters between step folders and models."""

from __future__ import annotations

from pathlib import Path

from megatron_mod.checkpoint.manifest import read_manifest
from megatron_mod.config.lora import LoraSettings, lora_of
from megatron_mod.conversion.peft import Adapters
from megatron_mod.conversion.step_tensors import read_layers
from megatron_mod.model.builder import ModelChunks

KEY = "decoder.layers.{}.lora.{}"


def is_adapter(key: str) -> bool:
    """Whether a step's tensor of this key is an adapter's."""
    return ".lora." in key


def read_step_adapters(step: Path) -> tuple[LoraSettings, Adapters] | None:
    """Settings and tensors of the adapters of a step folder, averaged if the training averaged
    them; ``None``: it has none. Called where a world of ranks is, of one or more.

    Raises:
        ValueError: they are not what the manifest says, or not finite.
    """
    settings = lora_of(read_manifest(step))
    layers, names = (settings.layers, settings.names) if settings else ((), ())
    found = read_layers(step, layers, names, key=KEY, what="adapters", is_one=is_adapter)
    return None if settings is None else (settings, found)


def put_adapters(model: ModelChunks, adapters: Adapters) -> None:
    """Fill this rank's part of the model's adapters."""
    for layer, own in model.adapters().items():
        own.put(adapters[layer])
