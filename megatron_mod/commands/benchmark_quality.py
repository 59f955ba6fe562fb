"""``megatron-mod-benchmark-quality``."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from megatron_mod.commands.command import command
from megatron_mod.config import cli
from megatron_mod.config.model_folder import HuggingFaceFolder, ModelFolder
from megatron_mod.config.options import Options
from megatron_mod.config.rules import COUNT, InputFolder, OutputFolder, Range, setting

Granularity = Literal[
    "attn_sequence", "attn_token", "mlp_sequence", "mlp_token", "block_sequence", "block_token"
]


@dataclass(frozen=True)
class QualityBenchmark(Options):
    """Train every granularity and scope on one model and put each beside the best static removal.

        python tools/benchmark/quality.py --load BASE --hf-path DIR --data DIR --out DIR

    Prints a table and writes OUT/quality.json. A training whose folder is complete is not repeated.
    A training's settings (--section.field value) go to every training.

    Args:
        load: base checkpoint.
        hf_path: the same model, Hugging Face.
        data: what make_python_docs.py wrote.
        out: folder of the trainings.
        granularities: what is trained.
        scopes: what a capacity is held for.
        steps: of each training.
        batch: sequences a step.
        lr: peak learning rate.
    """

    load: str = setting(ModelFolder())
    hf_path: str = setting(HuggingFaceFolder())
    data: str = setting(InputFolder())
    out: str = setting(OutputFolder())
    granularities: tuple[Granularity, ...] = (
        "attn_sequence",
        "attn_token",
        "mlp_sequence",
        "mlp_token",
        "block_sequence",
        "block_token",
    )
    scopes: tuple[Literal["model", "layer"], ...] = ("model", "layer")
    steps: int = setting(COUNT, default=26)
    batch: int = setting(COUNT, default=16)
    lr: float = setting(Range(above=0), default=3e-3)


def main(arguments: Sequence[str] | None = None) -> None:
    arguments = sys.argv[1:] if arguments is None else arguments
    settings, own = cli.split(arguments)
    with command(QualityBenchmark, own) as options:
        cli.check_names(settings)
        from megatron_mod.benchmark.quality import Trainings, compare

        trainings = Trainings(
            load=Path(options.load),
            hf_path=Path(options.hf_path),
            data=Path(options.data),
            out=Path(options.out),
            steps=options.steps,
            batch=options.batch,
            lr=options.lr,
            settings=settings,
        )
        compare(trainings, granularities=options.granularities, scopes=options.scopes)
