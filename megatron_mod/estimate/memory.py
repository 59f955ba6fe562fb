"""What one rank holds in memory, by part."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from megatron_mod.estimate import activations, parameters
from megatron_mod.estimate.gpus import Kind
from megatron_mod.estimate.placed import Placed
from megatron_mod.estimate.schedule import most_kept
from megatron_mod.routing.router import NOTED
from megatron_mod.routing.stand_in import TOKENS


@dataclass(frozen=True)
class Memory:
    """Bytes of a rank, by what they are; a step's and a start's parts need not exist together.

    Args:
        lasting: always there.
        step: beside it in a training step.
        start: beside it where a new run starts.
        overhead: what libraries and the allocator take beside all of it, assumed.
    """

    lasting: Mapping[str, int]
    step: Mapping[str, int]
    start: Mapping[str, int]
    overhead: int

    @property
    def total(self) -> int:
        """The most there is at a time."""
        own = sum(self.lasting.values())
        return own + max(sum(self.step.values()), sum(self.start.values())) + self.overhead

    @property
    def peak(self) -> str:
        """When that is."""
        return "step" if sum(self.step.values()) >= sum(self.start.values()) else "start"


def of_rank(placed: Placed, rank: int, kind: Kind) -> Memory:
    """Of the rank of the pipeline with this number."""
    job, found = placed.job, parameters.of_rank(placed, rank)
    ranks = job.topology
    shards = ranks.data * ranks.context if job.config.parallel.use_distributed_optimizer else 1
    averaged, whole = job.config.optimizer.average_fraction > 0, job.reach.trains_base
    # What is stepped beside a weight of fewer bits, and Adam's two moments.
    state = 4 * found.base * (whole and placed.element < 4) + 8 * found.trained
    lasting = {
        "weights" if whole else "frozen weights": found.base * placed.element,
        "routers and stand-ins": 4 * (found.added - found.adapters),
        "weights in FP8": _in_fp8(placed, rank),
        "adapters": 4 * found.adapters,
        "gradients": 4 * found.trained,
        "optimizer state": state // shards,
        "average": 4 * found.trained if averaged else 0,
    }
    kept = most_kept(
        [activations.of_stage(placed, stage) for stage in placed.stages_of(rank)],
        rank=rank,
        ranks=ranks.pipeline,
        micro_batches=placed.cut.micro_batches,
    )
    step = {
        "activations": kept + _teacher(placed, rank),
        "noted inputs of routers": _noted(placed, rank),
        "working space of a layer": activations.working(placed, rank),
        "logits": activations.head(placed, rank),
    }
    # A layer's and the head's are not at work at the same time.
    smaller = min(("working space of a layer", "logits"), key=step.__getitem__)
    step[smaller] = 0
    start = {"solving stand-ins": _solving(placed, rank)}
    passing = max(sum(step.values()), sum(start.values()))
    return Memory(lasting, step, start, kind.overhead(passing, groups=_groups(placed)))


def fullest(placed: Placed, kind: Kind) -> tuple[int, Memory]:
    """The rank of the pipeline that holds most, and what it holds."""
    everyone = [of_rank(placed, rank, kind) for rank in range(placed.job.topology.pipeline)]
    rank = max(range(len(everyone)), key=lambda number: everyone[number].total)
    return rank, everyone[rank]


def prefix_cache(placed: Placed) -> dict[str, int]:
    """Bytes of ``train.frozen_prefix: cache``: of a token on the disk, and on the host of each rank
    of the first stage, which reads the states of a whole global batch and puts them into rows."""
    if not placed.job.computed.start:
        return {}
    token = placed.job.arch.hidden_size * placed.element
    batch = placed.job.config.train.global_batch_size * placed.length
    return {"disk_per_token": token, "host_per_rank": 2 * batch * token}


def _in_fp8(placed: Placed, rank: int) -> int:
    """Transformer Engine's copies of frozen weights, made once: one, and where backward passes
    through the layer another, transposed."""
    job = placed.job
    if job.config.model.fp8 is None:
        return 0
    weights = parameters.layer(job.arch, job.topology) - job.arch.norm_parameters
    return sum(weights * (1 + (layer >= job.reach.first)) for layer in placed.layers_of(rank))


def _teacher(placed: Placed, rank: int) -> int:
    """The dense model's final states at labels, of all micro-batches of a step."""
    if not placed.has_head(rank):
        return 0
    states = placed.tokens * placed.job.arch.hidden_size * placed.element
    return placed.job.dense_passes * placed.cut.micro_batches * states


def _noted(placed: Placed, rank: int) -> int:
    """What routers with biases were asked about in a step, as borders follow it (``NOTED``)."""
    job = placed.job
    if not job.routing.bias or "routers" not in job.config.train.parts:
        return 0
    sequences = job.config.train.global_batch_size
    inputs = sequences * (1 if job.routing.scheme.per_sequence else placed.length)
    units = inputs * (job.arch.top_k if job.routing.scheme.per_expert else 1)
    noted = inputs // -(-units // NOTED) // job.topology.data
    noted //= 1 if job.routing.scheme.per_sequence else job.topology.context
    element = 4 if job.routing.scheme.per_sequence else placed.element
    return len(placed.routed_of(rank)) * noted * job.arch.hidden_size * element


def _solving(placed: Placed, rank: int) -> int:
    """``routing/stand_in.py``: moments of all routed layers in fp64, and beside them what of a
    micro-batch goes into one, or the matrices that solve one."""
    job, h = placed.job, placed.job.arch.hidden_size
    routed = len(placed.routed_of(rank))
    if not routed or not job.routing.stand_in_rank or job.config.model.routers is not None:
        return 0
    moments = 8 * (h + 1) * (2 * h + 1)
    tokens = min(placed.tokens, job.config.router.stand_in_tokens or TOKENS)
    return routed * moments + max(8 * 8 * h * tokens, 8 * 8 * h * h)


def _groups(placed: Placed) -> int:
    """Process groups of several ranks that a rank is a member of."""
    ranks = placed.job.topology
    degrees = ranks.tensor, ranks.pipeline, ranks.context, ranks.data, ranks.expert
    return sum(degree > 1 for degree in degrees)
