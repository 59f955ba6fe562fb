"""From what a user names to the model's shape and the kind of device."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from megatron_mod.config.schema import Config
from megatron_mod.config.shapes import SHAPES
from megatron_mod.conversion.families import family_of
from megatron_mod.conversion.hf_reader import read_config, read_config_file
from megatron_mod.conversion.scratch import new_architecture
from megatron_mod.conversion.source import holds_model, open_model
from megatron_mod.estimate import here
from megatron_mod.estimate.gpus import CPU, FP8, KINDS, Kind, require_fp8
from megatron_mod.estimate.placed import Placed
from megatron_mod.model.architecture import Architecture


def hf_config_of(config: Config, hf_config: str | None) -> str | None:
    """``hf_config``, or where neither it nor the training's own model is here, the published model
    that a folder on its path is called after, which is then printed."""
    place = config.model.checkpoint or config.model.hf_path
    if hf_config or place is None or _is_here(place, config):
        return hf_config
    name = next((part for part in reversed(Path(place).parts) if part in SHAPES), None)
    if name is not None:
        print(f"{place} is not here: taken to be {name} (--hf-config says another)\n")
    return name


def shape_of(config: Config, hf_config: str | None) -> Architecture:
    """Of the training's own model, or where it is not here of ``hf_config``.

    Raises:
        ValueError: there is neither, both and they differ, or a model that is not supported.
    """
    named = None if hf_config is None else _named(hf_config)
    if config.model.config is not None:
        if named is not None:
            raise ValueError(
                f"--hf-config {hf_config}: would be ignored, because model.config says the shape; "
                "leave it out."
            )
        return open_model(config)[0].arch if holds_model(config) else new_architecture(config)
    place = config.model.checkpoint or config.model.hf_path
    assert place is not None, "a configuration without a model"
    if not _is_here(place, config):
        if named is None:
            raise ValueError(
                f"{place}: no such folder (model.checkpoint or model.hf_path); add --hf-config "
                f"with its config.json, a Hugging Face folder, or one of {', '.join(SHAPES)}."
            )
        return named
    found = open_model(config)[0].arch
    if named is not None and _sizes(named) != _sizes(found):
        raise ValueError(
            f"--hf-config {hf_config}: is not the shape of the model in {place}, which is here; "
            "leave it out."
        )
    return found


def _is_here(place: str, config: Config) -> bool:
    """Whether a training's model can be opened, at its place or in the training's own steps."""
    return Path(place).exists() or holds_model(config)


def _sizes(arch: Architecture) -> dict[str, object]:
    """All but the constants of formulas."""
    return {name: value for name, value in asdict(arch).items() if not isinstance(value, float)}


def _named(hf_config: str) -> Architecture:
    path = Path(hf_config)
    if hf_config in SHAPES:
        values = SHAPES[hf_config]
    else:
        values = read_config(path) if path.is_dir() else read_config_file(path)
    return family_of(values).architecture_of(values)


def kind_of(name: str, *, per_node: int) -> Callable[[Placed], Kind]:
    """The kind of device of this name; this machine's processor is measured when it is known with
    what. It raises ``ValueError`` for one that does not multiply as the training does."""

    def find(placed: Placed) -> Kind:
        require_fp8(placed.job.config.model.fp8, name, lambda: name in FP8)
        return here.cpu(placed, ranks=per_node) if name == CPU else KINDS[name]

    return find
