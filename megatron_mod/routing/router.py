"""The router: one affine map from a hidden state to a logit."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from megatron_mod.routing.config import KNOTS
from megatron_mod.routing.costs import SIZES
from megatron_mod.routing.decision import Decisions

# Shapes of what a router notes.
_SUMS: dict[str, tuple[int, ...]] = {"pull": (2,), "agreed": (), "causal_loss": ()}
NOTED = 8192  # units of a layer and a global batch, about, whose inputs a training keeps


class Router(nn.Module):
    """``H -> 1``, in fp32 whatever the model's dtype, zero at the start.

    One that serves a range of budgets is told which by its ``position`` in it, ``t`` from 0 to 1,
    and computes ``(weight + t * work_weight) n + bias + borders(t)``, the last of these linear
    between evenly spaced ``t``.

    Zeros put every logit exactly on the border of threshold 0.5, so an untrained
    router keeps everything and the model is exactly the dense one.

    What it has decided since ``reset`` it notes on the device, unsaved: ``sizes``, fp64
    ``[2, 3]``, units, tokens and pairs (``costs.SIZES``) of what it kept and of all; ``pull`` is
    what ``decision.keep_mask`` adds up; with an exact selection, on how many tokens the causal
    rule ``agreed`` and what its ``causal_loss`` adds up to; and what every ``notes_every``-th unit
    was decided on (0: of none).
    """

    def __init__(
        self,
        hidden_size: int,
        *,
        bias: bool = False,
        is_factor: bool = False,
        position: float | None = None,
        rows: int = 1,
        device: torch.device | None = None,
    ) -> None:
        """``is_factor``: its logits are part of what the model computes, whatever trains.
        ``position``: of the budget to begin with; ``None``: there is no range of them. ``rows``:
        of the weight."""
        super().__init__()
        settings = {"dtype": torch.float32, "device": device}
        self.weight = nn.Parameter(torch.zeros(rows, hidden_size, **settings))
        self.bias = nn.Parameter(torch.zeros(rows, **settings)) if bias else None
        self.is_factor = is_factor
        self.position = position
        if position is not None:
            self.work_weight = nn.Parameter(torch.zeros(rows, hidden_size, **settings))
            self.borders = nn.Parameter(torch.zeros(KNOTS, **settings))
        for name, size in _SUMS.items():
            self.register_buffer(name, torch.zeros(size, **settings), persistent=False)
        exact = torch.zeros(2, len(SIZES), dtype=torch.float64, device=device)
        self.register_buffer("sizes", exact, persistent=False)
        self.notes_every = 0
        # Inputs [N, H], which of them are units, and what each counts [3, N].
        self.noted: list[tuple[Tensor, ...]] = []

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Logits ``[...]`` in fp32 of hidden states ``[..., H]``; of a router that does not train a
        constant, which nothing below it hears of, unless it is a factor."""
        return self._logits(hidden_states).squeeze(-1)

    def _logits(self, hidden_states: Tensor) -> Tensor:
        """``[..., rows]``."""
        if not self.weight.requires_grad and not self.is_factor:
            hidden_states = hidden_states.detach()
        weight, bias = self.weight, self.bias
        if self.position is not None:
            at = self.position * (KNOTS - 1)
            first = min(int(at), KNOTS - 2)
            weight = torch.lerp(weight, weight + self.work_weight, self.position)
            borders = self.borders.detach()  # set, not trained
            bias = bias + torch.lerp(borders[first], borders[first + 1], at - first)
        return nn.functional.linear(hidden_states.float(), weight, bias)

    @property
    def kept(self) -> Tensor:
        """Units that were kept, a scalar."""
        return self.sizes[0, 0]

    @property
    def valid(self) -> Tensor:
        """Units that were decided on, a scalar."""
        return self.sizes[1, 0]

    @torch.no_grad()
    def note(self, made: Decisions, sizes: Tensor) -> None:
        """Take note of a micro-batch's decisions; ``sizes``: of each of its units, or where a token
        is several of each token, fp64 ``[3, ...]``."""
        self._add(torch.stack((made.mask.bool(), made.valid)), sizes)

    def _add(self, which: Tensor, sizes: Tensor) -> None:
        """Of units ``[2, ...]`` the kept ones and all."""
        self.sizes += (which[:, None] * sizes).flatten(2).sum(-1)

    def note_inputs(self, inputs: Tensor, valid: Tensor, sizes: Tensor) -> None:
        """Keep what units ``[N, H]`` were decided on, those of them that are ``valid`` ``[N]``
        ones; ``sizes``: of each, fp64 ``[3, N]``."""
        # What lies between the units that are kept must not stay with them.
        self.noted.append((inputs.detach().contiguous(), valid, sizes))

    @torch.no_grad()
    def scores(self) -> Tensor:
        """Logits ``[N]`` that the units whose inputs are noted would have now, NaN where there is
        no unit."""
        found = [
            self._again(inputs, *more).masked_fill(~valid, torch.nan).flatten()
            for inputs, valid, _, *more in self.noted
        ]
        return torch.cat(found) if found else self.weight.new_empty(0)

    def _again(self, inputs: Tensor, *more: Tensor) -> Tensor:
        """Logits, of the shape of what is noted of the units."""
        return self(inputs)

    def noted_sizes(self) -> Tensor:
        """Units, tokens and pairs of what is noted (``costs.SIZES``), fp64 ``[N, 3]``."""
        found = [(sizes * valid).flatten(1) for _, valid, sizes, *_ in self.noted]
        return torch.cat(found, 1).t() if found else self.sizes.new_empty(0, len(SIZES))

    def reset(self, *, notes_every: int = 0) -> None:
        """Forget what was noted; ``notes_every``: of how many units one's inputs are to be kept
        from now on; 0: none."""
        for notes in self.buffers():
            notes.zero_()
        self.notes_every, self.noted = notes_every, []
