"""Moves the routers' biases so that what a text scores is kept to a wanted share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_mod.data.loader import StepBatch
from megatron_mod.model.builder import ModelChunks
from megatron_mod.parallel import device
from megatron_mod.routing.config import KNOTS, RoutingConfig, logit_border
from megatron_mod.routing.costs import SIZES, UnitCosts
from megatron_mod.routing.quantile import borders
from megatron_mod.routing.scheme import Place
from megatron_mod.training.step import run_schedule

PASSES = 4
NEAR = 0.005  # to the wanted share
TOKENS = 4096  # of the last steps, that borders are set on at the end


class Settled(NamedTuple):
    """What was added to each router's bias, and the capacities that this leads to; ``[P]``."""

    moved: Tensor
    capacity: Tensor


def shifts(
    model: ModelChunks, routing: RoutingConfig, shares: Tensor, *, costs: UnitCosts | None = None
) -> Tensor:
    """What to add to the bias of each router, ``[P]``, so that as it is now it would have kept
    ``shares`` (the same shape) of the units it has noted; on every rank.

    With scope ``model`` one border for all places, that keeps the mean share of all their units.

    Args:
        costs: what units cost that shares are of; without, all the same.
    """
    costs = costs or UnitCosts.equal(len(routing.places))
    routers = model.routers() if model.groups.tp.rank() == 0 else {}  # the others hold copies
    mine = {place: router.scores() for place, router in routers.items()}
    longest = max((len(scores) for scores in mine.values()), default=1)
    table = torch.full((len(routing.places), longest), torch.nan, device=device.device())
    sizes = torch.zeros(*table.shape, len(SIZES), dtype=torch.float64, device=table.device)
    for number, place in enumerate(routing.places):
        if place in mine:
            table[number, : len(mine[place])] = mine[place]
            sizes[number, : len(mine[place])] = routers[place].noted_sizes()
    found = borders(
        table,
        shares,
        together=routing.scope == "model",
        add_up=_reduced(dist.ReduceOp.SUM),
        largest=_reduced(dist.ReduceOp.MAX),
        sizes=sizes,
        spent=costs.spent,
    )
    return _wanted(routing, found) - found


def spent_share(costs: UnitCosts, kept: Tensor, valid: Tensor) -> Tensor:
    """What kept units cost of what all do, at all places together, a scalar; see
    ``UnitCosts.spent``."""
    return costs.spent(kept, valid).sum() / costs.spent(valid, valid).sum().clamp(min=1e-300)


def _wanted(routing: RoutingConfig, like: Tensor) -> Tensor:
    wanted = torch.tensor([logit_border(t) for t in routing.thresholds])
    return wanted.to(like, non_blocking=True)


@torch.no_grad()
def move(model: ModelChunks, routing: RoutingConfig, shifts: Tensor) -> None:
    """Add its entry of ``[P]`` to each router's bias, in place."""
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
    costs: UnitCosts | None = None,
) -> Settled:
    """Move the biases until ``shares`` ``[P]`` of the units of some batches are kept, with real
    skipping, ``costs`` as in ``shifts``; called by all ranks.

    A border moves what later layers see, and with it their scores, so it is found by repetition.
    """
    costs = costs or UnitCosts.equal(len(routing.places))
    moved = torch.zeros_like(shares)
    was_training = model.training
    model.eval()
    for last in (*[False] * PASSES, True):
        noted: dict[Place, list] = {place: [] for place in model.routers()}
        kept = valid = torch.zeros(())
        for batch in batches:
            result = run_schedule(chunks, model, batch, routing, controller=None, note_units=True)
            kept, valid = kept + result.kept.cpu(), valid + result.valid.cpu()
            for place, router in model.routers().items():
                noted[place] += router.noted
        capacity = kept[:, 0] / valid[:, 0].clamp(min=1)
        miss = float((capacity - shares.cpu()).abs().max())
        if routing.scope == "model":
            miss = abs(float(spent_share(costs, kept, valid) - shares.cpu().mean()))
        if miss <= NEAR or last:
            break
        for place, router in model.routers().items():
            router.noted = noted[place]
        found = shifts(model, routing, shares, costs=costs)
        if not found.any():  # as near as so few units come
            break
        move(model, routing, found)
        moved += found.float()
    model.train(was_training)
    return Settled(moved, capacity)


def serve(model: ModelChunks, routing: RoutingConfig, work: float) -> None:
    """Tell the routers which budget of their range it is."""
    for router in model.routers().values():
        router.position = routing.position(work)


@torch.no_grad()
def settle_each(
    chunks: Sequence[torch.nn.Module],
    model: ModelChunks,
    batches: Sequence[StepBatch],
    routing: RoutingConfig,
    *,
    share_of: Callable[[float], Tensor],
    costs: UnitCosts | None,
) -> Settled:
    """The borders ``[P, KNOTS]`` of routers that serve a range of budgets, each found as ``settle``
    does, and the capacities ``[P]`` at the least budget, which the routers are left at; called by
    all ranks. Biases stay what they are, to rounding.

    Args:
        share_of: a budget's share of what all units cost, ``[P]``.
    """
    assert routing.budgets is not None
    routers, (low, high) = model.routers(), routing.budgets
    for router in routers.values():
        router.borders.zero_()
    found: list[Settled] = []
    for knot in reversed(range(KNOTS)):  # nearly everything is kept at the first
        work = low + (high - low) * knot / (KNOTS - 1)
        serve(model, routing, work)
        shares = share_of(work)
        found.append(settle(chunks, model, batches, routing, shares=shares, costs=costs))
    borders = torch.stack([each.moved for each in found], 1).cumsum(1).flip(1)
    move(model, routing, -borders[:, 0])
    for place, router in routers.items():
        router.borders.copy_(borders[routing.places.index(place)])
    return Settled(borders, found[-1].capacity)


def _reduced(op: dist.ReduceOp.RedOpType) -> Callable[[Tensor], Tensor]:
    def reduce(values: Tensor) -> Tensor:
        values = values.clone()
        dist.all_reduce(values, op=op)
        return values

    return reduce
