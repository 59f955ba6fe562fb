"""How long a step takes."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_mod.estimate import communication, parameters
from megatron_mod.estimate.gpus import Kind
from megatron_mod.estimate.placed import Placed
from megatron_mod.model.pipeline import step_length


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step, and where they go.

    Args:
        seconds: of all of it.
        communication: of the rank that communicates most; nothing is taken to overlap.
        bubble: share of the step that a rank of the pipeline waits for others, on average.
        tokens: of a step, all ranks together.
        operations: floating-point operations of a step, all ranks together.
    """

    seconds: float
    communication: float
    bubble: float
    tokens: int
    operations: float


def of_step(placed: Placed, kind: Kind, *, per_node: int) -> StepTime:
    """Of a step on devices of this kind, ``per_node`` in a node.

    A stage takes as long as its products at the rate that trainings reach, or as reading its
    weights once each way (a roofline: Williams et al. 2009), and its communication beside that.
    """
    job = placed.job
    ranks, micro_batches = job.topology, placed.cut.micro_batches
    operations = placed.cut.costs.of(placed.cut.layout)
    rate = kind.rate(job.config.model.dtype, job.config.model.fp8) * ranks.tensor * ranks.context
    links = _links(placed, kind, per_node=per_node)
    talking = [
        sum(size / links[what] for what, size in communication.of_stage(placed, stage).items())
        for stage in range(len(placed.stages))
    ]
    stages = [
        max(own / rate, _reading(placed, stage) / kind.bandwidth) + talk
        for stage, (own, talk) in enumerate(zip(operations, talking, strict=True))
    ]
    length = step_length(stages, ranks=ranks.pipeline, micro_batches=micro_batches)
    gradients = max(
        communication.of_gradients(placed, rank) / links[communication.ROUTERS]
        for rank in range(ranks.pipeline)
    )
    of_ranks = [
        sum(talking[stage] for stage in placed.stages_of(rank)) for rank in range(ranks.pipeline)
    ]
    return StepTime(
        seconds=length + gradients,
        communication=micro_batches * max(of_ranks) + gradients,
        bubble=1 - micro_batches * sum(stages) / (ranks.pipeline * length),
        tokens=job.config.train.global_batch_size * placed.length,
        operations=float(sum(operations)) * micro_batches * ranks.data,
    )


def _reading(placed: Placed, stage: int) -> int:
    """Bytes of weights that a micro-batch reads in a stage: each way once, and for what is computed
    beside."""
    job = placed.job
    first, full = job.reach.first, job.config.train.recompute == "full"
    times = sum(
        1 + job.dense_passes + (layer > first) + (full and layer >= first)
        for layer in placed.stages[stage]
    )
    return times * parameters.layer(job.arch, job.topology) * placed.element


def _links(placed: Placed, kind: Kind, *, per_node: int) -> dict[str, float]:
    """The slowest link of each kind of communication. Megatron numbers ranks along the tensor
    degree first, then context, data and pipeline."""
    ranks = placed.job.topology
    spans = {
        communication.ALL_REDUCE: ranks.tensor,
        communication.ALL_GATHER: ranks.tensor,
        communication.REDUCE_SCATTER: ranks.tensor,
        communication.RING: ranks.tensor * ranks.context,
        communication.ROUTERS: ranks.tensor * ranks.context * ranks.data,
        communication.POINT_TO_POINT: ranks.world_size,
        communication.EXPERTS: ranks.tensor * ranks.expert,
    }
    return {what: kind.near if span <= per_node else kind.far for what, span in spans.items()}
