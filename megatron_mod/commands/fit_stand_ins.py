"""``megatron-mod-fit-stand-ins``."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_mod.commands.command import command, ranks
from megatron_mod.config.stand_ins import StandInRequest


def main(arguments: Sequence[str] | None = None) -> None:
    with command(StandInRequest, arguments) as request, ranks(request) as topology:
        from megatron_mod.calibration.stand_ins import make_stand_ins

        make_stand_ins(request, topology)
