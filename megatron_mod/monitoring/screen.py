"""What a training says on the screen: plain lines, or on a terminal a live display."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable

from rich.console import Console

from megatron_mod import verbosity
from megatron_mod.monitoring.display import Display
from megatron_mod.routing.config import RoutingConfig


class Screen:
    """Shows every record; whatever else is printed meanwhile keeps its lines."""

    def __init__(self, routing: RoutingConfig, *, steps: int) -> None:
        self.routing, self.steps = routing, steps
        self.display: Display | None = None

    def open(self, *, after: int, ending: Callable[[], object]) -> None:
        """Show the display from now on, where there is a terminal that can. With level ``debug``
        lines are too many for it.

        ``ending``: whether the training is to end.
        """
        says = verbosity.says(logging.INFO) and not verbosity.says(logging.DEBUG)
        if says and can_redraw() and after < self.steps:
            self.display = Display(self.routing, steps=self.steps, after=after, ending=ending)
            self.display.start()

    def close(self, *, failed: bool) -> None:
        """Leave the terminal as it was, with what was shown last."""
        if self.display:
            self.display.stop(failed=failed)
            self.display = None

    def advance(self, step: int) -> None:
        """Show that a step has been made."""
        if self.display:
            self.display.advance(step)

    def doing(self, what: str) -> None:
        """Show what keeps the next step waiting."""
        if self.display:
            self.display.doing(what)

    def write(self, record: dict) -> None:
        """Show a record."""
        if "loss" in record and self.display:
            self.display.show(record)
            return
        level = logging.WARNING if "skipped" in record else logging.INFO
        if verbosity.says(level):
            print(self.line(record), flush=True)

    def line(self, record: dict) -> str:
        """A record as a line."""
        step = f"step {record['step']:>{len(str(self.steps))}}/{self.steps}"
        if "skipped" in record:
            return f"{step}  skipped: {record['skipped']}"
        if "validation_loss" in record:
            pooling = f"  (pooling: {self.routing.pooling})" if self.routing.pooling else ""
            return (
                f"{step}  validation loss {record['validation_loss']:.4f}"
                f"  capacity {record['validation_capacity_mean']:.3f}"
                f"{self._work(record, 'validation_work')}{pooling}{_causal(record)}"
            )
        return (
            f"{step}  loss {record['loss']:.4f}  capacity {record['capacity_mean']:.3f}"
            f"{self._work(record, 'work')}"
            f"  {record['tokens_per_second']:.0f} tokens/s  lr {record['learning_rate']:.2e}"
            f"  grad norm {record['grad_norm']:.3f}"
        )

    def _work(self, record: dict, name: str) -> str:
        """Where that is what the training is held to."""
        return "" if self.routing.work is None else f"  work {record[name]:.3f}"


def can_redraw() -> bool:
    """Whether standard output is a terminal whose cursor can be moved."""
    return sys.stdout.isatty() and bool(os.environ.get("TERM")) and not Console().is_dumb_terminal


def _causal(record: dict) -> str:
    """What the causal rule gives on the validation data, where there is one."""
    if "validation_loss_causal" not in record:
        return ""
    return (
        f"  by the causal rule {record['validation_loss_causal']:.4f}"
        f" (agrees on {100 * record['causal_agreement']:.1f} %)"
    )
