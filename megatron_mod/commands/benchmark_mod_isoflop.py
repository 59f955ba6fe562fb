"""``megatron-mod-benchmark-mod-isoflop``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from megatron_mod.commands.command import command
from megatron_mod.config.model_size import ModelSize
from megatron_mod.config.options import Options
from megatron_mod.config.rules import COUNT, SEED, InputFile, OutputFolder, Range, setting

Kind = Literal[
    "dense", "mod", "random", "static", "moe", "mode_staged", "mode_integrated"
]  # fmt: skip


@dataclass(frozen=True)
class IsoflopBenchmark(Options):
    """Train models from scratch at equal training FLOPs: dense, Mixture-of-Depths, its controls.

        python tools/benchmark/mod_isoflop.py --out DIR [--text FILE]

    At each size and with each seed: a dense model; every other block routed by the top k of its
    tokens (capacity 0.125 and 0.5); by as many drawn by lot; and these blocks left out. Each takes
    as many steps as the budget of counted operations allows, and is measured on the last part of
    the text, by the true top k and by the causal rule. --models names others: mixtures of 8 experts
    of which a token's two cost what a dense MLP does (moe), such blocks routed by the top k
    (mode_staged), and with as many experts that return nothing in every other mixture
    (mode_integrated), counted as if its gate favoured none. At last the exports of those whose
    routers have learned, or that have none, generate text in turn, which is timed. Prints a table
    and writes DIR/isoflop.json and DIR/isoflop.png. What is already in DIR is not trained or
    measured again.

    Args:
        out: folder of the trainings and of what is found.
        text: file to train on and, its last twentieth, to measure on; unset: the documentation
            that every Python carries.
        models: kinds of them: dense, which must be one, mod, random, static, moe, mode_staged,
            mode_integrated.
        sizes: of the models, hidden size x layers.
        budget: floating-point operations of each training.
        seeds: of which every training is repeated.
        steps: of each training at most, whatever its budget; unset: as the budget says.
        length: tokens of a row.
        batch: rows a step.
        vocabulary: tokens of the tokenizer, which is made of the text.
        lr: peak learning rate.
        without_sampling: leave out the timing of generation.
    """

    out: str = setting(OutputFolder())
    text: str | None = setting(InputFile(), default=None)
    models: tuple[Kind, ...] = ("dense", "mod", "random", "static")
    sizes: tuple[str, ...] = ("32x4", "64x4", "96x6")
    budget: float = setting(Range(above=0, most=1e22), default=2e12)
    seeds: tuple[int, ...] = setting(SEED, default=(0, 1))
    steps: int | None = setting(COUNT, default=None)
    length: int = setting(Range(least=8), default=256)
    batch: int = setting(COUNT, default=8)
    vocabulary: int = setting(Range(least=300), default=2048)
    lr: float = setting(Range(above=0), default=3e-3)
    without_sampling: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if "dense" not in self.models:
            raise ValueError(
                f"--models {' '.join(self.models)}: all are compared with dense; add it."
            )
        self.parsed_sizes()

    def parsed_sizes(self) -> list[ModelSize]:
        """Each of them.

        Raises:
            ValueError: one that no model has.
        """
        return list(map(ModelSize.parse, self.sizes))


def main(arguments: Sequence[str] | None = None) -> None:
    with command(IsoflopBenchmark, arguments) as options:
        from megatron_mod.benchmark.isoflop import compare
        from megatron_mod.benchmark.isoflop_models import Setup

        setup = Setup(
            out=Path(options.out),
            text=Path(options.text) if options.text else None,
            budget=options.budget,
            most_steps=options.steps,
            length=options.length,
            batch=options.batch,
            vocabulary=options.vocabulary,
            lr=options.lr,
        )
        compare(
            setup,
            kinds=options.models,
            sizes=options.parsed_sizes(),
            seeds=options.seeds,
            sampling=not options.without_sampling,
        )
