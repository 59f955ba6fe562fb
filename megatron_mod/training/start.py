"""Where the routers of a new run start."""

from __future__ import annotations

from megatron_mod.checkpoint.manifest import ROUTERS
from megatron_mod.config.schema import Config
from megatron_mod.conversion.restore import put_routers
from megatron_mod.conversion.routers import read_routers
from megatron_mod.conversion.source import Base
from megatron_mod.model.builder import ModelChunks
from megatron_mod.routing.config import RoutingConfig


def start_routers(model: ModelChunks, config: Config, base: Base, routing: RoutingConfig) -> None:
    """Fill the routers from ``model.routers``, or from those beside the base; called by all ranks.

    Raises:
        ValueError: they were made for other layers or another way of deciding than the settings'.
    """
    beside = base.path / ROUTERS
    folder = config.model.routers or (beside if beside.is_dir() else None)
    if folder is None:
        return
    found, weights = read_routers(folder, base.arch)
    for field in ("granularity", "layers", "threshold"):
        theirs, ours = getattr(found, field), getattr(routing, field)
        if theirs != ours:
            raise ValueError(
                f"router.{field} = {ours}: the routers in {folder} have {theirs}; set that, or "
                "start from other routers (model.routers)."
            )
    put_routers(model, weights)
