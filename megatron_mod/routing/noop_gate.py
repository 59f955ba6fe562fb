"""Experts that return nothing, among which a model's gate chooses too (integrated MoDE)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from megatron_mod.routing.expert_router import ExpertRouter


class NoopGate(ExpertRouter):
    """``H -> num_noops``: logits that stand beside the gate's own in one softmax (arXiv 2404.02258,
    integrated Mixture-of-Depths-and-Experts).

    It decides nothing itself: a pair of a token and an expert is a unit, and kept unless the expert
    is one that returns nothing. ``by_expert`` has the model's own first.
    """

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        top_k: int,
        *,
        num_noops: int,
        device: torch.device | None = None,
    ) -> None:
        """``num_experts``: that compute something; ``top_k``: of both kinds, that a token is sent
        to."""
        super().__init__(hidden_size, num_noops, top_k, device=device)
        self._count_by(num_experts + num_noops, device)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Logits ``[..., num_noops]`` of hidden states ``[..., H]``, in their dtype, as a gate's
        are."""
        return F.linear(hidden_states, self.weight.to(hidden_states.dtype))
