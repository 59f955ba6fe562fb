"""Solves the stand-ins of a model's routed layers from what its dense layers compute."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch.distributed as dist
from torch import Tensor

from megatron_mod.data.loader import StepBatch
from megatron_mod.model.builder import ModelChunks
from megatron_mod.model.forward import run_batches
from megatron_mod.model.layout import StepContext
from megatron_mod.parallel import device
from megatron_mod.routing.config import RoutingConfig
from megatron_mod.routing.scheme import Place
from megatron_mod.routing.stand_in import Moments

RIDGE = 1e-2  # of the mean variance of what is read
FEW = 4  # tokens for each dimension of what is read: with fewer a fit is good on these alone


def fit_stand_ins(model: ModelChunks, batches: Iterable[StepBatch]) -> dict[Place, float]:
    """Solve and fill in this rank's stand-ins; called by all ranks alike.

    Tokens go by once, a global batch at a time; what is kept of them are the moments. Every rank
    that holds a layer solves it, from the same sums.

    Returns:
        The share of each unit's variance that its stand-in explains, of all places.
    """
    config, groups = model.config, model.groups
    stand_ins = model.stand_ins()
    moments = {place: Moments(config.hidden_size, device=device.device()) for place in stand_ins}

    def watch(place: Place, residual: Tensor, read: Tensor, update: Tensor) -> None:
        moments[place].add(residual, read, update)

    was_training = model.training
    model.eval()
    for batch in batches:
        run_batches(
            model,
            batch.micro_batches,
            len(batch.micro_batches),
            finish=lambda outcome: None,
            step=StepContext(dense=True, watch_units=watch),
        )
    model.train(was_training)
    explained = {}
    for place, found in moments.items():
        for sums in (found.table, found.squares):
            dist.all_reduce(sums, group=groups.dp_cp)
        stand_in = stand_ins[place]
        solution = found.solve(stand_in.down.out_features, ridge=RIDGE)
        stand_in.put(solution)
        for parameter in stand_in.parameters():  # the last bit of a solver is each machine's own
            for group in (groups.tp, groups.dp_cp):
                first = dist.get_process_group_ranks(group)[0]
                dist.broadcast(parameter.data, src=first, group=group)
        explained[place] = solution.explained
    everybody: list = [None] * dist.get_world_size()
    dist.all_gather_object(everybody, explained)
    return dict(sorted({k: v for found in everybody for k, v in found.items()}.items()))


def describe(
    explained: Mapping[Place, float], routing: RoutingConfig, *, tokens: int, hidden_size: int
) -> str:
    """What was fitted, in a line, and a warning where the tokens are few."""
    label, rank = routing.scheme.label, routing.stand_in_rank
    shares = ", ".join(f"{label(place)}: {share:.2f}" for place, share in explained.items())
    text = (
        f"stand-ins of rank {rank} fitted on {tokens} tokens; explained variance by layer {shares}"
    )
    if tokens < FEW * hidden_size:
        text += (
            f"\nwarning: {tokens} tokens are few for a hidden size of {hidden_size}: what they "
            f"explain of other text is less; give {FEW * hidden_size} or more."
        )
    return text
