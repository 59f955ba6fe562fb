"""A base's weights under Hugging Face's names, read one at a time."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import lru_cache, partial
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_mod.conversion import mappings
from megatron_mod.conversion.base_state import reader_of
from megatron_mod.conversion.check import (
    check_hf_names,
    check_megatron_names,
    check_tied,
    expected_shape,
    megatron_shapes,
)
from megatron_mod.conversion.finite import require_finite
from megatron_mod.conversion.source import Base


class Weight(NamedTuple):
    """A tensor to come: its name, a meta tensor of its shape and dtype, and how to read it."""

    name: str
    like: Tensor
    read: Callable[[], Tensor]


@contextlib.contextmanager
def hf_weights(base: Base) -> Iterator[list[Weight]]:
    """Every weight, in the order of the family's table (one process).

    Raises:
        ValueError: the weights are not exactly those of the architecture, or, as one is read, it
            is not finite.
    """
    if not base.has_hf_weights:
        yield _from_state(base)
        return
    with base.weights() as reader:
        check_hf_names(base.family, base.arch, reader.names(), base.path)
        check_tied(reader, tied=base.arch.tied_embeddings)
        table = base.family.table(base.arch)
        names = [name for row in table for name in row.hf]
        likes = {name: reader.like(name) for name in names}
        megatron_shapes(base.family, base.arch, likes, base.path)
        yield [Weight(n, likes[n], partial(reader.tensor, n)) for n in names]


def _from_state(base: Base) -> list[Weight]:
    reader = reader_of(base)
    table = base.family.table(base.arch)
    check_megatron_names(base.family, base.arch, reader.names(), base.path)

    @lru_cache(maxsize=1)  # the tensors of one row follow one another
    def parts(index: int) -> dict[str, Tensor]:
        name = table[index].megatron
        tensor = reader.tensor(name)
        require_finite(tensor, name, where=base.state)
        return mappings.to_hf(table[index], tensor)

    found = []
    for index, row in enumerate(table):
        shape, like = expected_shape(base.arch, row.megatron), reader.like(row.megatron)
        if tuple(like.shape) != shape:
            raise ValueError(
                f"{base.path}: {row.megatron}: shape {tuple(like.shape)} instead of {shape}; the "
                "checkpoint and config.json do not belong together."
            )
        likes = mappings.to_hf(row, torch.empty(shape, dtype=like.dtype, device="meta"))
        for name, part in likes.items():
            found.append(Weight(name, part, partial(_take, parts, index, name)))
    return found


def _take(parts: Callable[[int], dict[str, Tensor]], index: int, name: str) -> Tensor:
    return parts(index)[name]
