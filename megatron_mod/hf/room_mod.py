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
        self.whole: Tensor | None = None
        self.held: Tensor | None = None  # what was last returned: the beginning of ``whole``

    def extend(self, held: Tensor | None, more: Tensor) -> Tensor:
        """``held`` with ``more`` behind it, in memory of its own. ``held``: what this returned
        before, which costs a copy of ``more`` alone, or any other tensor (None: nothing), say a
        cropped or reordered one, which is copied too."""
        if held is None or not held.shape[2]:
            held = more[:, :, :0]
        fits = (held.shape[:2], held.dtype) == (more.shape[:2], more.dtype)
        if torch.is_grad_enabled() or not fits:  # cat says what is wrong
            return torch.cat([held, more], 2)
        before, length = held.shape[2], held.shape[2] + more.shape[2]
        if self.whole is None or held is not self.held or length > self.whole.shape[2]:
            with torch.inference_mode(False):  # it may grow outside of the mode that it began in
                self.whole = more.new_empty(*more.shape[:2], length + ROOM, more.shape[3])
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
