"""Keys and values that grow by a token at a time without being copied each time."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer

ROOM = 256  # tokens that are made room for at once


class Room:
    """A tensor ``[B, heads, T, D]``, or none yet, in memory with places free for more of its
    ``T``: there one more token costs a copy of itself alone."""

    whole: Tensor | None = None  # the memory; None: the tensor has one of its own size
    is_own = False  # whether it was made here, and not handed in
    tokens = 0  # T
    token: tuple[int, ...] = ()  # shape of one more

    def __init__(self) -> None:
        self._held: Tensor | None = None
        self.free: list[Tensor] = []  # places behind it, [B, heads, 1, D], the next one last

    @property
    def held(self) -> Tensor | None:
        """The tensor; one that is handed in, say cropped or of beams in a new order, is copied
        when it grows."""
        if self._held is None and self.whole is not None:
            self._held = self.whole.narrow(2, 0, self.tokens)
        return self._held

    @held.setter
    def held(self, tensor: Tensor | None) -> None:
        self._held, self.whole, self.is_own, self.free = tensor, None, False, []
        self.tokens = 0 if tensor is None else tensor.shape[2]

    @property
    def nbytes(self) -> int:
        """Of the tensor."""
        if self.whole is not None:
            return self.whole.nbytes // self.whole.shape[2] * self.tokens
        return 0 if self._held is None else self._held.nbytes

    def extend(self, more: Tensor) -> Tensor:
        """The tensor with ``more`` behind it."""
        held: Any = self.held
        is_token = self.is_own and more.shape == self.token and more.dtype is held.dtype
        if not is_token or torch.is_grad_enabled():
            self.held = torch.cat([more] if held is None else [held, more], 2)
            self.is_own, self.token = True, (*more.shape[:2], 1, more.shape[3])
        else:
            if not self.free:
                self._make(held)
            self.free.pop().copy_(more)
            self.count()
        extended: Any = self.held
        return extended

    def count(self) -> None:
        """Take note of a token that has been put behind the others in the memory."""
        self.tokens += 1
        self._held = None

    def move(self, memory: Tensor) -> None:
        """Be in ``memory`` ``[B, heads, places, D]``, zeros behind what is there."""
        held: Any = self.held
        if held.untyped_storage().data_ptr() == memory.untyped_storage().data_ptr():
            held = held.clone()
        memory[:, :, self.tokens :].zero_()
        memory[:, :, : self.tokens] = held
        self._held, self.whole, self.is_own, self.free = None, memory, True, []
        self.token = (*held.shape[:2], 1, held.shape[3])

    def _make(self, held: Tensor) -> None:
        with torch.inference_mode(False):  # it may grow outside of the mode that it began in
            self.whole = held.new_empty(*held.shape[:2], self.tokens + ROOM, held.shape[3])
            self.free = list(self.whole[:, :, self.tokens :].split(1, 2))[::-1]
        self.whole[:, :, : self.tokens] = held


class GrowingLayer(DynamicLayer):
    """As Transformers' layer of a ``DynamicCache``, which copies everything at each step (as this
    one does where gradients may be wanted)."""

    def __init__(self) -> None:
        self.rooms = Room(), Room()
        super().__init__()

    @property
    def keys(self) -> Tensor | None:
        return self.rooms[0].held

    @keys.setter
    def keys(self, keys: Tensor | None) -> None:
        self.rooms[0].held = keys

    @property
    def values(self) -> Tensor | None:
        return self.rooms[1].held

    @values.setter
    def values(self, values: Tensor | None) -> None:
        self.rooms[1].held = values

    def update(
        self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        """Store keys and values ``[B, heads, N, D]`` of more tokens; returns those of all."""
        if not self.is_initialized:
            self.dtype, self.device = key_states.dtype, key_states.device
            self.is_initialized = True
        keys, values = self.rooms
        return keys.extend(key_states), values.extend(value_states)

    def is_in(self, memory: tuple[Tensor, Tensor]) -> bool:
        """Whether all that is stored is in this memory for keys and values."""
        return all(room.whole is part for room, part in zip(self.rooms, memory, strict=True))

    def move(self, memory: tuple[Tensor, Tensor]) -> None:
        """Let all that is stored be in memory ``[B, heads, places, D]`` for keys and values, where
        somebody else adds to it; ``count`` takes note of that."""
        for room, part in zip(self.rooms, memory, strict=True):
            room.move(part)

    def count(self) -> None:
        """Take note of a token that has been put behind those stored."""
        for room in self.rooms:
            room.count()

    def leave(self) -> None:
        """Let nothing stored be in memory that others use."""
        if self.keys is not None and self.values is not None:
            self.keys, self.values = self.keys.clone(), self.values.clone()


def stored_bytes(storage: Any) -> int:
    """Of a cache layer's keys and values."""
    if isinstance(storage, GrowingLayer):
        return sum(room.nbytes for room in storage.rooms)
    return 0 if storage.keys is None else storage.keys.nbytes + storage.values.nbytes
