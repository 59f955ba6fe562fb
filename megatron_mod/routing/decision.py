"""From logits to the keep mask, and the gradient that goes the other way."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Decisions(NamedTuple):
    """What a routed layer decided in a micro-batch: three tensors of one shape, ``[S, B]`` of
    tokens, ``[D]`` of documents or ``[S, B, E]`` of tokens and experts.

    ``logits``: fp32; ``mask``: fp32 zeros and ones with the straight-through gradient; ``valid``:
    bool, whether there is a unit to decide on.
    """

    logits: Tensor
    mask: Tensor
    valid: Tensor


class _StraightThrough(torch.autograd.Function):
    """Forward: the hard mask. Backward: ``dL/dz = s (dL/dm + d penalty/dm)``, ``s`` the sigmoid's
    slope at ``z``."""

    @staticmethod
    def forward(
        ctx, logits: Tensor, keep: Tensor, heard: Tensor, penalty: Tensor, pull: Tensor | None
    ) -> Tensor:
        ctx.save_for_backward(logits, heard, penalty)
        ctx.pull = pull
        return keep.to(logits.dtype)

    @staticmethod
    def backward(ctx, grad_mask: Tensor) -> tuple[Tensor, None, None, None, None]:
        logits, heard, penalty = ctx.saved_tensors
        probability = torch.sigmoid(logits)
        slope = probability * (1 - probability) * heard
        if ctx.pull is not None:
            ctx.pull += torch.stack(((slope * grad_mask).sum(), slope.sum()))
        return slope * (grad_mask + penalty), None, None, None, None


def keep_mask(
    logits: Tensor,
    valid: Tensor,
    *,
    border: float,
    penalty: Tensor,
    pull: Tensor | None = None,
    only_kept: bool = False,
) -> Tensor:
    """Decide which units are kept: ``m = 1 if logit >= border else 0`` (ties are kept).

    Comparing logits rather than their sigmoids keeps the border exact: in fp32
    ``sigmoid(-1e-7)`` is 0.5. Backward is Router-Tuning's straight-through
    estimator (arXiv 2410.13184), ``dL/dp = dL/dm`` with ``p = sigmoid(logit)``.

    Args:
        logits: fp32, any shape.
        valid: bool, same shape; where there is no unit the mask and its gradient are zero.
        border: ``log(t / (1 - t))`` of the threshold ``t``.
        penalty: a scalar: the derivative of the capacity penalty by a unit's mask, added where
            the loss's gradient arrives.
        pull: fp32 ``[2]``: backward adds ``sum s dL/dm`` and ``sum s``, with ``s`` the slope of the
            sigmoid at each unit's logit (``capacity.CapacityController`` makes a price of them).
        only_kept: units that are skipped get no gradient, and count nowhere in ``pull``.

    Returns:
        The mask, fp32 zeros and ones, shape of ``logits``.
    """
    keep = (logits >= border) & valid
    return _StraightThrough.apply(logits, keep, keep if only_kept else valid, penalty, pull)
