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
from megatron_mod.routing.router import Router
from megatron_mod.training.step import run_schedule

PASSES = 4
NEAR = 0.005  # to the wanted share
TOKENS = 4096  # of the last steps, that borders are set on at the end


def shifts(model: ModelChunks, routing: RoutingConfig, shares: Tensor) -> Tensor:
    """What to add to the bias of each routed layer, ``[num_routed]``, so that ``shares`` (the same
    shape) of the units whose scores the routers have noted would have been kept; on every rank.

    With scope ``model`` one border for all layers, that keeps the mean share of all their units.
    """
    routers = model.routers() if model.groups.tp.rank() == 0 else {}  # the others hold copies
    mine = {k: torch.cat(router.scores) for k, router in routers.items() if router.scores}
    longest = max((len(scores) for scores in mine.values()), default=1)
    table = torch.full((len(routing.layers), longest), torch.nan, device=device.device())
    for place, layer in enumerate(routing.layers):
        if layer in mine:
            table[place, : len(mine[layer])] = mine[layer]
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


class Hold:
    """Keeps an optimizer's step from moving all scores up or down together.

    An Adam step is as large when the units pull one way as when they pull apart, and the borders
    of the step before would then keep everything, or nothing. What a step adds to the mean score
    of the units it has seen is taken off the biases again: of each layer's, or with scope ``model``
    the mean of all layers'.
    """

    def __init__(self, model: ModelChunks, routing: RoutingConfig) -> None:
        """Called before the step."""
        self.model, self.routing = model, routing
        self.before = {k: self._router(r) for k, r in model.routers().items()}

    @staticmethod
    def _router(router: Router) -> Tensor:
        assert router.bias is not None
        return torch.cat((router.weight.detach()[0], router.bias.detach()))

    @torch.no_grad()
    def release(self, read: Tensor) -> None:
        """Called by all ranks after the step; ``read``: see ``StepResult``."""
        moved = torch.zeros(len(self.routing.layers), device=read.device)
        if self.model.groups.tp.rank() == 0:  # the others hold copies
            for place, layer in enumerate(self.routing.layers):
                if router := self.model.routers().get(layer):
                    change = self._router(router) - self.before[layer]
                    moved[place] = change[:-1] @ read[place] + change[-1]
        dist.all_reduce(moved)
        moved /= self.model.groups.dp_cp.size()
        if self.routing.scope == "model":
            moved = moved.mean().expand_as(moved)
        move(self.model, self.routing, -moved)


@torch.no_grad()
def move(model: ModelChunks, routing: RoutingConfig, shifts: Tensor) -> None:
    """Add its entry of ``[num_routed]`` to each layer's bias, in place."""
    for layer, router in model.routers().items():
        assert router.bias is not None
        router.bias.data += shifts[routing.layers.index(layer)].float()


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
    real skipping; called by all ranks. Returns what was added to each layer's.

    A border moves what later layers see, and with it their scores, so it is found by repetition.
    """
    moved = torch.zeros_like(shares)
    was_training = model.training
    model.eval()
    for _ in range(PASSES):
        scores: dict[int, list[Tensor]] = {layer: [] for layer in model.routers()}
        kept, units = torch.zeros_like(shares), 0
        for batch in batches:
            result = run_schedule(chunks, model, batch, routing, controller=None, note_scores=True)
            kept, units = kept + result.capacity * result.num_units, units + result.num_units
            for layer, router in model.routers().items():
                scores[layer] += router.scores
        miss = kept / max(units, 1) - shares
        if (miss.mean().abs() if routing.scope == "model" else miss.abs().max()) <= NEAR:
            break
        for layer, router in model.routers().items():
            router.scores = scores[layer]
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
