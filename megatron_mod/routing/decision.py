"""From logits to the keep mask, and the gradient that goes the other way."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Decisions(NamedTuple):
    """What a routed layer decided in a micro-batch: three tensors of one shape, ``[S, B]`` of
    tokens or ``[D]`` of documents.

    ``logits``: fp32; ``mask``: fp32 zeros and ones with the straight-through gradient; ``valid``:
    bool, whether there is a unit to decide on.
    """

    logits: Tensor
    mask: Tensor
    valid: Tensor


class _StraightThrough(torch.autograd.Function):
    """Forward: the hard mask. Backward: ``dL/dp = dL/dm + d penalty/dm``."""

    @staticmethod
    def forward(ctx, probability: Tensor, keep: Tensor, penalty_gradient: Tensor) -> Tensor:
        ctx.save_for_backward(penalty_gradient)
        return keep.to(probability.dtype)

    @staticmethod
    def backward(ctx, grad_mask: Tensor) -> tuple[Tensor, None, None]:
        (penalty_gradient,) = ctx.saved_tensors
        return grad_mask + penalty_gradient, None, None


def keep_mask(logits: Tensor, *, border: float, penalty_gradient: Tensor) -> Tensor:
    """Decide which units are kept: ``m = 1 if logit >= border else 0`` (ties are kept).

    Comparing logits rather than their sigmoids keeps the border exact: in fp32
    ``sigmoid(-1e-7)`` is 0.5. Backward is Router-Tuning's straight-through
    estimator (arXiv 2410.13184), ``dL/dp = dL/dm`` with ``p = sigmoid(logit)``.

    Args:
        logits: fp32, any shape.
        border: ``log(t / (1 - t))`` of the threshold ``t``.
        penalty_gradient: same shape; the derivative of the capacity penalty by each
            unit's mask, added where the task's gradient arrives.

    Returns:
        The mask, fp32 zeros and ones, shape of ``logits``.
    """
    keep = logits >= border
    return _StraightThrough.apply(torch.sigmoid(logits), keep, penalty_gradient)
