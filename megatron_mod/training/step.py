"""One pass of a global batch through the model: loss, gradients, capacity."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_mod.data.loader import StepBatch
from megatron_mod.model.builder import ModelChunks
from megatron_mod.model.forward import Outcome, run_batches
from megatron_mod.model.layout import StepContext
from megatron_mod.parallel import device
from megatron_mod.routing.capacity import CapacityController
from megatron_mod.routing.config import RoutingConfig
from megatron_mod.routing.router import NOTED
from megatron_mod.training.losses import CrossEntropy, Loss, Shares


@dataclass(frozen=True)
class StepResult:
    """What a pass measured over the whole global batch, the same on every rank, on the device.

    ``loss``: what is minimised, without the penalty; ``task_loss``: cross entropy in nats per
    labelled token; ``capacity``: kept over valid units, ``[P]``; ``pull``: see ``keep_mask``,
    ``[P, 2]``; ``num_units``: valid units of a place; ``kept``, ``valid``: units, tokens and pairs
    (``routing.costs.SIZES``) of the kept and of all units, fp64 ``[P, 3]``; with an exact
    selection ``agreement``, the share of a router's tokens on which the causal rule says the same,
    and ``causal_loss``, its mean loss a token in nats, both ``[P]``; of gates that train
    ``load_balancing``, the mean of their losses over their tokens (``model/balance.py``), and
    ``balance_loss``, what it adds to what is minimised.
    """

    loss: Tensor
    task_loss: Tensor
    capacity: Tensor
    pull: Tensor
    num_units: int
    kept: Tensor
    valid: Tensor
    agreement: Tensor
    causal_loss: Tensor
    load_balancing: Tensor
    balance_loss: Tensor


def run_schedule(
    chunks: Sequence[torch.nn.Module],
    model: ModelChunks,
    batch: StepBatch,
    routing: RoutingConfig,
    *,
    controller: CapacityController | None,
    loss: Loss | None = None,
    check_decisions: bool = False,
    lot: int = 0,
    causal: bool = False,
    note_units: bool = False,
) -> StepResult:
    """Run all micro-batches forward, and backward if there is a controller to train with.

    Every rank adds its exact share of the global batch's loss and gradient: a loss divides by
    counts of the global batch, the penalty by its units, and nothing divides again.

    Args:
        chunks: what the schedule calls: the model's chunks, or the DDPs wrapped around them.
        model: this rank's part of the model, unwrapped.
        loss: ``CrossEntropy`` without.
        check_decisions: stop if tensor-parallel ranks decide differently.
        lot, causal: see ``StepContext``.
        note_units: have the routers keep what units were decided on, of about ``NOTED`` at most.
    """
    loss = loss or CrossEntropy()
    penalty, training = {}, controller is not None
    num_units = routing.scheme.units(
        sequences=batch.num_sequences, tokens=batch.num_tokens, top_k=model.config.moe_router_topk
    )
    capacities = {} if controller is None else controller.capacities
    if controller is not None:
        penalty = dict(zip(routing.places, controller.penalty_per_unit(num_units), strict=True))
    balance_share = (model.config.moe_aux_loss_coeff / batch.num_tokens) if training else 0.0
    loss.prepare(model, batch)
    for gate in model.gates().values():
        gate.balance.zero_()
    for router in model.routers().values():
        router.reset(notes_every=-(-num_units // NOTED) if note_units else 0)
    found: list[Shares] = []

    def finish(outcome: Outcome) -> Tensor:
        shares = loss(outcome, batch)
        found.append(Shares(shares.loss.detach(), shares.cross_entropy))
        return shares.loss

    run_batches(
        model,
        batch.micro_batches,
        len(batch.micro_batches),
        finish=finish,
        chunks=chunks,
        training=training,
        step=StepContext(
            penalty_per_unit=penalty,
            causal_loss_share=routing.causal_weight / num_units,
            balance_share=balance_share,
            capacities=capacities,
            lot=lot,
            causal=causal,
            check_decisions=check_decisions,
        ),
    )
    return _reduce(found, model, routing, num_units, balance_share=balance_share)


def _reduce(
    shares: list[Shares],
    model: ModelChunks,
    routing: RoutingConfig,
    num_units: int,
    *,
    balance_share: float,
) -> StepResult:
    """Add up what all ranks found; tensor-parallel ranks hold copies."""
    exact = {"dtype": torch.float64, "device": device.device()}
    losses, balance = torch.zeros(2, **exact), torch.zeros(2, **exact)
    for gate in model.gates().values():
        balance += gate.balance
    noted = torch.zeros(len(routing.places), 10, **exact)
    if model.groups.tp.rank() == 0:
        for share in shares:
            losses += torch.stack(share)
        routers = model.routers()
        for number, place in enumerate(routing.places):
            if router := routers.get(place):
                causal = torch.stack((router.agreed, router.causal_loss))
                noted[number] = torch.cat((router.sizes.flatten(), router.pull, causal))
    totals = torch.cat((losses, balance, noted.flatten()))
    dist.all_reduce(totals)
    balance, noted = totals[2:4], totals[4:].view_as(noted)
    kept, valid = noted[:, :3], noted[:, 3:6]
    units = valid[:, :1].clamp(min=1)
    capacity, agreement, causal_loss = (
        (torch.cat((kept[:, :1], noted[:, 8:]), 1) / units).float().t()
    )
    return StepResult(
        loss=totals[0].float(),
        task_loss=totals[1].float(),
        capacity=capacity,
        pull=noted[:, 6:8].float(),
        num_units=num_units,
        kept=kept,
        valid=valid,
        agreement=agreement,
        causal_loss=causal_loss,
        load_balancing=(balance[0] / balance[1].clamp(min=1)).float(),
        balance_loss=(balance[0] * balance_share).float(),
    )
