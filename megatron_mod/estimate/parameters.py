"""How many numbers a model has, on all ranks and on one."""

from __future__ import annotations

from math import prod
from typing import NamedTuple

from megatron_mod.estimate.placed import Placed
from megatron_mod.model.architecture import Architecture, padded_vocab_size

PARTS = {"router": "routers", "stand_in": "stand_ins"}  # by an added tensor's first word


class Parameters(NamedTuple):
    """Frozen ones of the base, those added to it, and those of both that train."""

    frozen: int
    added: int
    trained: int


def total(placed: Placed) -> Parameters:
    """Of the whole model, each once."""
    arch, routed = placed.job.arch, len(placed.job.routing.layers)
    return Parameters(arch.num_parameters, routed * _added(placed), routed * _trained(placed))


def of_rank(placed: Placed, rank: int) -> Parameters:
    """Of what a rank of the pipeline holds; tensor-parallel ranks hold as much each."""
    arch, tensor = placed.job.arch, placed.job.topology.tensor
    vocabulary = padded_vocab_size(arch.vocab_size, tensor=tensor) // tensor * arch.hidden_size
    frozen = len(placed.layers_of(rank)) * layer(arch, tensor=tensor)
    shared = arch.tied_embeddings and placed.has_embedding(rank) and placed.has_head(rank)
    frozen += vocabulary * (placed.has_embedding(rank) + placed.has_head(rank) - shared)
    frozen += arch.hidden_size * placed.has_head(rank)  # the last norm
    routed = len(placed.routed_of(rank))
    return Parameters(frozen, routed * _added(placed), routed * _trained(placed))


def layer(arch: Architecture, *, tensor: int) -> int:
    """Of a layer on one of the ranks that share it: matrices split, norms whole."""
    split = arch.query_weights + arch.key_weights + arch.mlp_weights
    split += (arch.query_channels + 2 * arch.key_channels) * arch.qkv_bias
    return split // tensor + 2 * arch.hidden_size + 2 * arch.kv_channels * arch.qk_norm


def _added(placed: Placed) -> int:
    """To a routed layer."""
    return sum(_shapes(placed).values())


def _trained(placed: Placed) -> int:
    parts = placed.job.config.train.parts
    return sum(
        count for name, count in _shapes(placed).items() if PARTS[name.partition(".")[0]] in parts
    )


def _shapes(placed: Placed) -> dict[str, int]:
    added = placed.job.routing.added_shapes(placed.job.arch.hidden_size)
    return {name: prod(shape) for name, shape in added.items()}
