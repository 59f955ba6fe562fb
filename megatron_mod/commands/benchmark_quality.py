"""``megatron-mod-benchmark-quality``."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_mod.commands.command import command
from megatron_mod.config import cli
from megatron_mod.config.model_folder import ModelFolder
from megatron_mod.config.options import Options
from megatron_mod.config.quality_budget import Budget
from megatron_mod.config.rules import AT_LEAST_0, COUNT, InputFile, OutputFolder, Range, setting

BUDGETS = (
    "attn_token:0.75", "attn_token:0.5", "mlp_token:0.7", "block_token:0.66", "attn_sequence:0.75",
    "block_sequence:0.75",
)  # fmt: skip


@dataclass(frozen=True)
class QualityBenchmark(Options):
    """Train routers of several granularities and budgets, and put them beside static removal.

        python tools/benchmark/quality.py --load BASE --train FILE --texts FILE [FILE ...] --out DIR

    Each granularity is trained with every seed for the least of its capacities, and for each of
    its budgets of work, calibrated for each on one half of each held-out text and measured on the
    other, as are the dense model, greedy removal of layers with and without stand-ins, and, of
    capacities, the published recipe. Prints a table and writes OUT/quality.json and
    OUT/quality.png. What is already in OUT is not trained or measured again. A training's settings
    (--section.field value) go to every training.

    Args:
        load: base checkpoint or Hugging Face folder.
        train: conversations to train on.
        texts: held-out conversations (.jsonl, .json, .parquet) or texts, one for each kind.
        out: folder of the trainings.
        budgets: granularities with a capacity, as attn_token:0.5, with a share of the dense
            model's work, as attn_token+mlp_token:work=0.8, or with several that the same routers
            serve, trained for the range of them, as attn_token+mlp_token:work=0.7,0.8,0.9.
        seeds: of which every training is repeated.
        without_published: leave the published recipe out, which is trained with the first seed.
        layers: how many of the deepest layers but the last are routed.
        samples: of each text, at most, at least 2.
        max_length: tokens a sample is cut to.
        steps: of each training.
        batch: sequences a step.
        lr: peak learning rate.
        lora: rank of adapters in the routed layers, which are then trained too: with routers,
            around removal with stand-ins at nearly equal work, and on the dense model; unset: none.
    """

    load: str = setting(ModelFolder())
    train: str = setting(InputFile())
    texts: tuple[str, ...] = setting(InputFile())
    out: str = setting(OutputFolder())
    budgets: tuple[str, ...] = BUDGETS
    seeds: tuple[int, ...] = setting(AT_LEAST_0, default=(0, 1))
    without_published: bool = False
    layers: int = setting(COUNT, default=15)
    samples: int = setting(Range(least=2), default=48)
    max_length: int = setting(Range(least=2), default=160)
    steps: int = setting(COUNT, default=28)
    batch: int = setting(COUNT, default=4)
    lr: float = setting(Range(above=0), default=1e-2)
    lora: int | None = setting(COUNT, default=None)

    def __post_init__(self) -> None:
        self.parsed_budgets()

    def parsed_budgets(self) -> list[Budget]:
        """Each of them.

        Raises:
            ValueError: one that is something else.
        """
        return list(map(Budget.parse, self.budgets))


def main(arguments: Sequence[str] | None = None) -> None:
    arguments = sys.argv[1:] if arguments is None else arguments
    settings, own = cli.split(arguments)
    with command(QualityBenchmark, own) as options:
        cli.check_names(settings)
        if options.lora is None and (of_adapters := cli.split_section(settings, "lora")[0]):
            raise ValueError(
                f"{of_adapters[0]}: would be ignored, because --lora is unset and nothing has "
                "adapters; set that, or leave it out."
            )
        from megatron_mod.benchmark.quality import compare
        from megatron_mod.benchmark.quality_models import Setup

        recipe = {
            "train.steps": options.steps,
            "train.global_batch_size": options.batch,
            "train.micro_batch_size": options.batch,
            "optimizer.lr": options.lr,
            "optimizer.average_fraction": 0.25,
        }
        setup = Setup(
            load=Path(options.load),
            train=Path(options.train),
            texts=[Path(text) for text in options.texts],
            out=Path(options.out),
            layers=options.layers,
            samples=options.samples,
            max_length=options.max_length,
            recipe=recipe,
            settings=settings,
            lora=options.lora,
        )
        compare(
            setup,
            budgets=options.parsed_budgets(),
            seeds=options.seeds,
            published=not options.without_published,
        )
