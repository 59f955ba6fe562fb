"""A training whose layers have their places on ranks: what every formula here is about."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from megatron_mod.model.cost import training_costs
from megatron_mod.training.job import Job
from megatron_mod.training.pipeline import Cut, cut_of, micro_batches_of

ELEMENT = {"float32": 4, "bfloat16": 2}  # bytes of a number


@dataclass(frozen=True)
class Placed:
    """A job cut into pipeline stages, for rows that are all of ``data.max_length`` tokens, labelled
    each: the longest there can be. The training itself cuts by its own samples.

    Sizes are those of one rank; ``rank`` counts along the pipeline.
    """

    job: Job
    cut: Cut

    @classmethod
    def of(cls, job: Job) -> Placed:
        """Where the layers go, by the settings, or (``auto``) by what they compute."""
        length = job.config.data.max_length
        costs = training_costs(
            job.arch,
            job.routing,
            [length] * job.config.train.micro_batch_size,
            labels=length * job.config.train.micro_batch_size,
            dense_passes=job.dense_passes,
            num_free_layers=job.computed.start,
            recompute=job.config.train.recompute,
            lora=job.lora,
            parts=job.config.train.parts,
        )
        micro_batches = micro_batches_of(job.config, job.topology)
        free = job.computed.start
        asked = job.asked_layout
        if job.topology.stages == 1:
            asked = (job.arch.num_layers,)
        return cls(
            job,
            cut_of(
                costs,
                job.topology,
                micro_batches=micro_batches,
                asked=asked,
                num_free_layers=free,
            ),
        )

    @property
    def element(self) -> int:
        """Bytes of a frozen weight, and of a number of the activations."""
        return ELEMENT[self.job.config.model.dtype]

    @property
    def rows(self) -> int:
        """Of a micro-batch."""
        return self.job.config.train.micro_batch_size

    @property
    def length(self) -> int:
        """Tokens of a row, of all ranks that share it."""
        return self.job.config.data.max_length

    @property
    def tokens(self) -> int:
        """Of a micro-batch that a context-parallel rank holds."""
        return self.rows * self.length // self.job.topology.context

    @property
    def split_tokens(self) -> int:
        """Those between layers, of which sequence parallelism gives each rank its share."""
        ranks = self.job.topology
        return self.tokens // (ranks.tensor if ranks.sequence_parallel else 1)

    @cached_property
    def stages(self) -> list[range]:
        """The layers of each stage, those left out that training does not compute."""
        found, first = [], 0
        for count in self.cut.layout:
            found.append(range(max(first, self.job.computed.start), first + count))
            first += count
        return found

    def stages_of(self, rank: int) -> range:
        """The numbers of the stages that a rank holds."""
        return range(rank, len(self.stages), self.job.topology.pipeline)

    def layers_of(self, rank: int) -> list[int]:
        return [layer for stage in self.stages_of(rank) for layer in self.stages[stage]]

    def routed_of(self, rank: int) -> list[int]:
        return [layer for layer in self.layers_of(rank) if layer in self.job.routing.layers]

    def has_embedding(self, rank: int) -> bool:
        return rank == 0 and not self.job.computed.start

    def has_head(self, rank: int) -> bool:
        return rank == self.job.topology.pipeline - 1
