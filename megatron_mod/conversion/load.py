"""A base's weights into this rank's part of a Megatron model."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import apply_factories
from torch import Tensor

from megatron_mod.checkpoint.distributed import load_state
from megatron_mod.conversion import mappings
from megatron_mod.conversion.base_state import averaged_names, reader_of
from megatron_mod.conversion.check import (
    check_hf_names,
    check_megatron_names,
    check_tied,
    megatron_shapes,
)
from megatron_mod.conversion.finite import require_finite
from megatron_mod.conversion.hf_reader import TensorReader
from megatron_mod.conversion.megatron_lm import has_stacked_layers
from megatron_mod.conversion.source import Base, open_base
from megatron_mod.model.builder import ModelChunks
from megatron_mod.model.trainable import AVERAGE, BASE, parts_of
from megatron_mod.parallel.agree import together

_EXTRA = "_extra_state"  # what Transformer Engine's modules keep beside their parameters


def load_base(model: ModelChunks, base: Base | str | Path) -> None:
    """Fill the part ``BASE``, whatever topology wrote the base; called by all ranks alike.

    Of a Hugging Face folder each rank reads the rows and columns it holds, and nothing else.

    Raises:
        ValueError: the base lacks a parameter of this model, holds one it has not, or one that is
            not finite; on all ranks, whichever found it.
    """
    base = base if isinstance(base, Base) else open_base(base)
    if base.has_hf_weights:
        _load_hf(model, base)
    else:
        _load_state(model, base)


def _load_state(model: ModelChunks, base: Base) -> None:
    reader = reader_of(base)
    check_megatron_names(base.family, base.arch, reader.names(), base.path)
    stacked = base.kind == "megatron_lm" and has_stacked_layers(base.state)
    wanted, averaged = _base_part(model, stacked=stacked), averaged_names(base)
    loaded = load_state(
        {
            name: replace(entry, key=AVERAGE + entry.key) if entry.key in averaged else entry
            for name, entry in wanted.items()
        },
        base.state,
    )
    for name, entry in wanted.items():
        if entry.key in averaged:  # in the parameter's own dtype, as an export has it
            loaded[name] = loaded[name].to(reader.like(entry.key).dtype)
    with together():
        for key, tensor in loaded.items():
            require_finite(tensor, wanted[key].key, where=base.state)
    missing, unexpected = model.load_state_dict(loaded, strict=False)
    assert not unexpected, unexpected
    part = parts_of(model)
    assert all(key.endswith(_EXTRA) or part(key) != BASE for key in missing), missing


def _base_part(model: ModelChunks, *, stacked: bool = False) -> dict:
    part = parts_of(model)
    return {
        key: value
        for key, value in model.sharded_state_dict(stacked=stacked).items()
        if part(key) == BASE and not key.endswith(_EXTRA)
    }


@torch.no_grad()
def _load_hf(model: ModelChunks, base: Base) -> None:
    state = _base_part(model)
    apply_factories(state)
    parts = [part for part in nested_values(state) if isinstance(part, ShardedTensor)]
    table = {row.megatron: row for row in base.family.table(base.arch)}
    used: list = [None] * dist.get_world_size()
    dist.all_gather_object(used, {part.key for part in parts})
    if model.is_whole:
        check_megatron_names(base.family, base.arch, set().union(*used), base.path)
    with together(), base.weights() as reader:
        check_hf_names(base.family, base.arch, reader.names(), base.path)
        share = {"part": dist.get_rank(), "parts": dist.get_world_size()}
        check_tied(reader, tied=base.arch.tied_embeddings, **share)
        likes = {name: reader.like(name) for row in table.values() for name in row.hf}
        shapes = megatron_shapes(base.family, base.arch, likes, base.path)
        for part in parts:
            _fill(part, table[part.key], reader, rows=shapes[part.key][0])
            require_finite(part.data, part.key, where=base.path)


def _fill(part: ShardedTensor, row: mappings.Mapping, reader: TensorReader, *, rows: int) -> None:
    """Read this rank's part of a parameter of ``rows`` rows; padding rows become zeros."""
    first = part.global_offset[0]
    last = min(first + part.local_shape[0], rows)
    columns = [
        slice(offset, offset + size)
        for offset, size in zip(part.global_offset[1:], part.local_shape[1:], strict=True)
    ]

    def read(name: str, start: int, stop: int) -> Tensor:
        return reader.rows(name, start, stop, *columns)

    filled = max(last - first, 0)
    if filled:
        part.data[:filled].copy_(mappings.to_megatron(row, read, rows, first, last))
    part.data[filled:].zero_()
