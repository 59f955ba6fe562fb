"""The work that a rank has done: counted, not measured."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from megatron_mod.config.schema import Config
from megatron_mod.data.chat import IGNORE
from megatron_mod.data.loader import StepBatch
from megatron_mod.model.builder import ModelChunks
from megatron_mod.model.cost import training_costs

if TYPE_CHECKING:
    from megatron_mod.training.plan import Plan

_MOST = 256  # steps whose capacities wait on the device to be counted with


class Operations:
    """Counts floating-point operations as ``model/cost.py`` does: of this rank's documents, in its
    layers, without padding, shared evenly with the ranks that share a layer or a sequence."""

    def __init__(self, config: Config, plan: Plan, model: ModelChunks) -> None:
        self.plan, self.recompute = plan, config.train.recompute
        self.parts = config.train.parts
        self.layers = model.layers()
        self.has_head = any(chunk.post_process for chunk in model)
        self._steps: list[tuple[list[int], int, Tensor]] = []
        self._done = 0.0

    def add(self, batch: StepBatch, capacity: Tensor) -> None:
        """Count a step; ``capacity`` ``[num_routed]``, of an exact selection what was asked for, is
        not waited for where it is on the device."""
        lengths = [n for part in batch.micro_batches for row in part.documents for n in row]
        labels = sum(int((part.labels != IGNORE).sum()) for part in batch.micro_batches)
        self._steps.append((lengths, labels, capacity))
        is_sparse = self.plan.routing.training_compute == "sparse"
        if not is_sparse or len(self._steps) == _MOST:  # sparse training waits in every layer
            self._count(with_capacity=is_sparse)

    def take(self) -> float:
        """Operations since they were last taken; waits for the device."""
        self._count(with_capacity=True)
        done, self._done = self._done, 0.0
        return done

    def _count(self, *, with_capacity: bool) -> None:
        if not self._steps:
            return
        lengths, labels, capacities = zip(*self._steps, strict=True)
        kept = torch.stack(capacities).tolist() if with_capacity else [None] * len(lengths)
        self._steps = []
        ranks = self.plan.topology
        for documents, labelled, shares in zip(lengths, labels, kept, strict=True):
            costs = training_costs(
                self.plan.base.arch,
                self.plan.routing,
                documents,
                labels=labelled,
                dense_passes=self.plan.dense_passes,
                num_free_layers=self.plan.computed.start,
                recompute=self.recompute,
                kept=shares,
                lora=self.plan.lora,
                parts=self.parts,
            )
            own = sum(costs.layers[layer] for layer in self.layers) + costs.head * self.has_head
            self._done += own / (ranks.tensor * ranks.context)
