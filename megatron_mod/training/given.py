"""Routers and adapters that a training is given: where they are, and what they are."""

from __future__ import annotations

import contextlib
from dataclasses import fields, replace
from pathlib import Path
from typing import cast

from megatron_mod.checkpoint.manifest import (
    ROUTERS,
    is_whole,
    read_manifest,
    resolve_step,
    step_folders,
)
from megatron_mod.config.lora import LoraSettings, lora_of
from megatron_mod.config.router_section import RouterConfig
from megatron_mod.config.schema import Config
from megatron_mod.conversion.adapters import read_settings
from megatron_mod.conversion.routers import read_routing
from megatron_mod.model.architecture import Architecture
from megatron_mod.routing.config import NO_ROUTERS, RoutingConfig
from megatron_mod.routing.scheme import Granularity

# What says how routers are trained, not what they are.
_HOW_TO_TRAIN = {
    "init", "stand_in_tokens", "training_compute", "capacity_warmup_fraction",
    "check_decisions_interval",
}  # fmt: skip


def router_folder(config: Config, base: Path) -> Path | None:
    """The folder with the routers that a training of a ``base`` starts from; ``None``: there are
    none.

    Raises:
        ValueError: they were trained with another model's weights.
    """
    if config.model.routers is not None:
        folder = Path(config.model.routers)
        if is_whole(folder) and resolve_step(folder).resolve() != base.resolve():
            raise ValueError(
                f"model.routers = {folder}: these routers were trained with all of their model, "
                "which they would be without; set model.checkpoint to that, and leave "
                "model.routers out."
            )
        return folder
    if is_whole(base) and read_manifest(base)["routing"]["layers"]:
        return base
    beside = base / ROUTERS
    return beside if beside.is_dir() else None


def fixed_routing(config: Config, arch: Architecture, *, base: Path) -> RoutingConfig | None:
    """What routers decide that stay as they are, with their own thresholds and without computing
    what they skip; ``None``: routers train. Read before ranks meet.

    ``base``: the folder of the frozen model, which may have routers in it.

    Raises:
        ValueError: there are none, or settings say something else of them than they do.
    """
    if "routers" in config.train.parts:
        return None
    if config.router.layers == []:
        return NO_ROUTERS
    before = _manifest_of(Path(config.checkpoint.save))
    if before is not None:
        theirs = RoutingConfig.from_dict(before["routing"])
    else:
        folder = router_folder(config, base)
        if folder is None:
            raise ValueError(
                "train.trainable = lora: there are no routers to stay as they are; name a folder "
                "with some (model.routers), or set router.layers to [] to train adapters of the "
                "dense model."
            )
        theirs = read_routing(folder)
        _require_same(config.router, theirs, arch, folder=folder)
    return replace(theirs, training_compute="sparse", capacity_warmup_fraction=0.0)


def given_adapters(config: Config, arch: Architecture) -> LoraSettings | None:
    """Settings of the adapters that a training starts from; ``None``: it is given none. Read before
    ranks meet.

    Raises:
        ValueError: the folder holds none for this model, or settings say something else of them
            than they do.
    """
    folder, trains = config.model.lora, "lora" in config.train.parts
    if folder is None:
        return None
    if before := _manifest_of(Path(config.checkpoint.save)):
        return lora_of(before)
    theirs = read_settings(folder, arch)
    ours = replace(config.lora, rank=config.lora.rank or theirs.rank)
    resolved = ours.resolve(num_layers=arch.num_layers, projections=list(arch.projections))
    for name in ("rank", "alpha", "targets", "layers"):
        value, have = getattr(resolved, name), getattr(theirs, name)
        if getattr(config.lora, name) is not None and value != have:
            raise ValueError(
                f"lora.{name} = {value}: the adapters in {folder} have {have}; leave it out, or "
                "start from other adapters (model.lora)."
            )
    dropout = theirs.dropout if config.lora.dropout is None else config.lora.dropout
    return replace(theirs, dropout=dropout if trains else 0.0)


def _manifest_of(run: Path) -> dict | None:
    """That of a run that has a checkpoint and is gone on with; a damaged one is found later."""
    for step in step_folders(run):
        with contextlib.suppress(ValueError):
            return read_manifest(step)
    return None


def _require_same(
    settings: RouterConfig, theirs: RoutingConfig, arch: Architecture, *, folder: Path
) -> None:
    """Refuse settings of routers that stay as they are and have others; a default says nothing."""
    default = RouterConfig()
    given = {
        field.name
        for field in fields(settings)
        if getattr(settings, field.name) != getattr(default, field.name)
    } - _HOW_TO_TRAIN
    if "granularity" not in given:
        settings = replace(settings, granularity=cast(Granularity, theirs.granularity))
    if "layers" not in given:
        settings = replace(settings, layers=list(theirs.layers))
    ours = settings.resolve(
        num_layers=arch.num_layers, hidden_size=arch.hidden_size, num_experts=arch.num_experts
    )
    for name in sorted(given):
        key = "stand_in_rank" if name == "stand_in" else name
        have = getattr(theirs, key)
        if getattr(ours, key) != have:
            raise ValueError(
                f"router.{name} = {getattr(settings, name)}: the routers in {folder} have "
                f"{'none' if have is None else have} and stay as they are (train.trainable = "
                "lora); leave it out, or start from other routers (model.routers)."
            )
