"""What training minimises besides the capacity penalty, which enters at the routers.

A loss is any object of the form of ``Loss``; a plan names the one that a training uses.
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from megatron_mod.data.loader import StepBatch
from megatron_mod.model.forward import Outcome


class Loss(Protocol):
    """A loss of the global batch as a sum over micro-batches and ranks."""

    reads_logits: bool
    """Whether it wants logits as ``Outcome.output`` instead of each label's cross entropy."""

    def __call__(self, outcome: Outcome, batch: StepBatch) -> Tensor:
        """A micro-batch's share, a scalar with its gradient.

        The shares of all micro-batches, data- and context-parallel ranks are added up and divided
        by nothing; tensor-parallel ranks each give the same. Called on the last pipeline stage.

        Args:
            outcome: what the micro-batch became; ``outcome.decisions`` holds the routed layers'
                of that stage, with their gradient.
            batch: the global batch, whose counts say what to divide by.
        """
        ...


class CrossEntropy:
    """Nats per labelled token of the global batch."""

    reads_logits = False

    def __call__(self, outcome: Outcome, batch: StepBatch) -> Tensor:
        counted = outcome.batch.labels >= 0
        return (outcome.output.float() * counted).sum() / batch.num_labels
