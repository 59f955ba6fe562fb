"""Steps whose loss or gradient is not finite: skipped and counted, or the end of the run."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from megatron_mod.parallel import device
from megatron_mod.parallel.agree import largest


class FaultCounter:
    """Counts skipped steps. All its numbers are the same on every rank."""

    def __init__(self, *, most_in_a_row: int) -> None:
        """``most_in_a_row``: steps skipped one after the other before the run stops."""
        self.most_in_a_row = most_in_a_row
        self.skipped = 0
        self.in_a_row = 0

    def skips(
        self, step: int, *, finite: bool, loss: Tensor, samples: Callable[[], Sequence[str]]
    ) -> bool:
        """Whether this step must not reach what trains; called by all ranks, before the optimizer.

        Args:
            finite: whether loss and gradients are, on every rank (``not_finite``).
            loss: to be named in the message.
            samples: where each sequence of the global batch comes from; asked for at the end only.

        Raises:
            ValueError: too many in a row.
        """
        if finite:
            self.in_a_row = 0
            return False
        self.skipped += 1
        self.in_a_row += 1
        if self.in_a_row > self.most_in_a_row:
            raise ValueError(
                f"step {step}: the loss ({float(loss)}) or a gradient is not finite, "
                f"for the {self.in_a_row}. step in a row (train.max_skipped_steps = "
                f"{self.most_in_a_row}): training has diverged; lower optimizer.lr or check this "
                f"step's samples: {', '.join(samples())}. The checkpoints saved are from before."
            )
        return True

    def state_dict(self) -> dict[str, int]:
        return {"skipped": self.skipped, "in_a_row": self.in_a_row}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.skipped, self.in_a_row = state["skipped"], state["in_a_row"]


def not_finite(loss: Tensor, models: Iterable[torch.nn.Module]) -> Tensor:
    """1 if the loss or a gradient on this rank is not finite, else 0; on the device."""
    finite = torch.isfinite(loss)
    for model in models:
        for parameter in model.parameters():
            if parameter.requires_grad:
                finite = finite & torch.isfinite(parameter.main_grad).all()
    return 1.0 - finite.float()


def require_finite(step: int, weights: Iterable[torch.Tensor]) -> None:
    """Refuse to save what is no longer finite; called by all ranks.

    Raises:
        ValueError: some are not.
    """
    finite = torch.ones((), dtype=torch.bool, device=device.device())
    for weight in weights:
        finite = finite & torch.isfinite(weight).all()
    (wrong,) = largest(~finite)
    if wrong:
        raise ValueError(
            f"step {step}: what trains is no longer finite: training has diverged; lower "
            "optimizer.lr. The checkpoints saved are from before."
        )
