"""``megatron-mod-quickstart-report``."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_mod.commands.command import command
from megatron_mod.config.model_folder import HuggingFaceFolder, TrainingRun
from megatron_mod.config.options import Options
from megatron_mod.config.rules import InputFile, OutputFile, Range, setting


@dataclass(frozen=True)
class QuickstartReportOptions(Options):
    """Measure an export against the untouched original; write report.json and print a table.

    Args:
        hf_path: the untouched Hugging Face folder.
        export: what convert_megatron_to_hf.py wrote.
        run: the training's checkpoint.save folder.
        parity: what compare_logits.py --json wrote.
        ranking: text the static baseline is chosen on.
        held_out: text everything is scored on.
        published: checkpoint.save folder of the same training by the published recipe; unset: not
            compared with.
        adapted: checkpoint.save folder of the run's adapters alone, trained on the dense model;
            unset: the run has none, or they are not compared with.
        max_length: tokens a sample is cut to.
        save: the report's file.
    """

    hf_path: str = setting(HuggingFaceFolder())
    export: str = setting(HuggingFaceFolder())
    run: str = setting(TrainingRun())
    parity: str = setting(InputFile())
    ranking: str = setting(InputFile())
    held_out: str = setting(InputFile())
    save: str = setting(OutputFile())
    published: str | None = setting(TrainingRun(), default=None)
    adapted: str | None = setting(TrainingRun(), default=None)
    max_length: int = setting(Range(least=2), default=256)


def main(arguments: Sequence[str] | None = None) -> None:
    with command(QuickstartReportOptions, arguments) as options:
        from megatron_mod.report.quickstart import build_report, table

        inputs = dataclasses.asdict(options)
        save = Path(inputs.pop("save"))
        report = build_report(**inputs)
        save.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
        print("\n" + table(report))
