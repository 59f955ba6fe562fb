"""What training minimises besides the capacity penalty, which enters at the routers.

A loss is any object of the form of ``Loss``; a plan names the one that a training uses.
"""

from __future__ import annotations

from collections import deque
from functools import partial
from typing import NamedTuple, Protocol

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import (
    gather_from_sequence_parallel_region,
    vocab_parallel_cross_entropy,
)
from torch import Tensor

from megatron_mod.data.loader import StepBatch
from megatron_mod.model.builder import ModelChunks
from megatron_mod.model.forward import Outcome, run_batches
from megatron_mod.model.layout import StepContext

CHUNK = 1024  # labels whose distributions over the vocabulary are compared at a time


class Shares(NamedTuple):
    """A micro-batch's shares of the global batch's loss, with its gradient, and of its cross
    entropy in nats per labelled token, which need not be what is minimised."""

    loss: Tensor
    cross_entropy: Tensor


class Loss(Protocol):
    """A loss of the global batch as a sum over micro-batches and ranks."""

    reads_logits: bool
    """Whether it wants logits as ``Outcome.output`` instead of each label's cross entropy."""

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

    reads_logits = False

    def prepare(self, model: ModelChunks, batch: StepBatch) -> None:
        """Nothing is needed."""

    def __call__(self, outcome: Outcome, batch: StepBatch) -> Shares:
        counted = outcome.batch.labels >= 0
        loss = (outcome.output.float() * counted).sum() / batch.num_labels
        return Shares(loss, loss.detach())


class Distillation:
    """Kullback-Leibler divergence of the routed model from the dense one, ``KL(dense || routed)``,
    in nats per labelled token (Hinton et al. 2015), with or without the cross entropy beside it.

    The dense model is the same weights with routing off: one more forward pass, of which the final
    hidden states at labelled tokens are kept.
    """

    reads_logits = True

    def __init__(self, *, with_cross_entropy: bool = False) -> None:
        self.with_cross_entropy = with_cross_entropy
        self._teacher: deque[Tensor] = deque()

    def prepare(self, model: ModelChunks, batch: StepBatch) -> None:
        """Run the dense model."""
        self._model = model.last
        self._teacher = deque(dense_states(model, batch))

    def __call__(self, outcome: Outcome, batch: StepBatch) -> Shares:
        is_label = outcome.batch.labels >= 0
        labels, logits = outcome.batch.labels[is_label], outcome.output[is_label].float()
        divergence, entropy = compare(
            self._model, self._teacher.popleft(), logits, labels, with_entropy=True
        )
        loss = divergence + entropy if self.with_cross_entropy else divergence
        return Shares(loss / batch.num_labels, entropy.detach() / batch.num_labels)


def dense_states(model: ModelChunks, batch: StepBatch) -> list[Tensor]:
    """The dense model's final hidden states ``[N, H]`` at the labelled tokens of each micro-batch;
    nothing but on the last pipeline stage. Called by all ranks."""
    with model.last.headless():
        return run_batches(
            model,
            batch.micro_batches,
            len(batch.micro_batches),
            finish=partial(labelled_states, model),
            step=StepContext(dense=True),
        )


def labelled_states(model: ModelChunks, outcome: Outcome) -> Tensor:
    """The final hidden states ``[N, H]`` at labelled tokens, of a model that was run without its
    head."""
    hidden = outcome.output
    if model.config.sequence_parallel:
        hidden = gather_from_sequence_parallel_region(hidden, group=model.groups.tp)
    return hidden.transpose(0, 1)[outcome.batch.labels >= 0]


def compare(
    model, teacher: Tensor, logits: Tensor, labels: Tensor, *, with_entropy: bool = False
) -> tuple[Tensor, Tensor]:
    """Summed KL of the distributions that ``logits`` give from those of the dense model's states,
    and, ``with_entropy``, the summed cross entropy of the labels; in nats.

    Args:
        model: the chunk with the head.
        teacher: ``[N, H]`` of ``dense_states``.
        logits: fp32 ``[N, vocab / tp]`` of the same tokens.
        labels: ``[N]``.
    """
    group = model.pg_collection.tp
    divergence = entropy = logits[:0].sum()  # of no token: still a gradient
    logits = model.without_padding(logits.clone())
    for states, ours, theirs in zip(
        teacher.split(CHUNK), logits.split(CHUNK), labels.split(CHUNK), strict=True
    ):
        if not len(theirs):
            continue
        with torch.no_grad():
            wanted = model.head(states).float()
        divergence = divergence + _Divergence.apply(ours, wanted, group)
        if with_entropy:  # Megatron's changes its input
            entropy = entropy + vocab_parallel_cross_entropy(ours[None].clone(), theirs[None]).sum()
    return divergence, entropy


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
