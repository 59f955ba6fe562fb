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
    """What ``measure`` finds, added up over all chunks; the first sum has a gradient by ``states``
    and, if the head trains, by its weight.

    A chunk's gradients are computed with the chunk. Backward then needs ``[N, H]``, and of a head
    that trains ``[vocab / tp, H]`` in fp32, and nothing is computed twice (as in Liger's fused
    linear cross entropy, arXiv 2410.10989).

    Args:
        model: the chunk with the head.
        states: ``[N, H]`` of ``Outcome.states``.
    """
    weight, enabled = model.head_weight, torch.is_grad_enabled()
    wanted = enabled and states.requires_grad, enabled and weight.requires_grad
    return _AddUp.apply(states, weight, model, measure, wanted)


class _AddUp(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx,
        states: Tensor,
        weight: Tensor,
        model: RoutedGPTModel,
        measure: Measure,
        wanted: tuple[bool, bool],
    ) -> tuple[Tensor, Tensor]:
        minimised, noted = (torch.zeros((), device=states.device) for _ in range(2))
        by_states = torch.empty_like(states) if wanted[0] else None
        by_weight = torch.zeros_like(weight, dtype=torch.float32) if wanted[1] else None
        head = weight.detach().requires_grad_(wanted[1])
        with torch.set_grad_enabled(any(wanted)):
            for first in range(0, len(states), CHUNK):
                rows = slice(first, first + CHUNK)
                part = states[rows].detach().requires_grad_(wanted[0])
                ours, theirs = measure(model.head(part, head).float(), rows)
                minimised += ours.detach()
                noted += theirs.detach()
                inputs = [one for one in (part, head) if one.requires_grad]
                found = iter(torch.autograd.grad(ours, inputs) if inputs else ())
                if by_states is not None:
                    by_states[rows] = next(found)
                if by_weight is not None:
                    by_weight += next(found)
        ctx.save_for_backward(by_states, by_weight)
        ctx.dtype = weight.dtype
        ctx.mark_non_differentiable(noted)
        return minimised, noted

    @staticmethod
    def backward(
        ctx, grad_minimised: Tensor, grad_noted: Tensor
    ) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        by_states, by_weight = ctx.saved_tensors
        return (
            None if by_states is None else by_states * grad_minimised,
            None if by_weight is None else (by_weight * grad_minimised).to(ctx.dtype),
            None,
            None,
            None,
        )
