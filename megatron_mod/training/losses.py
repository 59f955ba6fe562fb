"""What training minimises besides the capacity penalty, which enters at the routers.

A loss is any object of the form of ``Loss``; a plan names the one that a training uses.
"""

from __future__ import annotations

from collections import deque
from typing import NamedTuple, Protocol

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import vocab_parallel_cross_entropy
from torch import Tensor

from megatron_mod.data.loader import StepBatch
from megatron_mod.model.builder import ModelChunks, RoutedGPTModel
from megatron_mod.model.forward import Outcome, run_batches
from megatron_mod.model.head import add_up
from megatron_mod.model.layout import StepContext
from megatron_mod.model.lora import switched_off


class Shares(NamedTuple):
    """A micro-batch's shares of the global batch's loss, with its gradient, and of its cross
    entropy in nats per labelled token, which need not be what is minimised."""

    loss: Tensor
    cross_entropy: Tensor


class Loss(Protocol):
    """A loss of the global batch as a sum over micro-batches and ranks."""

    def prepare(self, model: ModelChunks, batch: StepBatch) -> None:
        """Called by all ranks before a step's micro-batches are run."""
        ...

    def __call__(self, outcome: Outcome, batch: StepBatch) -> Shares:
        """A micro-batch's shares, two scalars.

        The shares of all micro-batches, data- and context-parallel ranks are added up and divided
        by nothing; tensor-parallel ranks each give the same. Called on the last pipeline stage, in
        the order of the micro-batches.

        Args:
            outcome: what the micro-batch became; ``outcome.decisions`` holds the routed layers'
                of that stage, with their gradient.
            batch: the global batch, whose counts say what to divide by.
        """
        ...


class CrossEntropy:
    """Nats per labelled token of the global batch."""

    def prepare(self, model: ModelChunks, batch: StepBatch) -> None:
        """Nothing is needed."""

    def __call__(self, outcome: Outcome, batch: StepBatch) -> Shares:
        labels = outcome.labels

        def of_chunk(logits: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
            entropy = cross_entropy(logits, labels[rows])
            return entropy, entropy

        loss, entropy = add_up(outcome.model, outcome.states(), of_chunk)
        return Shares(loss / batch.num_labels, entropy / batch.num_labels)


class Distillation:
    """Kullback-Leibler divergence of the routed model from the dense one, ``KL(dense || routed)``,
    in nats per labelled token (Hinton et al. 2015), with or without the cross entropy beside it.

    The dense model is the base: the same weights with routing and adapters off. It costs one more
    forward pass, of which the final hidden states at labelled tokens are kept.
    """

    def __init__(self, *, with_cross_entropy: bool = False) -> None:
        self.with_cross_entropy = with_cross_entropy
        self._teacher: deque[Tensor] = deque()

    def prepare(self, model: ModelChunks, batch: StepBatch) -> None:
        """Run the dense model."""
        with switched_off(model):
            self._teacher = deque(dense_states(model, batch))

    def __call__(self, outcome: Outcome, batch: StepBatch) -> Shares:
        teacher, labels = self._teacher.popleft(), outcome.labels

        def of_chunk(logits: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
            apart = divergence(outcome.model, teacher[rows], logits)
            entropy = cross_entropy(logits, labels[rows])
            return apart + entropy if self.with_cross_entropy else apart, entropy

        loss, entropy = add_up(outcome.model, outcome.states(), of_chunk)
        return Shares(loss / batch.num_labels, entropy / batch.num_labels)


def dense_states(model: ModelChunks, batch: StepBatch) -> list[Tensor]:
    """The dense model's final hidden states ``[N, H]`` at the labelled tokens of each micro-batch;
    nothing but on the last pipeline stage. Called by all ranks."""
    return run_batches(
        model,
        batch.micro_batches,
        len(batch.micro_batches),
        finish=Outcome.states,
        step=StepContext(dense=True),
    )


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Nats of ``labels`` ``[N]`` together, under fp32 logits ``[N, vocab / tp]``, which it
    overwrites."""
    return vocab_parallel_cross_entropy(logits[None], labels[None]).sum()


def divergence(model: RoutedGPTModel, teacher: Tensor, logits: Tensor) -> Tensor:
    """Summed KL, in nats, of the distributions that fp32 ``logits`` ``[N, vocab / tp]`` give from
    those of the dense model's states ``[N, H]``.

    ``model``: the chunk with the head.
    """
    with torch.no_grad():
        wanted = model.head(teacher).float()
    return _Divergence.apply(logits, wanted, model.pg_collection.tp)


class _Divergence(torch.autograd.Function):
    """Sum over tokens of ``KL(softmax(wanted) || softmax(ours))`` over a vocabulary that
    tensor-parallel ranks share; logits ``[N, vocab / tp]``."""

    @staticmethod
    def forward(ctx, ours: Tensor, wanted: Tensor, group: dist.ProcessGroup) -> Tensor:
        ours, wanted = (_log_softmax(logits, group) for logits in (ours, wanted))
        probability = wanted.exp()
        ctx.save_for_backward(ours.exp() - probability)
        # Padding of the vocabulary has no probability; what is not a number must stay none.
        total = (probability * (wanted - ours)).masked_fill(probability == 0, 0.0).sum()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:
        (difference,) = ctx.saved_tensors
        return grad * difference, None, None


def _log_softmax(logits: Tensor, group: dist.ProcessGroup) -> Tensor:
    top = logits.amax(-1, keepdim=True)
    dist.all_reduce(top, op=dist.ReduceOp.MAX, group=group)
    total = (logits - top).exp().sum(-1, keepdim=True)
    dist.all_reduce(total, group=group)
    return logits - top - total.log()
