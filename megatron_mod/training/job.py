"""What of a training follows from its settings, the model's shape and the number of ranks."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

from megatron_mod.config.experts import check_mixture
from megatron_mod.config.lora import LoraSettings, require_projections
from megatron_mod.config.schema import Config
from megatron_mod.config.validate import check_batches
from megatron_mod.model.architecture import Architecture, check_fp8, check_parallel
from megatron_mod.model.cost import LENGTH, workload
from megatron_mod.model.pipeline import Layout
from megatron_mod.model.reach import Reach
from megatron_mod.parallel import topology
from megatron_mod.routing.config import RoutingConfig
from megatron_mod.routing.costs import Workload
from megatron_mod.training.pipeline import asked_layout


@dataclass(frozen=True)
class Job:
    """A training of which neither model nor data have been looked at.

    Args:
        topology: without a pipeline layout, which may depend on the data.
        computed: the layers that training computes.
        asked_layout: the pipeline layout that the settings name; ``None``: ``auto``, or none.
        dense_passes: forward passes of the dense model, for the loss.
    """

    config: Config
    arch: Architecture
    routing: RoutingConfig
    lora: LoraSettings | None
    topology: topology.Topology
    computed: range
    asked_layout: Layout | None
    dense_passes: int

    @cached_property
    def reach(self) -> Reach:
        """How far down backward passes go."""
        train = self.config.train
        return Reach(self.routing, self.lora, train.parts, train.recompute)


def arrange(
    config: Config,
    arch: Architecture,
    *,
    world_size: int,
    routing: RoutingConfig | None = None,
    lora: LoraSettings | None = None,
) -> Job:
    """Check the settings against the model's shape and the number of ranks.

    Args:
        routing: of routers that stay as they are; without, what the settings say.
        lora: of adapters that are given; without, what the settings say.

    Raises:
        ValueError: naming the field, its value, the constraint and the remedy.
    """
    p = config.parallel
    routing = routing or config.router.resolve(
        num_layers=arch.num_layers, hidden_size=arch.hidden_size, num_experts=arch.num_experts
    )
    check_mixture(routing.granularity, arch)
    if routing.work is not None and "routers" in config.train.parts:
        routing = evenly(routing, workload(arch, routing, [LENGTH]))
    projections = list(arch.projections)
    lora = lora or config.lora.resolve(num_layers=arch.num_layers, projections=projections)
    if lora is not None:
        require_projections(lora.targets, projections)
    computed = _computed(config, routing, lora, num_layers=arch.num_layers)
    ranks = topology.plan(
        tensor=p.tensor_model_parallel_size,
        pipeline=p.pipeline_model_parallel_size,
        context=p.context_parallel_size,
        virtual_pipeline=p.virtual_pipeline_model_parallel_size,
        world_size=world_size,
        sequence_parallel=p.sequence_parallel,
        expert=p.expert_model_parallel_size,
    )
    check_parallel(
        arch,
        tensor=ranks.tensor,
        pipeline=ranks.pipeline,
        virtual_pipeline=ranks.virtual_pipeline,
        expert=ranks.expert,
    )
    check_fp8(arch, config.model.fp8, tensor=ranks.tensor)
    layout = asked_layout(p, arch)
    check_batches(
        global_batch_size=config.train.global_batch_size,
        micro_batch_size=config.train.micro_batch_size,
        data_ranks=ranks.data,
        pipeline=ranks.pipeline if ranks.virtual_pipeline else 1,
    )
    if config.data.max_length > arch.max_sequence_length:
        raise ValueError(
            f"data.max_length = {config.data.max_length}: the model reads at most "
            f"{arch.max_sequence_length} tokens (max_position_embeddings)."
        )
    dense_passes = int(config.train.loss != "task")
    return Job(config, arch, routing, lora, ranks, computed, layout, dense_passes)


def evenly(routing: RoutingConfig, counted: Workload) -> RoutingConfig:
    """With the capacities that are the budget of work's (of a range, the middle's) if all places
    keep alike, for counting what a training will compute before they are found."""
    low = routing.least_work
    assert low is not None
    high = routing.budgets[1] if routing.budgets else low
    capacity = counted.even_capacity((low + high) / 2)
    return replace(routing, capacity=(capacity,) * len(routing.places))


def _computed(
    config: Config, routing: RoutingConfig, lora: LoraSettings | None, *, num_layers: int
) -> range:
    """Without the layers before the first that is routed or has adapters, if what they compute is
    kept."""
    if config.train.frozen_prefix == "recompute":
        return range(num_layers)
    routed, adapted = routing.layers, lora.layers if lora else ()
    first = min((*routed, *adapted))
    if first == 0:
        what, remedy = "has adapters (lora.layers)", "give deeper layers adapters"
        if 0 in routed:
            what, remedy = (
                f"is routed (router.layers = {config.router.layers})",
                "route deeper layers",
            )
        raise ValueError(
            f"train.frozen_prefix = cache: layer 0 {what}, so there is nothing before the first "
            f"such layer to keep; set it to recompute, or {remedy}."
        )
    return range(first, num_layers)
