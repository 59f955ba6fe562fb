"""``megatron-mod-benchmark-data``."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_mod.commands.command import command
from megatron_mod.config.options import Options
from megatron_mod.config.rules import COUNT, InputFile, InputFolder, OutputFile, Range, setting


@dataclass(frozen=True)
class DataBenchmark(Options):
    """Measure how fast data is prepared and dealt, and how much of it is padding.

    Args:
        data: JSON lines, as training takes them.
        tokenizer: Hugging Face folder.
        max_length: tokens a sample is cut to.
        global_batch_size: sequences a step.
        micro_batch_size: rows a forward pass.
        repeats: measurements of each way.
        parameters: of the model that is to be fed.
        flops: operations a second of the device it runs on.
        json: file for the figures.
    """

    data: str = setting(InputFile())
    tokenizer: str = setting(InputFolder())
    max_length: int = setting(Range(least=2), default=2048)
    global_batch_size: int = setting(COUNT, default=64)
    micro_batch_size: int = setting(COUNT, default=4)
    repeats: int = setting(COUNT, default=5)
    parameters: float = setting(Range(least=1, most=1e15), default=8e9)
    flops: float = setting(Range(least=1, most=1e21), default=989e12)
    json: str | None = setting(OutputFile(), default=None)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.global_batch_size % self.micro_batch_size:
            raise ValueError(
                f"--global-batch-size {self.global_batch_size}: must be a multiple of "
                f"--micro-batch-size {self.micro_batch_size}."
            )


def main(arguments: Sequence[str] | None = None) -> None:
    with command(DataBenchmark, arguments) as options:
        from megatron_mod.benchmark.data import compare

        settings = dataclasses.asdict(options)
        save = settings.pop("json")
        result = compare(**settings)
        if save:
            Path(save).write_text(json.dumps(result, indent=2), encoding="utf-8")
