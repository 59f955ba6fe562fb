"""Routers on a layer's experts: one affine map from a hidden state to all their logits."""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_mod.routing.router import Router


class ExpertRouter(Router):
    """``H -> num_experts``: each logit is about one expert, for tokens that the model's gate sends
    to it.

    A unit is such a pair of token and expert. The experts' biases are their own, so that one can be
    worth more than another, and all of a layer's have the one border, which moves them together:
    a batch sends some experts too few tokens to find a quantile in. Of every ``notes_every``-th
    token all pairs are noted; ``by_expert``, fp64 ``[2, num_experts]``, counts each expert's, those
    that were kept and all.
    """

    by_expert: Tensor

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        top_k: int,
        *,
        bias: bool = False,
        device: torch.device | None = None,
    ) -> None:
        """``top_k``: experts that a token is sent to."""
        super().__init__(hidden_size, bias=bias, rows=num_experts, device=device)
        self.top_k = top_k
        self._count_by(num_experts, device)

    def _count_by(self, experts: int, device: torch.device | None) -> None:
        counts = torch.zeros(2, experts, dtype=torch.float64, device=device)
        self.register_buffer("by_expert", counts, persistent=False)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Logits ``[..., num_experts]`` in fp32 of hidden states ``[..., H]``; of a router that
        does not train a constant."""
        return self._logits(hidden_states)

    def _add(self, which: Tensor, sizes: Tensor) -> None:
        self.by_expert += which.flatten(1, -2).sum(1)
        super()._add(which.sum(-1), sizes)

    def note_inputs(self, inputs: Tensor, valid: Tensor, sizes: Tensor) -> None:
        """Keep what pairs were decided on: tokens ``[N, H]``, and which experts they are sent to,
        bool ``[N, num_experts]``; ``sizes``: of each token, fp64 ``[3, N]``."""
        sent, experts = valid.int().topk(self.top_k)
        sizes = sizes[..., None].expand(-1, -1, self.top_k)
        self.noted.append((inputs.detach().contiguous(), sent.bool(), sizes, experts))

    def _again(self, inputs: Tensor, *more: Tensor) -> Tensor:
        (experts,) = more
        return self(inputs).gather(-1, experts)


def weighed(weights: Tensor, mask: Tensor, *, renormalize: bool) -> Tensor:
    """The weights ``[..., num_experts]`` that a gate gave a token's experts, times the ``mask`` of
    those that compute it.

    ``renormalize``: what is left is scaled to the sum that the gate gave, where anything is left.
    """
    left = weights * mask
    if not renormalize:
        return left
    whole, rest = (each.sum(-1, keepdim=True) for each in (weights, left))
    some = rest > 0
    return left * torch.where(some, whole / rest.where(some, 1.0), 1.0)
