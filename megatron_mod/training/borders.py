"""Moves the routers' biases so that what a text scores is kept to a wanted share."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_mod.data.loader import Loader, StepBatch
from megatron_mod.model.builder import ModelChunks
from megatron_mod.parallel import device
from megatron_mod.routing.config import RoutingConfig, logit_border
from megatron_mod.routing.quantile import borders
from megatron_mod.routing.router import Router
from megatron_mod.training.step import run_schedule

PASSES = 5
NEAR = 0.005  # to the wanted share
TOKENS = 8192


def shifts(model: ModelChunks, routing: RoutingConfig, shares: Tensor) -> dict[int, float]:
    """What to add to the bias of each routed layer so that ``shares`` ``[num_routed]`` of the units
    whose scores the routers have noted would have been kept; the same on every rank.

    With scope ``model`` one number for all layers, that keeps the mean share of all their units.
    """
    where = device.device()
    routers = model.routers() if model.groups.tp.rank() == 0 else {}  # the others hold copies
    mine = {k: torch.cat(router.scores) for k, router in routers.items() if router.scores}
    longest = max((len(scores) for scores in mine.values()), default=0)
    table = torch.full((len(routing.layers), max(longest, 1)), torch.nan, device=where)
    for place, layer in enumerate(routing.layers):
        if layer in mine:
            table[place, : len(mine[layer])] = mine[layer]
    found = borders(
        table,
        shares.cpu().to(where),
        together=routing.scope == "model",
        add_up=_reduced(dist.ReduceOp.SUM),
        largest=_reduced(dist.ReduceOp.MAX),
    )
    wanted = [logit_border(threshold) for threshold in routing.thresholds]
    pairs = zip(wanted, found.tolist(), strict=True)
    return dict(zip(routing.layers, (want - border for want, border in pairs), strict=True))


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
        return torch.cat((router.weight.detach()[0], router.bias.detach()))

    @torch.no_grad()
    def release(self, read: Tensor) -> None:
        """Called by all ranks after the step; ``read``: see ``StepResult``."""
        moved = torch.zeros(len(self.routing.layers), device=read.device)
        for place, layer in enumerate(self.routing.layers):
            if layer in self.before and self.model.groups.tp.rank() == 0:
                change = self._router(self.model.routers()[layer]) - self.before[layer]
                moved[place] = change[:-1] @ read[place] + change[-1]
        copies = self.model.groups.dp_cp.size()
        dist.all_reduce(moved)
        moved /= copies
        if self.routing.scope == "model":
            moved = moved.mean().expand_as(moved)
        back = dict(zip(self.routing.layers, (-moved).tolist(), strict=True))
        move(self.model, back)


@torch.no_grad()
def move(model: ModelChunks, shifts: dict[int, float]) -> None:
    """Add each layer's shift to its bias, in place."""
    for layer, router in model.routers().items():
        router.bias += shifts[layer]


@torch.no_grad()
def settle(
    chunks: Sequence[torch.nn.Module],
    model: ModelChunks,
    batches: Sequence[StepBatch],
    routing: RoutingConfig,
    *,
    shares: Tensor,
) -> dict[int, float]:
    """Move the biases until ``shares`` ``[num_routed]`` of the units of some batches are kept, with
    real skipping; called by all ranks. Returns what was added to each layer's.

    A border moves what later layers see, and with it their scores, so it is found by repetition.
    """
    moved = dict.fromkeys(routing.layers, 0.0)
    together = routing.scope == "model"
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
        if (miss.mean().abs() if together else miss.abs().max()) <= NEAR:
            break
        for layer, router in model.routers().items():
            router.scores = scores[layer]
        found = shifts(model, routing, shares)
        move(model, found)
        moved = {layer: moved[layer] + found[layer] for layer in moved}
    model.train(was_training)
    return moved


def last_batches(loader: Loader, steps: int) -> list[StepBatch]:
    """Those of the last steps of a training, enough to set borders on."""
    batches: list[StepBatch] = []
    for step in reversed(range(steps)):
        batches.append(loader.step(step))
        if sum(batch.num_tokens for batch in batches) >= TOKENS:
            break
    return batches


def layer_of_bias(key: str) -> int | None:
    """The layer whose router has its bias under this key of a checkpoint, if one has."""
    found = re.fullmatch(r"decoder\.layers\.(\d+)\.router\.bias", key)
    return int(found[1]) if found else None


def _reduced(op: dist.ReduceOp) -> Callable[[Tensor], Tensor]:
    def reduce(values: Tensor) -> Tensor:
        values = values.clone()
        dist.all_reduce(values, op=op)
        return values

    return reduce
