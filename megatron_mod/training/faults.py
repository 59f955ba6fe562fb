"""Steps whose loss or gradient is not finite: skipped and counted, or the end of the run."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
import torch.distributed as dist

from megatron_mod.parallel import device
from megatron_mod.training.step import StepResult


class FaultCounter:
    """Counts skipped steps. All its numbers are the same on every rank."""

    def __init__(self, *, most_in_a_row: int) -> None:
        """``most_in_a_row``: steps skipped one after the other before the run stops."""
        self.most_in_a_row = most_in_a_row
        self.skipped = 0
        self.in_a_row = 0

    def skips(
        self,
        step: int,
        result: StepResult,
        models: Iterable[torch.nn.Module],
        *,
        samples: Callable[[], Sequence[str]],
    ) -> bool:
        """Whether this step must not reach the routers; called by all ranks, before the optimizer.

        Waits for the device: a step that is not finite has to be known before the optimizer's.

        Args:
            samples: where each sequence of the global batch comes from; asked for at the end only.

        Raises:
            ValueError: too many in a row.
        """
        if _is_finite(result, models):
            self.in_a_row = 0
            return False
        self.skipped += 1
        self.in_a_row += 1
        if self.in_a_row > self.most_in_a_row:
            raise ValueError(
                f"step {step}: the loss ({float(result.task_loss)}) or a gradient is not finite, "
                f"for the {self.in_a_row}. step in a row (train.max_skipped_steps = "
                f"{self.most_in_a_row}): training has diverged; lower optimizer.lr or check this "
                f"step's samples: {', '.join(samples())}. The checkpoints saved are from before."
            )
        return True

    def state_dict(self) -> dict[str, int]:
        return {"skipped": self.skipped, "in_a_row": self.in_a_row}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.skipped, self.in_a_row = state["skipped"], state["in_a_row"]


def _is_finite(result: StepResult, models: Iterable[torch.nn.Module]) -> bool:
    finite = torch.isfinite(result.task_loss)
    for model in models:
        for parameter in model.parameters():
            if parameter.requires_grad:
                finite = finite & torch.isfinite(parameter.main_grad).all()
    wrong = 1.0 - finite.float()
    dist.all_reduce(wrong, op=dist.ReduceOp.MAX)
    return not bool(wrong)


def require_finite(step: int, weights: Iterable[torch.Tensor]) -> None:
    """Refuse to save routers that are not finite; called by all ranks.

    Raises:
        ValueError: some are not.
    """
    wrong = torch.zeros((), device=device.device())
    for weight in weights:
        wrong = torch.maximum(wrong, 1.0 - torch.isfinite(weight).all().float())
    dist.all_reduce(wrong, op=dist.ReduceOp.MAX)
    if wrong:
        raise ValueError(
            f"step {step}: a router is no longer finite: training has diverged; lower "
            "optimizer.lr. The checkpoints saved are from before."
        )
