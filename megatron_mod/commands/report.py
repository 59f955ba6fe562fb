"""``megatron-mod-report``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Literal

from megatron_mod.commands.command import command, ranks
from megatron_mod.config.model_folder import TrainingRun
from megatron_mod.config.options import option
from megatron_mod.config.ranks import RankOptions
from megatron_mod.config.rules import AT_LEAST_0, COUNT, SHARE, InputFile, setting

_OF_THE_MODEL = ("data", "samples", "curve", "batch_size", "dtype", "base")


@dataclass(frozen=True)
class ReportOptions(RankOptions):
    """Write a training run as one self-contained HTML page.

        python tools/report.py RUN_DIR
        torchrun --standalone --nproc_per_node N tools/report.py RUN_DIR --tensor T --pipeline P

    RUN_DIR/report.html shows loss, capacity, decisions, scores, skipped tokens, quality against
    work beside static removal, and the configuration; RUN_DIR/report/ has the figures as PNG. The
    newest checkpoint is run on the validation data, which takes a while (--without-model leaves it
    out).

    Args:
        run: checkpoint.save of a training, finished or not.
        data: documents to run; unset: the run's validation data.
        samples: so many of the documents; 0: all.
        curve: capacities at which quality is measured.
        without_model: show only what the training itself wrote.
        batch_size: documents run together.
        dtype: what weights and activations are held in.
    """

    run: str = setting(TrainingRun(), positional="RUN_DIR")
    data: str | None = setting(InputFile(), default=None)
    samples: int = setting(AT_LEAST_0, default=32)
    curve: tuple[float, ...] = setting(SHARE, default=(0.9, 0.75, 0.5, 0.25), may_be_empty=True)
    without_model: bool = False
    batch_size: int = setting(COUNT, default=1)
    dtype: Literal["float32", "bfloat16"] = "float32"

    def __post_init__(self) -> None:
        for field in fields(self) if self.without_model else ():
            value = getattr(self, field.name)
            if field.name in _OF_THE_MODEL and value != field.default:
                raise ValueError(
                    f"{option(field.name)} {value}: would be ignored by --without-model; drop one."
                )
        super().__post_init__()


def main(arguments: Sequence[str] | None = None) -> None:
    with (
        command(ReportOptions, arguments) as options,
        ranks(options, with_megatron=not options.without_model) as topology,
    ):
        from megatron_mod.parallel.agree import on_first_rank
        from megatron_mod.parallel.topology import print_once
        from megatron_mod.report.page import FIGURES, write_page
        from megatron_mod.report.run import read_run

        run = read_run(options.run)
        measured = None
        if run.routing and not options.without_model:
            from megatron_mod.report.measured import measure

            measured = measure(
                run,
                topology,
                data=options.data,
                samples=options.samples,
                capacities=options.curve,
                dtype=options.dtype,
                batch_size=options.batch_size,
                base=options.base,
                say=print_once,
            )
        path = on_first_rank(lambda: str(write_page(run, measured)))
        print_once(f"Wrote {path}; its figures are in {run.folder / FIGURES}")
