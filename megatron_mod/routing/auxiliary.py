"""A loss that a layer adds where it is, whichever pipeline stage that is on."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


class _Beside(torch.autograd.Function):
    """Forward: the hidden states. Backward: also the loss's own gradient, as if it were added to
    the loss that these lead to (as Megatron's ``MoEAuxLossAutoScaler``, without a scale)."""

    @staticmethod
    def forward(ctx, hidden_states: Tensor, loss: Tensor) -> Tensor:
        ctx.save_for_backward(loss)
        return hidden_states.view_as(hidden_states)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor]:
        (loss,) = ctx.saved_tensors
        return grad, torch.ones_like(loss)


def beside(hidden_states: Tensor, loss: Tensor) -> Tensor:
    """The hidden states, behind which a backward pass finds ``loss``, a scalar, too."""
    return _Beside.apply(hidden_states, loss)


def choice_loss(logits: Tensor, kept: Tensor, valid: Tensor) -> Tensor:
    """Binary cross entropy, in nats, of logits with what was kept, added up over valid tokens; all
    three of one shape."""
    losses = F.binary_cross_entropy_with_logits(logits, kept.to(logits.dtype), reduction="none")
    return (losses * valid).sum()
