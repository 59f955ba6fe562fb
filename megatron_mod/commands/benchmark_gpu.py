"""``megatron-mod-benchmark-gpu``."""

from __future__ import annotations

import dataclasses
import json
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from megatron_mod.commands.command import command
from megatron_mod.config.options import Options, option
from megatron_mod.config.rules import InputFolder, OutputFile, Range, setting

# The layer's name in tools/benchmark/routing.py, tokens of its sequence, and the model's cells.
SHAPES = {"llama3-8b": ("large", 8192), "tiny": ("tiny", 128)}


@dataclass(frozen=True)
class GpuBenchmark(Options):
    """Measure what routers save on one GPU, with random weights in bfloat16.

        python tools/benchmark/gpu.py --json FILE [--parts layer dense] [--seconds N]

    layer: a routed layer of each granularity beside the dense one; dense: the dense layer beside
    Megatron-core's own; inference: prefill and decode of the whole model, half of the units of half
    of the layers skipped; host: what of a decode step by CUDA graphs is the host's own time, of
    tiny layers (on a CPU too); attention: that of one token, in the ways that such graphs may take;
    training: steps in the published way and in ours; memory: routers of the whole model trained in
    --memory-gb. All that is compared takes turns; figures are medians.
    FILE is written after every row, so that what was found stays if the time is up.

    Args:
        shape: the model's; tiny is for trying the command on a CPU.
        parts: what is measured, in this order.
        training_layers: layers of the model of training; each way has a copy of it.
        memory_gb: what the card of the part memory has, of 1e9 bytes; on a CPU nothing is limited.
        seconds: when no further part or cell is begun; each has its share, and what another did not
            need. FILE says what was left out.
        folder: where models are written (the whole one takes 16 GB); unset: the temporary folder.
        json: the file.
    """

    json: str = setting(OutputFile())
    shape: Literal["llama3-8b", "tiny"] = "llama3-8b"
    parts: tuple[
        Literal["layer", "dense", "inference", "host", "attention", "training", "memory"], ...
    ] = ("layer", "dense", "inference", "host", "attention", "training", "memory")  # fmt: skip
    training_layers: int = setting(Range(least=2), default=8)
    memory_gb: float = setting(Range(above=0), default=24.0)
    seconds: float = setting(Range(above=0), default=600.0)
    folder: str | None = setting(InputFolder(), default=None)

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(set(self.parts)) < len(self.parts):
            raise ValueError(f"--parts {' '.join(self.parts)}: names one twice.")
        defaults = {field.name: field.default for field in dataclasses.fields(self)}
        for name, part in (("training_layers", "training"), ("memory_gb", "memory")):
            if part not in self.parts and getattr(self, name) != defaults[name]:
                raise ValueError(
                    f"{option(name)} {getattr(self, name)}: would be ignored without the part "
                    f"{part}; add it to --parts, or leave the option out."
                )


def main(arguments: Sequence[str] | None = None) -> None:
    with command(GpuBenchmark, arguments) as options:
        from megatron_mod.benchmark.gpu import CELLS, Asked, measure

        size, length = SHAPES[options.shape]
        cells = CELLS if options.shape == "llama3-8b" else ((1, 16), (2, 16))

        def save(report: dict) -> None:
            new = Path(options.json + ".new")
            new.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
            new.replace(options.json)

        with tempfile.TemporaryDirectory(dir=options.folder) as folder:
            asked = Asked(
                shape=options.shape,
                size=size,
                length=length,
                cells=cells,
                training_layers=options.training_layers,
                memory_gb=options.memory_gb,
                seconds=options.seconds,
                folder=Path(folder),
            )
            measure(asked, options.parts, save)
