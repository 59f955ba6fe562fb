"""All that is estimated of a training on given machines."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from megatron_mod.config.schema import Config
from megatron_mod.estimate import communication, memory, parameters, time
from megatron_mod.estimate.gpus import Kind
from megatron_mod.estimate.memory import Memory
from megatron_mod.estimate.placed import Placed
from megatron_mod.estimate.time import StepTime
from megatron_mod.model.architecture import Architecture
from megatron_mod.training.job import arrange


@dataclass(frozen=True)
class Cluster:
    """``nodes`` of ``per_node`` devices of a kind, one rank each."""

    nodes: int
    per_node: int
    kind: Kind

    @property
    def world_size(self) -> int:
        return self.nodes * self.per_node


@dataclass(frozen=True)
class Estimate:
    """What a training needs and takes.

    Args:
        rank: of the pipeline, that holds most; ``memory`` is its.
    """

    placed: Placed
    cluster: Cluster
    rank: int
    memory: Memory
    step: StepTime

    @property
    def fits(self) -> bool:
        return self.memory.total <= self.cluster.kind.memory

    def to_dict(self) -> dict:
        """JSON form; bytes, seconds and shares."""
        job, ranks = self.placed.job, self.placed.job.topology
        all_of, own = parameters.total(self.placed), parameters.of_rank(self.placed, self.rank)
        kind, step = self.cluster.kind, self.step
        sent = [communication.of_step(self.placed, rank) for rank in range(ranks.pipeline)]
        return {
            "gpu": kind.name,
            "nodes": self.cluster.nodes,
            "gpus_per_node": self.cluster.per_node,
            "world_size": ranks.world_size,
            "ranks": ranks.to_dict(),
            "pipeline_layout": list(self.placed.cut.layout),
            "micro_batches": self.placed.cut.micro_batches,
            "parameters": {
                "total": all_of.base + all_of.added,
                "trained": all_of.trained,
                "per_rank": own.base + own.added,
            },
            "memory": {
                "parts": {
                    **self.memory.lasting,
                    **self.memory.step,
                    **self.memory.start,
                    "overhead": self.memory.overhead,
                },
                "peak": self.memory.peak,
                "pipeline_rank": self.rank,
                "per_pipeline_rank": [
                    memory.of_rank(self.placed, rank, kind).total for rank in range(ranks.pipeline)
                ],
                "total": self.memory.total,
                "available": kind.memory,
                "prefix_cache": memory.prefix_cache(self.placed),
            },
            "fits": self.fits,
            "step": {
                "seconds": step.seconds,
                "tokens": step.tokens,
                "tokens_per_second": step.tokens / step.seconds,
                "operations": step.operations,
                "seconds_of_communication": step.communication,
                "pipeline_bubble": step.bubble,
            },
            "communication": {
                what: max(found[what] for found in sent) for what in communication.KINDS
            },
            "steps": job.config.train.steps,  # None: train.epochs, of samples that are not counted
            "row": {"rows": self.placed.rows, "tokens": self.placed.length},
            "dtype": job.config.model.dtype,
        }


def estimate(
    config: Config,
    arch: Architecture,
    *,
    nodes: int,
    per_node: int,
    kind_of: Callable[[Placed], Kind],
) -> Estimate:
    """Of a training of a model of this shape.

    Args:
        kind_of: the kind of device, which may have to be measured with what it is to run.

    Raises:
        ValueError: settings that do not fit the model or the number of devices.
    """
    routing = lora = None
    if config.model.lora is not None or "routers" not in config.train.parts:
        # Reading them imports Megatron, which takes seconds.
        from megatron_mod.training.given import fixed_routing, given_adapters

        base = Path(config.model.checkpoint or config.model.hf_path or "")
        routing = fixed_routing(config, arch, base=base)
        lora = given_adapters(config, arch)
    placed = Placed.of(
        arrange(config, arch, world_size=nodes * per_node, routing=routing, lora=lora)
    )
    kind = kind_of(placed)
    rank, held = memory.fullest(placed, kind)
    return Estimate(
        placed,
        Cluster(nodes, per_node, kind),
        rank,
        held,
        time.of_step(placed, kind, per_node=per_node),
    )
