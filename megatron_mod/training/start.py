"""Where the routers of a new run start, what stands in for what they skip, and its adapters."""

from __future__ import annotations

import logging

from megatron_mod.config.schema import Config
from megatron_mod.conversion.adapters import has_adapters, read_adapters
from megatron_mod.conversion.lora import put_adapters
from megatron_mod.conversion.restore import put_added
from megatron_mod.conversion.routers import read_routers
from megatron_mod.data.loader import Loader
from megatron_mod.model.builder import ModelChunks
from megatron_mod.model.lora import initial_adapters
from megatron_mod.parallel import topology
from megatron_mod.routing.config import ROUTER, STAND_IN, RoutingConfig
from megatron_mod.routing.stand_in import TOKENS
from megatron_mod.training.exact_start import start_at_random, start_noops
from megatron_mod.training.given import router_folder
from megatron_mod.training.importance import leave_one_out, start_apart
from megatron_mod.training.plan import Plan
from megatron_mod.training.stand_ins import describe, fit_stand_ins

# What routers that training starts from have to have as the settings have it.
_OWN = (
    "granularity", "layers", "threshold", "selection", "causal", "renormalize", "num_noop_experts"
)  # fmt: skip
LABELS = 600  # on which a layer's importance is measured


def start(model: ModelChunks, config: Config, plan: Plan, data: Loader) -> None:
    """Fill adapters (from ``model.lora``, or new ones), routers and stand-ins: these from
    ``model.routers``, or those beside the base, and what they do not have is solved or measured on
    the training's first samples, unless they are to stay as they are; routers of zeros are
    untrained, whatever else is given with them. Called by all ranks.

    Raises:
        ValueError: they were made for other layers or another way of deciding than the settings'.
    """
    routing, arch = plan.routing, plan.base.arch
    if plan.lora is not None:
        if config.model.lora is not None:
            _, adapters = read_adapters(config.model.lora, arch)
        else:
            adapters = initial_adapters(plan.lora, arch.projections, seed=config.train.seed)
        put_adapters(model, adapters)
    if not routing.layers:
        return
    found = _given(config, plan)
    if found:
        put_added(model, found)
    if "routers" not in config.train.parts:
        return
    if routing.num_noop_experts:
        if not found:
            start_noops(model, seed=config.train.seed)
        return
    if routing.is_exact:
        if not found:
            start_at_random(model, routing, seed=config.train.seed)
        return
    epoch, tokens, labels = _reads(config, plan, data)
    given = set(next(iter(found.values()))) if found else set()
    if routing.stand_in_rank and not any(name.startswith(STAND_IN) for name in given):
        topology.at("fitting the stand-ins")
        batches = data.until(epoch, tokens=tokens)
        explained = fit_stand_ins(model, batches)
        fitted = sum(batch.num_tokens for batch in batches)
        width = model.config.hidden_size
        topology.print_once(describe(explained, routing, tokens=fitted, hidden_size=width))
    weights = [routing.name_of(ROUTER, target) + ".weight" for target in routing.scheme.targets]
    trained = found and any(own[name].any() for own in found.values() for name in weights)
    if trained or not routing.bias:
        return
    costs = dict.fromkeys(routing.places, 1.0)
    if config.router.init == "importance":
        topology.at("measuring the layers' importance")
        costs = leave_one_out(model, data.until(epoch, labels=labels), routing.places)
        label = routing.scheme.label
        shown = ", ".join(f"{label(place)}: {cost:.3f}" for place, cost in costs.items())
        topology.print_once(f"cost of leaving a layer out, nats a label: {shown}")
    if routing.work is not None:  # what is cheap to lose for what it costs goes first
        prices = plan.workload.mean_costs()
        shares = (prices / prices.mean()).tolist()
        costs = {k: cost / share for (k, cost), share in zip(costs.items(), shares, strict=True)}
    start_apart(model, costs, border=routing.logit_border(routing.places[0]))


def steps_read(config: Config, plan: Plan, data: Loader) -> int:
    """How many steps' samples ``start`` reads, at most."""
    epoch, tokens, labels = _reads(config, plan, data)
    return len(data.until(epoch, tokens=tokens, labels=labels))


def _reads(config: Config, plan: Plan, data: Loader) -> tuple[range, int, int]:
    """The steps whose samples ``start`` may read, and on how many tokens stand-ins are solved and
    labels importance is measured, if they are."""
    epoch = range(-(-len(data.samples) // data.global_batch_size))
    if "routers" not in config.train.parts:
        return epoch, 0, 0
    tokens = (config.router.stand_in_tokens or TOKENS) if plan.routing.stand_in_rank else 0
    labels = LABELS if config.router.init == "importance" else 0
    return epoch, tokens, labels


def _given(config: Config, plan: Plan) -> dict | None:
    folder = router_folder(config, plan.base.path)
    if folder is None:
        return None
    found, added = read_routers(folder, plan.base.arch)
    if config.model.lora is None and has_adapters(folder):
        topology.print_once(
            f"warning: the routers in {folder} were trained with adapters, which are left out "
            "here; model.lora names them.",
            level=logging.WARNING,
        )
    for field in _OWN:
        theirs, ours = getattr(found, field), getattr(plan.routing, field)
        if theirs != ours:
            raise ValueError(
                f"router.{field} = {ours}: the routers in {folder} have {theirs}; set that, or "
                "start from other routers (model.routers)."
            )
    return _check_fits(added, found, plan.routing, folder)


def _check_fits(added: dict, theirs: RoutingConfig, ours: RoutingConfig, folder) -> dict:
    if theirs.bias and not ours.bias:
        raise ValueError(
            f"router.bias = false: the routers in {folder} have biases; set it to true, or start "
            "from other routers (model.routers)."
        )
    if theirs.stand_in_rank and theirs.stand_in_rank != ours.stand_in_rank:
        wanted = f"linear and router.stand_in_rank to {theirs.stand_in_rank}"
        raise ValueError(
            f"router.stand_in: the routers in {folder} were made with stand-ins of rank "
            f"{theirs.stand_in_rank}; set router.stand_in to {wanted}, or start from other routers "
            "(model.routers)."
        )
    if theirs.budgets and theirs.budgets != ours.budgets:
        raise ValueError(
            f"router.work: the routers in {folder} serve budgets from {theirs.budgets[0]} to "
            f"{theirs.budgets[1]}; set it to [{theirs.budgets[0]}, {theirs.budgets[1]}], or start "
            "from other routers (model.routers)."
        )
    return added
