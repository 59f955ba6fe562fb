"""How many numbers a model has, on all ranks and on one."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import NamedTuple

from megatron_mod.config.lora import TARGETS
from megatron_mod.estimate.placed import Placed
from megatron_mod.model.architecture import Architecture, padded_vocab_size
from megatron_mod.parallel.topology import Topology

# By an added tensor's first word.
PARTS = {
    "router": "routers", "noop_gate": "routers", "predictor": "routers", "stand_in": "stand_ins"
}  # fmt: skip


class Parameters(NamedTuple):
    """Those of the base, those added to it, those of both that train, and those of the added ones
    that are adapters'."""

    base: int
    added: int
    trained: int
    adapters: int


def total(placed: Placed) -> Parameters:
    """Of the whole model, each once."""
    routed, layers = len(placed.job.routing.layers), range(placed.job.arch.num_layers)
    return _together(placed, placed.job.arch.num_parameters, routed, layers, tensor=1)


def of_rank(placed: Placed, rank: int) -> Parameters:
    """Of what a rank of the pipeline holds; tensor-parallel ranks hold as much each."""
    arch, tensor = placed.job.arch, placed.job.topology.tensor
    vocabulary = padded_vocab_size(arch.vocab_size, tensor=tensor) // tensor * arch.hidden_size
    base = len(placed.layers_of(rank)) * layer(arch, placed.job.topology)
    shared = arch.tied_embeddings and placed.has_embedding(rank) and placed.has_head(rank)
    base += vocabulary * (placed.has_embedding(rank) + placed.has_head(rank) - shared)
    base += arch.hidden_size * placed.has_head(rank)  # the last norm
    routed, layers = len(placed.routed_of(rank)), placed.layers_of(rank)
    return _together(placed, base, routed, layers, tensor=tensor)


def _together(
    placed: Placed, base: int, routed: int, layers: Sequence[int], *, tensor: int
) -> Parameters:
    lora, parts = placed.job.lora, placed.job.config.train.parts
    adapted = 0 if lora is None else len(set(layers) & set(lora.layers))
    adapters = adapted * of_adapters(placed, tensor=tensor)
    return Parameters(
        base,
        routed * _added(placed) + adapters,
        base * placed.job.reach.trains_base
        + routed * _trained(placed)
        + adapters * ("lora" in parts),
        adapters,
    )


def of_adapters(placed: Placed, *, tensor: int) -> int:
    """Of a layer's adapters, on one of the ranks that share it."""
    lora = placed.job.lora
    if lora is None:
        return 0
    found = 0
    for name, shape in lora.shapes(placed.job.arch.projections).items():
        target, _, key = name.partition(".")
        by_rows = TARGETS[target] in ("linear_proj", "linear_fc2")
        found += prod(shape) // (tensor if (key == "a") == by_rows else 1)
    return found


def layer(arch: Architecture, ranks: Topology) -> int:
    """Of a layer of the base on one of the ranks that share it: matrices split, norms and gates
    whole."""
    experts = arch.num_experts // ranks.expert * arch.expert_weights
    split = arch.attention_parameters + experts
    return split // ranks.tensor + arch.gate_weights + arch.norm_parameters


def _added(placed: Placed) -> int:
    """To a routed layer."""
    return sum(_shapes(placed).values())


def _trained(placed: Placed) -> int:
    parts = placed.job.config.train.parts
    return sum(
        count for name, count in _shapes(placed).items() if PARTS[name.partition(".")[0]] in parts
    )


def _shapes(placed: Placed) -> dict[str, int]:
    arch, routing = placed.job.arch, placed.job.routing
    added = routing.added_shapes(arch.hidden_size, num_experts=arch.num_experts)
    return {name: prod(shape) for name, shape in added.items()}
