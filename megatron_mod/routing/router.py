"""The router: one linear map from a hidden state to a logit."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Router(nn.Module):
    """``H -> 1`` without bias, in fp32 whatever the model's dtype, zero at the start.

    Zeros put every logit exactly on the border of threshold 0.5, so an untrained
    router keeps everything and the model is exactly the dense one.

    It also holds what one training step needs to know about it (not saved):
    ``penalty_per_unit``, the derivative of the capacity penalty by one unit's
    mask, and the ``kept`` and ``valid`` units counted since ``reset_counts``.
    All three stay on the device. Who sets ``watched`` to a list finds there the logits of
    each micro-batch's valid units ``[num_units]``, row by row.
    """

    def __init__(self, hidden_size: int, *, device: torch.device | None = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1, hidden_size, dtype=torch.float32, device=device))
        for name in ("penalty_per_unit", "kept", "valid"):
            zero = torch.zeros((), dtype=torch.float32, device=device)
            self.register_buffer(name, zero, persistent=False)
        self.watched: list[Tensor] | None = None

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Logits ``[...]`` in fp32 of hidden states ``[..., H]``."""
        return torch.nn.functional.linear(hidden_states.float(), self.weight).squeeze(-1)

    def count(self, logits: Tensor, kept: Tensor, valid: Tensor) -> None:
        """Add a micro-batch's decisions: three tensors of one shape, ``[S, B]`` of tokens or
        ``[D]`` of documents; the last two bool."""
        self.kept += (kept & valid).sum()
        self.valid += valid.sum()
        if self.watched is not None:
            self.watched.append(logits.detach().t()[valid.t()])

    def reset_counts(self) -> None:
        self.kept.zero_()
        self.valid.zero_()
