"""The memory that decode steps by graphs work in, keys and values among it.

A graph repeats its work at the addresses that it was recorded with. What changes from step to step
is put there before it runs; a cache moves in when its text is decoded, and out when another is.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .attention_mod import PART
from .room_mod import GrowingLayer

# A layer's keys, in bytes: up to so many the attention is in graphs, in memory of a fixed size, and
# is computed before it is known whether it need be. By reckoning: with their values 22 us at
# 3 TB/s, less than a host takes to hear and to launch.
AHEAD = 2**25


@dataclass
class Entered:
    """What precedes a layer's attention: queries ``[B, groups, heads / groups, D]``, keys and
    values ``[B, groups, 1, D]`` (None: it has no use for them), the decisions of its routers of
    tokens ``[targets, B, 1]`` bool, and what exact ones multiply by, of each target ``[B, 1, 1]``;
    whether the attention has been computed, too."""

    projected: list[Tensor] | None = None
    decided: Tensor | None = None
    factors: dict[str, Tensor] = field(default_factory=dict)
    is_attended: bool = False


def capacity_for(tokens: int) -> int:
    """How many keys an attention of ``tokens`` is computed of: up to a quarter more (of few a bit
    more than that), so that it is recorded for few numbers, and in whole parts."""
    step = max(2 * PART, 2 ** (tokens.bit_length() - 3))
    return -(-tokens // step) * step


class StaticMemory:
    """Memory of a fixed size for a layer's keys and values, of one cache after another."""

    def __init__(self, size: int, like: Tensor) -> None:
        self.whole = like.new_empty(2, size)
        self.views: Any = None  # keys and values, [B, groups, capacity, D]
        self.capacity = 0
        self.owner: Callable[[], GrowingLayer | None] = lambda: None  # whose they are

    def hold(self, storage: GrowingLayer, shape: tuple[int, ...]) -> None:
        """Let ``views`` be of this shape, and hold what is stored."""
        if self.capacity != shape[2]:
            size, self.capacity = torch.Size(shape).numel(), shape[2]
            self.views = tuple(part[:size].view(shape) for part in self.whole)
        owner = self.owner()
        if owner is not None and owner is not storage:
            owner.leave()
        storage.move(self.views)
        self.owner = weakref.ref(storage)


class Buffers:
    """What graphs of one batch size read and write: the residual stream ``hidden`` ``[B, 1, H]``,
    what the attention found ``attended`` ``[B, groups, heads / groups, D]``, ``cosine`` and
    ``sine`` of the positions, ``[B, 1, 1, D]`` or ``[1, 1, 1, D]`` (the sine's first half negated),
    which tokens are no padding ``valid`` ``[B, 1]``, the new token's place in the cache ``place``
    ``[1]``, and what is added to the scores of keys, ``bias`` ``[B, 1, 1, places]`` fp32."""

    filled_for: Any = None  # the forward call that positions and padding are of
    entered: tuple[Hashable, Entered] | None = None  # the next layer's, by ``state``
    through = -1  # the layer up to which the residual stream has come
    tokens = 0  # in the cache
    capacity = 0  # how many keys an attention is computed of; 0: too many for graphs
    knows_mask = False

    def __init__(
        self, hidden_states: Tensor, rotary: Sequence[Tensor], heads: Sequence[int], places: int
    ) -> None:
        """``heads``: groups, heads of each, and their channels; ``places``: room in the memory for
        keys, in tokens."""
        self.batch, self.places, (self.groups, _, self.channels) = len(hidden_states), places, heads
        self.recorded: dict[Hashable, tuple[Callable[[], None], Any]] = {}
        self.static: dict[int, StaticMemory] = {}  # of each layer
        with torch.inference_mode(False):
            self.hidden = torch.empty_like(hidden_states, requires_grad=False)
            self.attended = hidden_states.new_zeros(self.batch, *heads)
            self.cosine, self.sine = (t.new_empty(t.unsqueeze(-2).shape) for t in rotary)
            self.valid = hidden_states.new_ones(self.batch, 1, dtype=torch.bool)
            self.place = hidden_states.new_zeros(1, dtype=torch.int64)
            self.bias = self.cosine.new_empty(self.batch, 1, 1, places, dtype=torch.float32)

    def fill(self, call: Any, rotary: Sequence[Tensor], tokens: int, capacity: int) -> None:
        """Take on positions and padding of a forward call (its ``RoutingCall``)."""
        for own, table in zip((self.cosine, self.sine), rotary, strict=True):
            own.copy_(table.unsqueeze(-2))
        self.sine[..., : self.sine.shape[-1] // 2].neg_()
        valid = call.valid(1)
        self.valid.fill_(True) if valid is None else self.valid.copy_(valid)
        self.filled_for, self.entered, self.through = call, None, -1
        self.tokens, self.capacity, self.knows_mask = tokens, capacity, False
        if capacity:
            self.place.fill_(tokens)

    def see(self, mask: Tensor | None) -> None:
        """Take on the mask ``[B, 1, 1, tokens + 1]`` (None: everything is seen), bool or added to
        scores, which is that of all layers without a window."""
        if self.capacity and not self.knows_mask:
            self.bias.fill_(-torch.inf)
            visible = self.bias[..., : self.tokens + 1]
            if mask is None:
                visible.zero_()
            elif mask.dtype is torch.bool:
                visible.masked_fill_(mask, 0)
            else:
                visible.copy_(mask)
            self.knows_mask = True

    def make_static(self, layer: int, storage: GrowingLayer) -> bool:
        """Let a layer's keys and values be in the memory of its graphs; False: they cannot, being
        too many, or not all tokens' of all sequences."""
        capacity = self.capacity
        if not capacity or storage.is_sliding or storage.rooms[0].tokens != self.tokens:
            return False
        memory = self.static.get(layer)
        if memory and memory.capacity == capacity and storage.is_in(memory.views):
            return True
        held: Any = storage.keys
        if len(held) != self.batch or held.dtype is not self.hidden.dtype:
            return False
        if held.device != self.hidden.device:  # an offloaded one
            return False
        if memory is None:
            with torch.inference_mode(False):
                size = self.batch * self.groups * self.places * self.channels
                memory = self.static[layer] = StaticMemory(size, self.hidden)
        memory.hold(storage, (self.batch, self.groups, capacity, self.channels))
        return True

    def keep(self) -> Callable[[], None]:
        """What undoes whatever a graph will do to what it reads."""
        changed = self.hidden, self.attended
        before = [held.clone() for held in changed]

        def restore() -> None:
            for held, kept in zip(changed, before, strict=True):
                held.copy_(kept)

        return restore

    def state(self, layer: int) -> Hashable:
        """Another one whenever something but a graph has changed the layer's input."""
        return layer, self.hidden._version

    def rotate(self, heads: Tensor) -> Tensor:
        """Queries or keys ``[B, 1, heads, D]``, by their positions."""
        return torch.addcmul(heads * self.cosine, heads.roll(heads.shape[-1] // 2, -1), self.sine)
