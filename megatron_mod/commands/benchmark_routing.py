"""``megatron-mod-benchmark-routing``."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from megatron_mod.commands.command import command
from megatron_mod.config.options import Options
from megatron_mod.config.rules import COUNT, OutputFile, setting


@dataclass(frozen=True)
class RoutingBenchmark(Options):
    """Time a routed layer of each granularity against the dense layer, and what share of the saved
    work becomes saved time.

        python tools/benchmark/routing.py [--sizes small large] [--training] [--json FILE]

    One layer, random weights and inputs; the dense layer and every capacity are timed in turn. Work
    is counted (FlopCounterMode over torch's plain attention), decisions are set to the capacity by
    moving the threshold. Break-even is the capacity at which a straight line through the routed
    layer's times meets the dense time: above it routing costs more than it saves. Operations are
    those that the host dispatches, views aside: what a small layer's time on a GPU is made of.

    Args:
        sizes: layers of SmolLM2 (`small`), Llama-3-8B (`large`), one between and a tiny one.
        batch: sequences.
        length: tokens of a sequence.
        repetitions: measurements of each layer.
        training: forward and backward with sparse training.
        implementation: the layers' modules; unset: Transformer Engine where it works.
        json: also write the rows to this file.
    """

    sizes: tuple[Literal["tiny", "small", "medium", "large"], ...] = ("small", "medium")
    batch: int = setting(COUNT, default=4)
    length: int = setting(COUNT, default=256)
    repetitions: int = setting(COUNT, default=7)
    training: bool = False
    implementation: Literal["local", "transformer_engine"] | None = None
    json: str | None = setting(OutputFile(), default=None)


def main(arguments: Sequence[str] | None = None) -> None:
    with command(RoutingBenchmark, arguments) as options:
        from megatron_mod.benchmark.routing import measure

        rows = measure(
            options.sizes,
            batch=options.batch,
            length=options.length,
            repetitions=options.repetitions,
            training=options.training,
            implementation=options.implementation,
        )
        if options.json:
            Path(options.json).write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
