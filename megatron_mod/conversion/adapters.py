"""Adapters from the folders that users name, of PEFT's or of ours."""

from __future__ import annotations

from pathlib import Path

from megatron_mod.checkpoint.manifest import (
    MANIFEST,
    read_manifest,
    resolve_step,
    verify_checkpoint,
)
from megatron_mod.config.lora import LoraSettings, lora_of
from megatron_mod.config.model_folder import ADAPTER, LORA
from megatron_mod.conversion.lora import read_step_adapters
from megatron_mod.conversion.peft import Adapters, read_peft
from megatron_mod.conversion.step_tensors import require_shapes
from megatron_mod.model.architecture import Architecture


def read_adapters(folder: str | Path, arch: Architecture) -> tuple[LoraSettings, Adapters]:
    """Settings and adapters of a folder of PEFT's, a run of ours or one of its steps; called by all
    ranks alike.

    Raises:
        ValueError: not such a folder, or adapters that do not fit the model.
    """
    step = resolve_step(folder)
    if not (step / MANIFEST).is_file():
        return _of_peft(folder, arch)
    _settings(verify_checkpoint(step), folder)
    found = read_step_adapters(step)
    assert found is not None, "a manifest's adapters"
    _check_fit(Path(folder), *found, arch)
    return found


def read_settings(folder: str | Path, arch: Architecture) -> LoraSettings:
    """The settings alone, as ``read_adapters`` reads them; before ranks meet."""
    step = resolve_step(folder)
    if not (step / MANIFEST).is_file():
        return _of_peft(folder, arch)[0]
    return _settings(read_manifest(step), folder)


def has_adapters(folder: str | Path) -> bool:
    """Whether it is a run of ours, or one of its steps, with adapters."""
    step = resolve_step(folder)
    return (step / MANIFEST).is_file() and lora_of(read_manifest(step)) is not None


def _of_peft(folder: str | Path, arch: Architecture) -> tuple[LoraSettings, Adapters]:
    if Path(folder, LORA, ADAPTER).is_file():
        raise ValueError(
            f"{folder}: is an export; its adapters are in {Path(folder, LORA)}, give that."
        )
    return read_peft(folder, arch)


def _settings(manifest: dict, folder: str | Path) -> LoraSettings:
    if (settings := lora_of(manifest)) is None:
        raise ValueError(
            f"{folder}: holds no adapters; give a PEFT folder, or a training run that has some."
        )
    return settings


def _check_fit(
    folder: Path, settings: LoraSettings, adapters: Adapters, arch: Architecture
) -> None:
    if outside := [layer for layer in settings.layers if layer >= arch.num_layers]:
        raise ValueError(
            f"{folder}: adapters of layers {outside}; this model has layers 0 to "
            f"{arch.num_layers - 1}."
        )
    require_shapes(folder, adapters, settings.shapes(arch.projections))
