"""The router: one affine map from a hidden state to a logit."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from megatron_mod.routing.decision import Decisions


class Router(nn.Module):
    """``H -> 1``, in fp32 whatever the model's dtype, zero at the start.

    Zeros put every logit exactly on the border of threshold 0.5, so an untrained
    router keeps everything and the model is exactly the dense one.

    What it has decided on since ``reset`` it notes on the device, unsaved: how many units it
    ``kept`` of how many ``valid`` ones, and, while ``notes_scores``, each unit's logit and, in
    training, the sum of what units were decided on, ``read`` ``[H]``; ``pull`` is what
    ``decision.keep_mask`` adds up.
    """

    def __init__(
        self, hidden_size: int, *, bias: bool = False, device: torch.device | None = None
    ) -> None:
        super().__init__()
        settings = {"dtype": torch.float32, "device": device}
        self.weight = nn.Parameter(torch.zeros(1, hidden_size, **settings))
        self.bias = nn.Parameter(torch.zeros(1, **settings)) if bias else None
        sizes = {"kept": (), "valid": (), "pull": (2,), "read": (hidden_size,)}
        for name, size in sizes.items():
            self.register_buffer(name, torch.zeros(size, **settings), persistent=False)
        self.notes_scores = False
        self.scores: list[Tensor] = []  # each fp32 [N], NaN where there is no unit

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Logits ``[...]`` in fp32 of hidden states ``[..., H]``."""
        logits = nn.functional.linear(hidden_states.float(), self.weight, self.bias)
        return logits.squeeze(-1)

    def note(self, made: Decisions) -> None:
        """Take note of a micro-batch's decisions."""
        self.kept += (made.mask.detach().bool() & made.valid).sum()
        self.valid += made.valid.sum()
        if self.notes_scores:
            logits = made.logits.detach().masked_fill(~made.valid, torch.nan)
            self.scores.append(logits.flatten())
            if made.logits.requires_grad:  # a sequence's is the mean of what its tokens read
                total = (made.logits * made.valid).sum()
                (read,) = torch.autograd.grad(total, self.weight, retain_graph=True)
                self.read += read.squeeze(0)

    def reset(self, *, notes_scores: bool = False) -> None:
        """Forget what was noted; ``notes_scores``: whether logits are to be kept from now on."""
        for sums in (self.kept, self.valid, self.pull, self.read):
            sums.zero_()
        self.notes_scores, self.scores = notes_scores, []
