"""What a skipped unit adds instead of nothing: a small affine map, solved in closed form."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

TOKENS = 16384  # that stand-ins are solved on, where nothing is said


class Solution(NamedTuple):
    """A stand-in's weights, fp64, and the share of the weighted variance of ``y`` they explain."""

    down: Tensor
    up: Tensor
    bias: Tensor
    explained: float


class StandIn(nn.Module):
    """``B A x + b`` of what the router reads, ``A`` ``[r, H]``, ``B`` ``[H, r]``, ``b`` ``[H]``.

    Kept in fp32, computed in the dtype of the hidden states. It starts as zeros, with which a
    skipped unit adds nothing.
    """

    def __init__(self, hidden_size: int, rank: int, *, device: torch.device | None = None) -> None:
        super().__init__()
        settings: dict[str, Any] = {"dtype": torch.float32, "device": device}
        self.down = nn.Linear(hidden_size, rank, bias=False, **settings)
        self.up = nn.Linear(rank, hidden_size, **settings)
        for parameter in self.parameters():
            nn.init.zeros_(parameter)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """``[..., H]`` to the same."""
        dtype = hidden_states.dtype
        inner = nn.functional.linear(hidden_states, self.down.weight.to(dtype))
        return nn.functional.linear(inner, self.up.weight.to(dtype), self.up.bias.to(dtype))

    @torch.no_grad()
    def put(self, solution: Solution) -> None:
        """Take on solved weights."""
        self.down.weight.copy_(solution.down)
        self.up.weight.copy_(solution.up)
        self.up.bias.copy_(solution.bias)


class Moments:
    """Weighted second moments of ``x`` and ``y``: all that the solution needs of the tokens.

    A token's error matters relative to the residual stream that it is added to, as the next norm
    sees it, so each weighs ``1 / mean(h^2)``. Unweighted, the one token with a massive activation
    (Sun et al. 2024) decides: a layer fitted to it fits no other.

    ``table`` is fp64 ``[H + 1, 2 H + 1]``, of ``(x, 1)`` with ``(x, y, 1)``; ``squares`` fp64
    ``[H]``, of ``y``. Those of several ranks add up.
    """

    def __init__(self, hidden_size: int, *, device: torch.device | None = None) -> None:
        self.hidden_size = hidden_size
        settings: dict[str, Any] = {"dtype": torch.float64, "device": device}
        self.table = torch.zeros(hidden_size + 1, 2 * hidden_size + 1, **settings)
        self.squares = torch.zeros(hidden_size, **settings)

    def add(self, residual: Tensor, read: Tensor, update: Tensor) -> None:
        """Take in tokens ``[N, H]``: the stream ``h`` that the unit adds to, what it reads (``x``)
        and what it adds (``y``)."""
        root = residual.double().square().mean(-1).clamp(min=1e-30).rsqrt()[:, None]
        x, y = read.double() * root, update.double() * root
        self.table.addmm_(torch.cat((x, root), -1).t(), torch.cat((x, y, root), -1))
        self.squares += y.square().sum(0)

    def solve(self, rank: int, *, ridge: float) -> Solution:
        """Ridge regression of ``y`` on ``x``, cut to ``rank`` by the SVD of its fitted values.

        ``W = S_yx (S_xx + ridge mean(diag S_xx) I)^-1`` of centred moments; the best map of a
        lower rank, in what it gives on these tokens, projects on the ``rank`` first eigenvectors of
        the fitted values' covariance ``W S_xx W'`` (reduced-rank regression, Izenman 1975).
        """
        h = self.hidden_size
        total = self.table[-1, -1].clamp(min=1e-300)
        mean = self.table[-1, :-1] / total
        mean_x, mean_y = mean[:h], mean[h:]
        xx = self.table[:h, :h] / total - torch.outer(mean_x, mean_x)
        yx = self.table[:h, h:-1].t() / total - torch.outer(mean_y, mean_x)
        damping = ridge * xx.diagonal().mean().clamp(min=1e-300)
        damped = xx + damping * torch.eye(h, dtype=xx.dtype, device=xx.device)
        w = torch.linalg.solve(damped, yx.t()).t()
        fitted = w @ xx @ w.t()
        up = torch.linalg.eigh((fitted + fitted.t()) / 2).eigenvectors[:, -rank:].flip(-1)
        # An eigenvector's sign is anybody's: let its largest entry be positive on every machine.
        up = up * up.gather(0, up.abs().argmax(0, keepdim=True)).sign()
        down = up.t() @ w
        spread = (self.squares / total - mean_y.square()).sum().clamp(min=1e-300)
        gained = 2 * (up.t() @ yx * down).sum() - (down @ xx * down).sum()  # up is orthonormal
        return Solution(down, up, mean_y - up @ (down @ mean_x), float(gained / spread))
