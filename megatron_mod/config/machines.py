"""Where a training that is only estimated would run, and of what model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from megatron_mod.config.options import Options
from megatron_mod.config.ranks import check_ranks
from megatron_mod.config.rules import COUNT, setting
from megatron_mod.config.shapes import SHAPES

if TYPE_CHECKING:
    from megatron_mod.config.schema import ParallelConfig

Gpu = Literal["a100-40", "a100-80", "h100", "h200", "l4", "a10", "3090", "4090", "cpu"]


class Shape:
    """A ``config.json``, a folder that has one, or a published model by its name."""

    def problem(self, value: str) -> str | None:
        path = Path(value)
        if value in SHAPES or path.is_file() or (path / "config.json").is_file():
            return None
        what = "has no config.json" if path.is_dir() else "no such file or folder"
        return f"{what}; give one of a Hugging Face model, or {', '.join(SHAPES)}"


def check_machines(parallel: ParallelConfig, *, nodes: int, per_node: int) -> None:
    """Refuse degrees that do not divide the devices of ``nodes`` of ``per_node``."""
    check_ranks(
        parallel.degrees,
        world_size=nodes * per_node,
        expert=parallel.expert_model_parallel_size,
        options=f"--nodes {nodes} x --gpus-per-node {per_node}",
    )


@dataclass(frozen=True, kw_only=True)
class Machines(Options):
    """Options about machines that need not be at hand.

    Args:
        nodes: machines.
        gpus_per_node: devices of each, one rank a device.
        gpu: what they are (80 and 24 GB kinds among them); `cpu`: this machine's processor, whose
            rate is measured.
        hf_config: config.json of the model, a Hugging Face folder with one, or a published model's
            name, where the configuration's own checkpoint is not here; unset: the name in its path.
    """

    nodes: int = setting(COUNT, default=1)
    gpus_per_node: int | None = setting(COUNT, default=None)
    gpu: Gpu | None = None
    hf_config: str | None = setting(Shape(), default=None)
