"""What a cache has room for is never copied, and never shared by what must be apart."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers.cache_utils import DynamicLayer

from megatron_mod.hf.room_mod import ROOM, GrowingLayer, stored_bytes


def drawn(tokens: int, batch: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    keys, values = torch.randn(2, batch, 3, tokens, 4)
    return keys, values


def both() -> tuple[GrowingLayer, DynamicLayer]:
    return GrowingLayer(), DynamicLayer()


@torch.no_grad()
def step(layers, tokens: int = 1, batch: int = 2) -> None:
    """Let both store the same, and find the same stored."""
    more = drawn(tokens, batch)
    given = [layer.update(*more) for layer in layers]
    for ours, theirs in zip(given[0], given[1], strict=True):
        assert torch.equal(ours, theirs)
    assert torch.equal(layers[0].keys, layers[1].keys)
    assert layers[0].get_seq_length() == layers[1].get_seq_length()


def test_a_step_copies_itself_alone():
    layers = both()
    step(layers, 5)
    step(layers)
    first = layers[0].keys.data_ptr()
    for _ in range(ROOM - 1):
        step(layers)
        assert layers[0].keys.data_ptr() == first
    step(layers)
    assert layers[0].keys.data_ptr() != first
    step(layers)


@torch.no_grad()
def test_what_is_given_stays_its_owners():
    layer, (keys, values) = GrowingLayer(), drawn(1)
    layer.update(keys, values)
    before = layer.keys.clone()
    keys.zero_()
    assert torch.equal(layer.keys, before)


def reorder(layer):
    layer.reorder_cache(torch.tensor([1, 1]))


def repeat(layer):
    layer.batch_repeat_interleave(2)


def crop(layer):
    layer.crop(-2 if hasattr(layer, "is_croppable") else 5)


@pytest.mark.parametrize(("change", "batch"), [(reorder, 2), (repeat, 4), (crop, 2)])
def test_what_changes_it_between_steps(change, batch):
    layers = both()
    step(layers, 6)
    step(layers)
    held = layers[0].keys
    seen = held.clone()
    for layer in layers:
        change(layer)
    for _ in range(3):
        step(layers, batch=batch)
    assert torch.equal(held, seen)  # whoever still has it sees no later token in it


def test_beams_make_no_room_at_each_step():
    layers = both()
    step(layers, 6)
    for _ in range(3):
        for layer in layers:
            reorder(layer)
        step(layers)
        assert not layers[0].rooms[0].free


@torch.no_grad()
def test_in_memory_of_somebody_else():
    layers = both()
    step(layers, 3)
    step(layers)
    memory = tuple(torch.full((2, 3, 8, 4), torch.nan) for _ in range(2))
    layers[0].move(memory)
    assert layers[0].is_in(memory)
    more = drawn(1)
    for part, new in zip(memory, more, strict=True):
        part[:, :, 4:5] = new
    layers[0].count()
    layers[1].update(*more)
    assert torch.equal(layers[0].keys, layers[1].keys)
    assert torch.equal(layers[0].values, layers[1].values)
    assert layers[0].get_seq_length() == 5
    assert stored_bytes(layers[0]) == stored_bytes(layers[1])
    assert not memory[0][:, :, 5:].any()
    step(layers)  # by itself it goes on elsewhere
    assert not layers[0].is_in(memory)
    layers[0].move(memory)
    layers[0].leave()
    for part in memory:
        part.fill_(0)
    step(layers)


def test_copies_go_their_own_ways():
    one, plain = both()
    step((one, plain), 4)
    step((one, plain))
    other, twin = copy.deepcopy(one), copy.deepcopy(plain)
    for _ in range(2):
        step((one, plain))
        step((other, twin))
        step((one, plain))


def test_from_one_mode_to_the_other():
    layers = both()
    with torch.inference_mode():
        step(layers, 3)
        step(layers)
    with torch.no_grad():
        step(layers)
        step(layers)


def test_gradients_reach_what_is_stored():
    layer = GrowingLayer()
    parts = [drawn(1)[0].requires_grad_() for _ in range(3)]
    for part in parts:
        found, _ = layer.update(part, part)
    (found * torch.arange(1.0, 4.0)[:, None]).sum().backward()
    assert [part.grad.unique().item() for part in parts] == [1, 2, 3]


@torch.no_grad()
def test_another_dtype_is_what_torch_makes_of_both():
    layers = both()
    step(layers, 3)
    step(layers)
    more = [part.double() for part in drawn(1)]
    for layer in layers:
        layer.update(*more)
    assert layers[0].keys.dtype is layers[1].keys.dtype is torch.float64
    assert torch.equal(layers[0].keys, layers[1].keys)


@torch.no_grad()
def test_another_batch_is_refused():
    layer = GrowingLayer()
    layer.update(*drawn(3))
    with pytest.raises(RuntimeError, match="Sizes of tensors must match"):
        layer.update(*drawn(1, batch=1))
