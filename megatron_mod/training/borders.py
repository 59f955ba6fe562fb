"""Moves the routers' biases so that what a text scores is kept to a wanted share."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_mod.data.loader import StepBatch
from megatron_mod.model.builder import ModelChunks
from megatron_mod.parallel import device
from megatron_mod.routing.config import RoutingConfig, logit_border
from megatron_mod.routing.quantile import borders
from megatron_mod.routing.scheme import Place
from megatron_mod.training.step import run_schedule

PASSES = 4
NEAR = 0.005  # to the wanted share
TOKENS = 4096  # of the last steps, that borders are set on at the end


def shifts(model: ModelChunks, routing: RoutingConfig, shares: Tensor) -> Tensor:
    """What to add to the bias of each router, ``[num_routed]``, so that it, as it is
    now, would have kept ``shares`` (the same shape) of the units it has noted; on every rank.

    With scope ``model`` one border for all routers, that keeps the mean share of all their units.
    """
    routers = model.routers() if model.groups.tp.rank() == 0 else {}  # the others hold copies
    mine = {place: router.scores() for place, router in routers.items()}
    longest = max((len(scores) for scores in mine.values()), default=1)
    table = torch.full((len(routing.places), longest), torch.nan, device=device.device())
    for number, place in enumerate(routing.places):
        if place in mine:
            table[number, : len(mine[place])] = mine[place]
    found = borders(
        table,
        shares,
        together=routing.scope == "model",
        add_up=_reduced(dist.ReduceOp.SUM),
        largest=_reduced(dist.ReduceOp.MAX),
    )
    return _wanted(routing, found) - found


def _wanted(routing: RoutingConfig, like: Tensor) -> Tensor:
    wanted = torch.tensor([logit_border(t) for t in routing.thresholds])
    return wanted.to(like, non_blocking=True)


@torch.no_grad()
def move(model: ModelChunks, routing: RoutingConfig, shifts: Tensor) -> None:
    """Add its entry of ``[num_routed]`` to each router's bias, in place."""
    for place, router in model.routers().items():
        assert router.bias is not None
        router.bias.data += shifts[routing.places.index(place)].float()


@torch.no_grad()
def settle(
    chunks: Sequence[torch.nn.Module],
    model: ModelChunks,
    batches: Sequence[StepBatch],
    routing: RoutingConfig,
    *,
    shares: Tensor,
) -> Tensor:
    """Move the biases until ``shares`` ``[num_routed]`` of the units of some batches are kept, with
    real skipping; called by all ranks. Returns what was added to each router's.

    A border moves what later layers see, and with it their scores, so it is found by repetition.
    """
    moved = torch.zeros_like(shares)
    was_training = model.training
    model.eval()
    for _ in range(PASSES):
        noted: dict[Place, list] = {place: [] for place in model.routers()}
        kept, units = torch.zeros_like(shares), 0
        for batch in batches:
            result = run_schedule(chunks, model, batch, routing, controller=None, note_units=True)
            kept, units = kept + result.capacity * result.num_units, units + result.num_units
            for place, router in model.routers().items():
                noted[place] += router.noted
        miss = kept / max(units, 1) - shares
        if (miss.mean().abs() if routing.scope == "model" else miss.abs().max()) <= NEAR:
            break
        for place, router in model.routers().items():
            router.noted = noted[place]
        found = shifts(model, routing, shares)
        move(model, routing, found)
        moved += found.float()
    model.train(was_training)
    return moved


def _reduced(op: dist.ReduceOp.RedOpType) -> Callable[[Tensor], Tensor]:
    def reduce(values: Tensor) -> Tensor:
        values = values.clone()
        dist.all_reduce(values, op=op)
        return values

    return reduce
