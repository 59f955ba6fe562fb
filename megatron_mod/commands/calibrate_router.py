"""``megatron-mod-calibrate-router``."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_mod.commands.command import command, ranks
from megatron_mod.config.budget import BudgetRequest


def main(arguments: Sequence[str] | None = None) -> None:
    with command(BudgetRequest, arguments) as request, ranks(request) as topology:
        from megatron_mod.evaluation.calibrate import calibrate

        calibrate(request, topology)
