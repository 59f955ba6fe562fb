"""The head's logits where something reads them, a chunk of tokens at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, TypeAlias

import torch
from torch import Tensor

if TYPE_CHECKING:
    from megatron_mod.model.builder import RoutedGPTModel

CHUNK = 256  # tokens whose logits exist at a time: enough to keep a matrix product busy

# Two scalars of the fp32 logits [n, vocab / tp], which it may change, at these rows of the states:
# what is minimised, and what is noted beside it.
Measure: TypeAlias = Callable[[Tensor, slice], tuple[Tensor, Tensor]]


def add_up(model: RoutedGPTModel, states: Tensor, measure: Measure) -> tuple[Tensor, Tensor]:
    """What ``measure`` finds, added up over all chunks; the first sum has a gradient by ``states``.

    A chunk's gradient is computed with the chunk. Backward then needs ``[N, H]`` and nothing of the
    vocabulary, and nothing is computed twice, because the head is frozen (as in Liger's fused
    linear cross entropy, arXiv 2410.10989).

    Args:
        model: the chunk with the head.
        states: ``[N, H]`` of ``Outcome.states``.
    """
    return _AddUp.apply(states, model, measure, states.requires_grad and torch.is_grad_enabled())


class _AddUp(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, states: Tensor, model: RoutedGPTModel, measure: Measure, has_gradient: bool
    ) -> tuple[Tensor, Tensor]:
        trains = has_gradient and model.head_weight.requires_grad
        assert not trains, "a head that trains would get no gradient here"
        minimised, noted = (torch.zeros((), device=states.device) for _ in range(2))
        gradient = torch.empty_like(states) if has_gradient else None
        with torch.set_grad_enabled(has_gradient):
            for first in range(0, len(states), CHUNK):
                rows = slice(first, first + CHUNK)
                part = states[rows].detach().requires_grad_(has_gradient)
                ours, theirs = measure(model.head(part).float(), rows)
                minimised += ours.detach()
                noted += theirs.detach()
                if gradient is not None:
                    (gradient[rows],) = torch.autograd.grad(ours, part)
        ctx.save_for_backward(gradient)
        ctx.mark_non_differentiable(noted)
        return minimised, noted

    @staticmethod
    def backward(
        ctx, grad_minimised: Tensor, grad_noted: Tensor
    ) -> tuple[Tensor, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * grad_minimised, None, None, None
