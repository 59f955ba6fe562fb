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
        self.held: Tensor | None = None  # what was last returned
        self.free: list[Tensor] = []  # places behind it, [B, heads, 1, D], the next one last
        self.tokens = 0  # before them
        self.token: tuple[int, ...] = ()  # shape of one

    def extend(self, held: Tensor | None, more: Tensor) -> Tensor:
        """``held`` with ``more`` behind it, in memory of its own. One more token behind what this
        returned before costs a copy of itself alone; any other tensor (None: nothing), say a
        cropped one or beams in a new order, is copied."""
        is_token = more.shape == self.token and more.dtype is self.whole.dtype
        if held is None or held is not self.held or not is_token or torch.is_grad_enabled():
            self.free = []
            self.whole = self.held = torch.cat([more] if held is None else [held, more], 2)
            self.token = (*more.shape[:2], 1, more.shape[3])
            return self.held
        if not self.free:
            self._make(held)
        self.free.pop().copy_(more)
        self.tokens += 1
        self.held = self.whole.narrow(2, 0, self.tokens)
        return self.held

    def _make(self, held: Tensor) -> None:
        self.tokens = tokens = held.shape[2]
        with torch.inference_mode(False):  # it may grow outside of the mode that it began in
            self.whole = held.new_empty(*held.shape[:2], tokens + ROOM, held.shape[3])
            self.free = list(self.whole[:, :, tokens:].split(1, 2))[::-1]
        self.whole[:, :, :tokens] = held


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
        if not self.is_initialized:
            self.dtype, self.device = key_states.dtype, key_states.device
            self.is_initialized = True
        keys, values = self.rooms
        self.keys = keys.extend(self.keys, key_states)
        self.values = values.extend(self.values, value_states)
        return self.keys, self.values
