"""The load-balancing loss of gates that train: how evenly they send tokens to experts."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import reduce_from_tensor_model_parallel_region
from megatron.core.transformer.moe.moe_utils import switch_load_balancing_loss_func
from torch import Tensor

from megatron_mod.model.layout import TokenLayout


class Balance(NamedTuple):
    """What a gate's loss is taken of, and how much of it counts.

    ``valid``: which of the tokens that it is given are no padding, bool of their shape; ``None``:
    all. ``share``: what a token's part in the loss is multiplied by.
    """

    valid: Tensor | None
    share: float

    @classmethod
    def of(
        cls, layout: TokenLayout | None, *, sequence_group: dist.ProcessGroup | None = None
    ) -> Balance | None:
        """Of a whole micro-batch, or what this of ranks that part its rows has; ``None``: the step
        asks for no such loss."""
        if layout is None or not layout.step.balance_share:
            return None
        valid = layout.valid
        if sequence_group is not None:
            valid = valid.chunk(sequence_group.size())[sequence_group.rank()]
        return cls(valid, layout.step.balance_share)


def imbalance(
    logits: Tensor, chosen: Tensor, valid: Tensor | None, *, top_k: int, group: dist.ProcessGroup
) -> tuple[Tensor, Tensor]:
    """Megatron's loss (Switch Transformer's) of a micro-batch's tokens ``[N, E]``, times their
    number, and that number.

    The loss is ``E * sum over experts e of f_e * P_e``, ``f_e`` the share of the pairs of tokens
    and experts that are ``e``'s, ``P_e`` the mean of the softmax's probability of ``e`` over the
    tokens: 1 where all is even, ``E`` where one expert has everything. Only ``P`` has a gradient.

    Args:
        logits: fp32 ``[N, E]``.
        chosen: bool ``[N, E]``, ``top_k`` of each token.
        valid: bool ``[N]``; ``None``: all.
        group: ranks that have each some of the micro-batch's tokens. What each finds is a part, of
            which the sum is the loss; the number is of them all.
    """
    probabilities = logits.softmax(-1)
    if valid is not None:
        probabilities, chosen = probabilities * valid[:, None], chosen & valid[:, None]
    counts = reduce_from_tensor_model_parallel_region(chosen.sum(0).float(), group)
    tokens = counts.sum() / top_k
    loss = switch_load_balancing_loss_func(
        probs=probabilities,
        tokens_per_expert=counts,
        total_num_tokens=tokens.clamp(min=1),
        topk=top_k,
        num_experts=logits.shape[-1],
        moe_aux_loss_coeff=1.0,
    )
    return loss * tokens, tokens


class _Noted(torch.autograd.Function):
    """Forward: the hidden states. Backward: also a loss's gradient, times ``share``, and ``found``
    is added to ``noted``: once, however often forward is computed."""

    @staticmethod
    def forward(
        ctx, hidden_states: Tensor, loss: Tensor, share: float, found: Tensor, noted: Tensor
    ) -> Tensor:
        ctx.save_for_backward(loss, found)
        ctx.share, ctx.noted = share, noted
        return hidden_states.view_as(hidden_states)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        loss, found = ctx.saved_tensors
        ctx.noted += found
        return grad, torch.full_like(loss, ctx.share), None, None, None


def noted_beside(
    hidden_states: Tensor, loss: Tensor, *, share: float, found: Tensor, noted: Tensor
) -> Tensor:
    """The hidden states, behind which a backward pass finds ``share`` of ``loss``, a scalar, too;
    it then adds ``found`` to ``noted``."""
    return _Noted.apply(hidden_states, loss, share, found, noted)
