"""Keys and values that grow by a token at a time without being copied each time."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer

ROOM = 256  # tokens that are made room for at once


class Room:
    """Memory with places free behind a tensor ``[B, heads, T, D]``, for more of its ``T``."""

    def __init__(self) -> None:
        self.whole = torch.empty(0)
        self.held: Tensor | None = None  # what was last returned: the beginning of ``whole``
        self.free: list[Tensor] = []  # [B, heads, 1, D] each, the next one last

    def extend(self, held: Tensor | None, more: Tensor) -> Tensor:
        """``held`` with ``more`` behind it, in memory of its own. ``held``: what this returned
        before, to which one more token costs a copy of itself alone, or any other tensor (None:
        nothing), say a cropped or reordered one."""
        if self.free and held is self.held and not torch.is_grad_enabled():
            place = self.free[-1]
            if more.shape == place.shape and more.dtype is place.dtype:
                self.free.pop().copy_(more)
                self.held = self.whole.narrow(2, 0, self.whole.shape[2] - len(self.free))
                return self.held
        if held is None or not held.shape[2]:
            held = more[:, :, :0]
        fits = held.shape[:2] == more.shape[:2] and held.dtype is more.dtype
        if torch.is_grad_enabled() or not fits:  # then cat says what is wrong
            return torch.cat([held, more], 2)
        before, length = held.shape[2], held.shape[2] + more.shape[2]
        with torch.inference_mode(False), torch.no_grad():  # it may grow in another mode
            self.whole = more.new_empty(*more.shape[:2], length + ROOM, more.shape[3])
            self.free = list(self.whole[:, :, length:].split(1, 2))[::-1]
        self.whole[:, :, :before] = held
        self.whole[:, :, before:length] = more
        self.held = self.whole[:, :, :length]
        return self.held


class GrowingLayer(DynamicLayer):
    """As Transformers' layer of a ``DynamicCache``, which copies everything at each step (as this
    one does where gradients may be wanted)."""

    def __init__(self) -> None:
        super().__init__()
        self.rooms = Room(), Room()

    def update(
        self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        """Store keys and values ``[B, heads, N, D]`` of more tokens; returns those of all."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self.is_initialized = True
        keys, values = self.rooms
        self.keys = keys.extend(self.keys, key_states)
        self.values = values.extend(self.values, value_states)
        return self.keys, self.values
