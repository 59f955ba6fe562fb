"""Adapters between step folders and models."""

from __future__ import annotations

from pathlib import Path

from megatron_mod.checkpoint.distributed import StateReader
from megatron_mod.checkpoint.manifest import STATE, read_manifest
from megatron_mod.config.lora import LoraSettings, lora_of
from megatron_mod.conversion.finite import require_finite
from megatron_mod.conversion.peft import Adapters
from megatron_mod.model.builder import ModelChunks
from megatron_mod.model.trainable import AVERAGE

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
    manifest = read_manifest(step)
    settings, reader = lora_of(manifest), StateReader(step / STATE)
    held = reader.names()
    layers, names = (settings.layers, settings.names) if settings else ((), ())
    wanted = {KEY.format(layer, name): (layer, name) for layer in layers for name in names}
    here = {key for key in held if is_adapter(key) and key.startswith("decoder.")}
    if difference := sorted(here ^ set(wanted)):
        raise ValueError(f"{step}: adapters do not match its manifest: {difference}.")
    if settings is None:
        return None
    adapters: Adapters = {layer: {} for layer in settings.layers}
    for key, (layer, name) in wanted.items():
        key = AVERAGE + key if manifest.get("averaged") and AVERAGE + key in held else key
        adapters[layer][name] = tensor = reader.tensor(key).clone()
        require_finite(tensor, key, where=step / STATE)
    return settings, adapters


def put_adapters(model: ModelChunks, adapters: Adapters) -> None:
    """Fill this rank's part of the model's adapters."""
    for layer, own in model.adapters().items():
        own.put(adapters[layer])
