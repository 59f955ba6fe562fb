"""``megatron-mod-calibrate-router``."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_mod.commands.command import command, ranks
from megatron_mod.config.budget import BudgetRequest
from megatron_mod.config.model_folder import is_megatron


def main(arguments: Sequence[str] | None = None) -> None:
    with (
        command(BudgetRequest, arguments) as request,
        ranks(request, with_megatron=is_megatron(request.load)) as topology,
    ):
        from megatron_mod.calibration.calibrate import calibrate

        calibrate(request, topology)
