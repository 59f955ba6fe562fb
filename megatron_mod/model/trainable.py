"""What of a model trains: opened, listed, counted, and described for checkpoints.

Every parameter belongs to a part of the model. A module that holds something which a base has not
says so in its class, ``adds = {name of the child: part}``; all else is ``BASE``. A router, an
adapter, a stand-in: whoever adds one names its part there, and nothing else need know.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory, apply_factories
from torch import Tensor

from megatron_mod.parallel import device

if TYPE_CHECKING:
    from megatron_mod.model.builder import ModelChunks

BASE, ROUTERS, STAND_INS, LORA = "base", "routers", "stand_ins", "lora"
COLUMNS = 64  # of a digest
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


def described(
    like: ShardedTensor | ShardedTensorFactory, data: Tensor, *, prefix: str = ""
) -> ShardedTensor | ShardedTensorFactory:
    """Another tensor of a parameter's shape, described for checkpoints as that is, with ``prefix``
    before its key."""
    if isinstance(like, ShardedTensor):
        return replace(like, key=prefix + like.key, data=data, dtype=data.dtype)
    return replace(like, key=prefix + like.key, data=data)


def open_parts(model: torch.nn.Module, names: Iterable[str]) -> None:
    """Let the named parts train and freeze everything else; call before wrapping the model in DDP.

    A part that this pipeline stage does not hold is opened elsewhere.
    """
    part, opened = parts_of(model), set(names)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(part(name) in opened)


class Trainable:
    """What a model has beside its base, or trains of all of it, as far as this rank holds it.

    Both by the key in a checkpoint, which is the same at every topology: ``parameters`` train,
    ``fixed`` are what was added and stays as it is.
    """

    def __init__(self, model: ModelChunks) -> None:
        self.model = model
        described, part = model.sharded_state_dict(), parts_of(model)
        self.parameters: dict[str, Tensor] = {}
        self.fixed: dict[str, Tensor] = {}
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                self.parameters[described[name].key] = parameter
            elif part(name) != BASE:
                self.fixed[described[name].key] = parameter

    @property
    def kept(self) -> dict[str, Tensor]:
        """All of it: what a checkpoint holds."""
        return {**self.fixed, **self.parameters}

    def sharded(
        self, data: Mapping[str, Tensor] | None = None, *, prefix: str = ""
    ) -> dict[str, ShardedTensor | ShardedTensorFactory]:
        """For ``save_state`` and ``load_state``, by key, with ``prefix`` before it.

        ``data``: tensors in the place of what is kept; what has none is left out.
        """
        data = self.kept if data is None else data
        return {
            prefix + entry.key: described(entry, data[entry.key], prefix=prefix)
            for entry in self.model.sharded_state_dict().values()
            if entry.key in data
        }

    @torch.no_grad()
    def put(self, values: Mapping[str, Tensor]) -> None:
        """Fill all of it, from what ``load_state`` made of ``sharded``."""
        for key, parameter in self.kept.items():
            parameter.copy_(values[key])

    def count(self) -> int:
        """Numbers that train, of all ranks; the first call is made by all of them."""
        return sum(numbers for numbers, _, trains in self._whole.values() if trains)

    def nbytes(self) -> int:
        """Bytes that all of it takes; as ``count``."""
        return sum(numbers * size for numbers, size, _ in self._whole.values())

    @cached_property
    def _whole(self) -> dict[str, tuple[int, int, bool]]:
        """Numbers, bytes of each, and whether they train, of everything in the model by key."""
        mine = self.sharded()
        apply_factories(mine)
        sizes = {
            entry.key: (
                math.prod(self._unpadded(entry)),
                entry.dtype.itemsize,
                entry.key in self.parameters,
            )
            for entry in nested_values(mine)
        }
        everybody: list = [None] * dist.get_world_size()
        dist.all_gather_object(everybody, sizes)
        return {key: size for found in everybody for key, size in found.items()}

    def _unpadded(self, entry: ShardedTensor) -> tuple[int, ...]:
        """The shape of the whole, without what pads a vocabulary for tensor-parallel ranks."""
        if not entry.allow_shape_mismatch:
            return tuple(entry.global_shape)
        return (self.model.unpadded_vocab_size, *entry.global_shape[1:])


def frozen_digests(model: torch.nn.Module) -> dict[str, Tensor]:
    """A digest of every frozen parameter of this rank, made where it lies, at the speed of its
    memory.

    Any change of one of its 8-byte words changes the digest, and any other change but for one in
    2^64, or for words that change places by a multiple of ``COLUMNS``.
    """
    return {
        name: _digest(parameter.detach())
        for name, parameter in model.named_parameters()
        if not parameter.requires_grad
    }


def _digest(tensor: Tensor) -> Tensor:
    """Sums modulo 2^64, int64 ``[COLUMNS]``, of the bits in rows of ``COLUMNS`` words."""
    data, width = tensor.contiguous().view(-1).view(torch.uint8), 8 * COLUMNS
    whole = len(data) // width * width
    rest = torch.nn.functional.pad(data[whole:], (0, width - (len(data) - whole)))
    return data[:whole].view(torch.int64).view(-1, COLUMNS).sum(0) + rest.view(torch.int64)


def count_changed(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> int:
    """Frozen parameters, over all ranks, whose digest changed."""
    changed = torch.tensor(sum(not torch.equal(before[name], after[name]) for name in before))
    changed = changed.to(device.device())
    dist.all_reduce(changed)
    return int(changed)
