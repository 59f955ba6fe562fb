"""The router: one linear map from a hidden state to a logit."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from megatron_mod.routing.decision import Decisions


class Router(nn.Module):
    """``H -> 1`` without bias, in fp32 whatever the model's dtype, zero at the start.

    Zeros put every logit exactly on the border of threshold 0.5, so an untrained
    router keeps everything and the model is exactly the dense one.

    It also counts, on the device and unsaved, the ``kept`` and the ``valid`` units it has decided
    on since ``reset_counts``.
    """

    def __init__(self, hidden_size: int, *, device: torch.device | None = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1, hidden_size, dtype=torch.float32, device=device))
        for name in ("kept", "valid"):
            zero = torch.zeros((), dtype=torch.float32, device=device)
            self.register_buffer(name, zero, persistent=False)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Logits ``[...]`` in fp32 of hidden states ``[..., H]``."""
        return torch.nn.functional.linear(hidden_states.float(), self.weight).squeeze(-1)

    def count(self, made: Decisions) -> None:
        """Add a micro-batch's decisions."""
        self.kept += (made.mask.detach().bool() & made.valid).sum()
        self.valid += made.valid.sum()

    def reset_counts(self) -> None:
        self.kept.zero_()
        self.valid.zero_()
