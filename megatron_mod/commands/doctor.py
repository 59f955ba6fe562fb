"""``megatron-mod-doctor``."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_mod.commands.command import command
from megatron_mod.config.options import Options
from megatron_mod.config.rules import OutputFile, setting

WRONG = 1  # exit status
STANDARD_OUTPUT = "-"


class _OutputFile(OutputFile):
    def problem(self, value: str) -> str | None:
        return None if value == STANDARD_OUTPUT else super().problem(value)


@dataclass(frozen=True)
class Doctor(Options):
    """Tell whether a training can run on this machine, on what, and what is in the way.

        python -m megatron_mod.doctor

    Prints versions, devices, whose kernels a training would run and why not faster ones, and
    whether ranks can talk (two on the CPU, or one on each GPU, start and add up their numbers).
    Exits with status 1 where something has to be mended first. torchrun is not needed.

    Args:
        json: also write what was found to this file; without a file, print it instead of the page.
    """

    json: str | None = setting(_OutputFile(), default=None, alone=STANDARD_OUTPUT)


def main(arguments: Sequence[str] | None = None) -> None:
    with command(Doctor, arguments) as options:
        if "TORCHELASTIC_RUN_ID" in os.environ:
            raise ValueError("torchrun: the doctor starts ranks of its own; run it with python.")
        from megatron_mod.doctor.diagnosis import diagnose
        from megatron_mod.doctor.page import page

        found = diagnose()
        text = json.dumps(found, indent=2)
        print(text if options.json == STANDARD_OUTPUT else page(found), flush=True)
        if options.json not in (None, STANDARD_OUTPUT):
            Path(options.json).write_text(text + "\n", encoding="utf-8")
    if not found["can_train"]:
        sys.exit(WRONG)
