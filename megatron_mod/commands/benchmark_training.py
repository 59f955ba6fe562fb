"""``megatron-mod-benchmark-training``."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from megatron_mod.commands.command import command
from megatron_mod.config import cli
from megatron_mod.config.model_folder import HuggingFaceFolder
from megatron_mod.config.options import Options
from megatron_mod.config.rules import COUNT, InputFile, InputFolder, OutputFile, Range, setting

# What ways have in common is an option here, and what makes them differ is theirs.
TAKEN = (
    "model.hf_path", "model.checkpoint", "model.dtype", "model.routers", "router.granularity",
    "router.layers", "router.training_compute", "train.frozen_prefix", "train.prefix_cache",
    "train.steps", "train.epochs", "train.global_batch_size", "train.micro_batch_size",
    "train.seed", "optimizer.lr", "checkpoint", "logging",
    "parallel.pipeline_model_parallel_size", "data",
)  # fmt: skip


@dataclass(frozen=True)
class TrainingBenchmark(Options):
    """Train routers in several ways, in turn on the same samples: speed, memory, counted work.

        python tools/benchmark/training.py --hf-path DIR --data FILE [--nproc N] --json FILE

    published, full and published_stop are plain Transformers; recompute, cached, cached_packed and
    sparse are ours. Each is a process (ours: N) of its own that waits while the others are at work.
    Routers start at zeros, without biases, stand-ins or penalty, in all ways but sparse, so that
    the gradients of their first step are compared. A training's settings (--section.field value) go
    to ours, to see what its defaults cost: --router.bias true --router.stand_in linear, and so on.

    Args:
        hf_path: model.
        data: conversations to train on.
        nproc: ranks of ours, data parallel but for --pipeline.
        pipeline: pipeline stages of ours.
        threads: of each process; unset: the plain ways have all cores, ranks of ours share them.
        ways: what is run; speed and memory are put beside the first one's.
        granularity: what is routed.
        layers: how many of the deepest layers but the last are routed; unset: half of all.
        batch: sequences a step.
        micro_batch: rows a forward pass.
        max_length: tokens a sample is cut to.
        steps: of each round.
        rounds: that are timed; figures are their medians.
        dtype: of frozen weights and activations; unset: bfloat16 on a GPU, else float32.
        without_reference: do not compare gradients, whose reference runs in float64.
        folder: where to work (the prefix cache needs room); unset: the temporary folder.
        json: also write the figures to this file.
    """

    hf_path: str = setting(HuggingFaceFolder())
    data: str = setting(InputFile())
    nproc: int = setting(COUNT, default=1)
    pipeline: int = setting(COUNT, default=1)
    threads: int | None = setting(COUNT, default=None)
    ways: tuple[
        Literal[
            "published",
            "full",
            "published_stop",
            "recompute",
            "cached",
            "cached_packed",
            "sparse",
        ],
        ...,
    ] = (
        "published", "full", "published_stop", "recompute", "cached", "cached_packed", "sparse",
    )  # fmt: skip
    granularity: Literal["attn_token", "mlp_token", "block_token"] = "block_token"
    layers: int | None = setting(COUNT, default=None)
    batch: int = setting(COUNT, default=8)
    micro_batch: int = setting(COUNT, default=4)
    max_length: int = setting(Range(least=2), default=512)
    steps: int = setting(COUNT, default=2)
    rounds: int = setting(COUNT, default=5)
    dtype: Literal["float32", "bfloat16"] | None = None
    without_reference: bool = False
    folder: str | None = setting(InputFolder(), default=None)
    json: str | None = setting(OutputFile(), default=None)

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(set(self.ways)) < len(self.ways):
            raise ValueError(f"--ways {' '.join(self.ways)}: names one twice.")
        if self.nproc % self.pipeline:
            raise ValueError(
                f"--nproc {self.nproc}: must be a multiple of --pipeline {self.pipeline}."
            )
        share = self.micro_batch * (self.nproc // self.pipeline)
        if self.batch % share:
            raise ValueError(
                f"--batch {self.batch}: must be a multiple of --micro-batch {self.micro_batch} x "
                f"data-parallel ranks ({self.nproc // self.pipeline})."
            )


def check_settings(settings: Sequence[str]) -> None:
    """Refuse what the ways have in common or differ in, and names that are no settings.

    Raises:
        ValueError: naming the setting.
    """
    for option in (each.partition("=")[0] for each in settings if each.startswith("--")):
        if any(f"{option}.".startswith(f"--{name}.") for name in TAKEN):
            raise ValueError(
                f"{option}: all ways have it in common, or differ in it; leave it out, or use "
                "the benchmark's own options (--help)."
            )
    cli.check_names(settings)


def main(arguments: Sequence[str] | None = None) -> None:
    arguments = sys.argv[1:] if arguments is None else arguments
    settings, own = cli.split(arguments)
    with command(TrainingBenchmark, own) as options:
        check_settings(settings)
        from megatron_mod.benchmark.training import compare
        from megatron_mod.benchmark.training_ways import Setup
        from megatron_mod.conversion.families import family_of
        from megatron_mod.conversion.hf_reader import read_config

        shape = read_config(options.hf_path)
        num_layers = family_of(shape).architecture_of(shape).num_layers
        setup = Setup(
            hf_path=Path(options.hf_path),
            data=Path(options.data),
            granularity=options.granularity,
            layers=options.layers or max(1, num_layers // 2),
            ranks=options.nproc,
            pipeline=options.pipeline,
            batch=options.batch,
            micro_batch=options.micro_batch,
            max_length=options.max_length,
            steps=options.steps,
            rounds=options.rounds,
            dtype=options.dtype,
            settings=settings,
        )
        report = compare(
            setup,
            ways=options.ways,
            reference=not options.without_reference,
            threads=options.threads,
            folder=options.folder,
        )
        if options.json:
            Path(options.json).write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
