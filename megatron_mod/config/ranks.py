"""The ranks of a job and the degrees of parallelism they are put to."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass

from megatron_mod.config.options import Options, option
from megatron_mod.config.rules import COUNT, InputFolder, setting

# What a training and the tools call the degrees.
SETTINGS = {
    "tensor": "parallel.tensor_model_parallel_size",
    "pipeline": "parallel.pipeline_model_parallel_size",
    "context": "parallel.context_parallel_size",
    "expert": "parallel.expert_model_parallel_size",
}
OPTIONS = {name: option(name) for name in ("tensor", "pipeline", "expert")}


@dataclass(frozen=True, kw_only=True)
class Degrees(Options):
    """Options of a command that ``torchrun`` may run on several ranks.

    Args:
        tensor: ranks that share each layer.
        pipeline: ranks that share the layers.
        expert: ranks that share each layer's experts, of those that tensor x pipeline leave over.
    """

    tensor: int = setting(COUNT, default=1)
    pipeline: int = setting(COUNT, default=1)
    expert: int = setting(COUNT, default=1)


@dataclass(frozen=True, kw_only=True)
class RankOptions(Degrees):
    """Those of one that loads a Hugging Face folder, which every rank runs whole, or a Megatron
    checkpoint.

    Args:
        tensor: tensor-parallel ranks of a Megatron checkpoint.
        pipeline: pipeline-parallel ranks of a Megatron checkpoint.
        expert: expert-parallel ranks of a Megatron checkpoint, of those left over.
        base: where the base checkpoint of a training run is now, if it was moved.
    """

    base: str | None = setting(InputFolder(), default=None)


def check_ranks(
    degrees: Mapping[str, int],
    *,
    world_size: int,
    expert: int = 1,
    names: Mapping[str, str] = SETTINGS,
    options: str = "",
) -> None:
    """Refuse parallel degrees that do not divide the ranks that were started.

    Args:
        degrees: of which every rank is in one place; data and context parallel ranks (``context``)
            can share experts.
        expert: ranks that do.
        names: what the user calls the degrees, ``SETTINGS`` or ``OPTIONS``.
        options: that say how many ranks there would be, where none were started.

    Raises:
        ValueError: naming all of them, and a number of ranks that fits.
    """
    product = math.prod(degrees.values())
    ranks, more = f"{world_size} ranks started", f"start {{}} ({starter()})"
    if options:
        ranks, more = f"{world_size} ranks", f"give {{}} ({options})"
    if world_size % product:
        factors = " x ".join(f"{names[which]} ({value})" for which, value in degrees.items())
        raise ValueError(
            f"{factors} = {product} does not divide the {ranks}; "
            f"{more.format(f'a multiple of {product}')}, or change the degrees."
        )
    sharing = world_size // product * degrees.get("context", 1)
    if sharing % expert:
        fits = [n for n in range(1, sharing + 1) if sharing % n == 0]
        raise ValueError(
            f"{degree('expert', expert, names)}: experts are shared by ranks that are data or "
            f"context parallel, and of {world_size} ranks these are {sharing}; use one of {fits}, "
            f"or {more.format('more')}."
        )


def starter() -> str:
    """Where the user says how many ranks there are."""
    if "SLURM_JOB_ID" in os.environ and "SLURM_STEP_ID" in os.environ:
        return "sbatch --nodes, and --gpus-per-node or --ntasks-per-node"
    return "torchrun --nproc_per_node"


def degree(which: str, value: int, names: Mapping[str, str]) -> str:
    """A degree as messages name it: ``--tensor 3``, or ``parallel.... = 3``."""
    return f"{names[which]} {value}" if names is OPTIONS else f"{names[which]} = {value}"
