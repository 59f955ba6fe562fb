"""What says whether the router would choose a token, without the tokens after it."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import skip_init


class Predictor(nn.Module):
    """``H -> P -> 1`` with a SiLU between, in fp32 whatever the model's dtype; trained on the
    router's choices (arXiv 2404.02258, section 3.5)."""

    def __init__(self, hidden_size: int, size: int, *, device: torch.device | None = None) -> None:
        super().__init__()
        settings: dict[str, Any] = {"dtype": torch.float32, "device": device or "cpu"}
        # Filled by whoever builds the model, which leaves torch's random state as it is.
        self.hidden = skip_init(nn.Linear, hidden_size, size, **settings)
        self.out = skip_init(nn.Linear, size, 1, **settings)
        for parameter in self.parameters():
            nn.init.zeros_(parameter)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Logits ``[...]`` of hidden states ``[..., H]``, which hear nothing of it."""
        return self.out(F.silu(self.hidden(hidden_states.detach().float()))).squeeze(-1)
