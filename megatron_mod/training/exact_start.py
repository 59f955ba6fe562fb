"""Where the routers of an exact selection begin, and experts that return nothing."""

from __future__ import annotations

import math
import zlib

import torch

from megatron_mod.model.builder import ModelChunks
from megatron_mod.routing.config import RoutingConfig

STD = 0.02  # of a router's weights, as Megatron's and Llama's other weights have


@torch.no_grad()
def start_at_random(model: ModelChunks, routing: RoutingConfig, *, seed: int) -> None:
    """Fill routers with small normal numbers (zeros would give all tokens one score, and no update)
    and biases with ones, at which an update stays what it was; predictors so that they begin at the
    share that is kept. The same at every topology."""
    for module in model.routed_layers().values():
        for place, router in module.routers.items():
            random = torch.Generator().manual_seed(zlib.crc32(f"{seed} {place}".encode()))
            _fill(router.weight, STD, random)
            if router.bias is not None:
                router.bias.fill_(1.0)
            if (predictor := module.predictors.get(place)) is None:
                continue
            share = min(max(routing.capacity_of(place), 0.01), 0.99)
            for linear in (predictor.hidden, predictor.out):
                _fill(linear.weight, 1 / math.sqrt(linear.in_features), random)
                linear.bias.zero_()
            predictor.out.bias.fill_(math.log(share / (1 - share)))


@torch.no_grad()
def start_noops(model: ModelChunks, *, seed: int) -> None:
    """Fill gates' rows for no-ops as gates begin; the same at every topology."""
    for index, module in model.routed_layers().items():
        assert module.noop_gate is not None
        random = torch.Generator().manual_seed(zlib.crc32(f"{seed} {index} no-ops".encode()))
        _fill(module.noop_gate.weight, STD, random)


def _fill(weight: torch.Tensor, std: float, random: torch.Generator) -> None:
    weight.copy_(torch.randn(weight.shape, generator=random) * std)
