"""What of a model trains: opened, listed, counted, and described for checkpoints.

Every parameter belongs to a part of the model. A module that holds something which a base has not
says so in its class, ``adds = {name of the child: part}``; all else is ``BASE``. A router, an
adapter, a stand-in: whoever adds one names its part there, and nothing else need know.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import apply_factories
from torch import Tensor

from megatron_mod.parallel import device

if TYPE_CHECKING:
    from megatron_mod.model.builder import ModelChunks

BASE, ROUTERS = "base", "routers"
AVERAGE = "average."  # before the key of a parameter's mean over a training's last steps


def parts_of(model: torch.nn.Module) -> Callable[[str], str]:
    """What tells the part of a parameter, or of anything else in a ``state_dict``, by its name."""
    added = {
        f"{name}.{child}" if name else child: part
        for name, module in model.named_modules()
        for child, part in getattr(module, "adds", {}).items()
    }

    def part(name: str) -> str:
        while name and name not in added:
            name = name.rpartition(".")[0]
        return added.get(name, BASE)

    return part


def open_parts(model: torch.nn.Module, names: Iterable[str]) -> None:
    """Let the named parts train and freeze everything else; call before wrapping the model in DDP.

    A part that this pipeline stage does not hold is opened elsewhere.
    """
    part, opened = parts_of(model), set(names)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(part(name) in opened)


class Trainable:
    """What of a model trains, as far as this rank holds it.

    ``parameters``: by the key in a checkpoint, which is the same at every topology.
    """

    def __init__(self, model: ModelChunks) -> None:
        self.model = model
        trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
        described = model.sharded_state_dict()
        self.parameters = {described[name].key: p for name, p in trained.items()}

    def sharded(
        self, data: Mapping[str, Tensor] | None = None, *, prefix: str = ""
    ) -> dict[str, ShardedTensor]:
        """For ``save_state`` and ``load_state``, by key, with ``prefix`` before it.

        ``data``: tensors in the parameters' place; parameters that have none are left out.
        """
        data = self.parameters if data is None else data
        return {
            prefix + entry.key: replace(entry, key=prefix + entry.key, data=data[entry.key])
            for entry in self.model.sharded_state_dict().values()
            if entry.key in self.parameters and entry.key in data
        }

    @torch.no_grad()
    def put(self, values: Mapping[str, Tensor]) -> None:
        """Fill the parameters, from what ``load_state`` made of ``sharded``."""
        for key, parameter in self.parameters.items():
            parameter.copy_(values[key])

    def count(self) -> int:
        """Numbers that train, of all ranks; the first call is made by all of them."""
        return sum(numbers for numbers, _ in self._whole.values())

    def nbytes(self) -> int:
        """Bytes that they take; as ``count``."""
        return sum(numbers * size for numbers, size in self._whole.values())

    @cached_property
    def _whole(self) -> dict[str, tuple[int, int]]:
        """Numbers, and bytes of each, of every parameter of the whole model by key."""
        mine = self.sharded()
        apply_factories(mine)
        sizes = {
            entry.key: (math.prod(entry.global_shape), entry.dtype.itemsize)
            for entry in nested_values(mine)
        }
        everybody: list = [None] * dist.get_world_size()
        dist.all_gather_object(everybody, sizes)
        return {key: size for found in everybody for key, size in found.items()}


def frozen_digests(model: torch.nn.Module) -> dict[str, str]:
    """A digest of every frozen parameter of this rank, to the last bit."""
    return {
        name: hashlib.blake2b(
            parameter.detach().cpu().contiguous().view(torch.uint8).numpy(), digest_size=16
        ).hexdigest()
        for name, parameter in model.named_parameters()
        if not parameter.requires_grad
    }


def count_changed(before: dict[str, str], after: dict[str, str]) -> int:
    """Frozen parameters, over all ranks, whose digest changed."""
    changed = torch.tensor(sum(before[name] != after[name] for name in before))
    changed = changed.to(device.device())
    dist.all_reduce(changed)
    return int(changed)
