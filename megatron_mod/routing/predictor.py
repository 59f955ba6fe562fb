"""What says whether the router would choose a token, without the tokens after it."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Predictor(nn.Module):
    """``H -> P -> 1`` with a SiLU between, in fp32 whatever the model's dtype; trained on the
    router's choices (arXiv 2404.02258, section 3.5)."""

    def __init__(self, hidden_size: int, size: int, *, device: torch.device | None = None) -> None:
        super().__init__()
        settings: dict[str, Any] = {"dtype": torch.float32, "device": device}
        self.hidden = nn.Linear(hidden_size, size, **settings)
        self.out = nn.Linear(size, 1, **settings)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Logits ``[...]`` of hidden states ``[..., H]``, which hear nothing of it."""
        return self.out(F.silu(self.hidden(hidden_states.detach().float()))).squeeze(-1)
