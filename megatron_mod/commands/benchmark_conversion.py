"""``megatron-mod-benchmark-conversion``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_mod.commands.command import command
from megatron_mod.config.options import Options
from megatron_mod.config.rules import InputFolder, Range, setting


@dataclass(frozen=True)
class ConversionBenchmark(Options):
    """Convert a random Llama-shaped folder both ways: speed and memory beside a plain copy.

    Makes the folder, copies it, converts it to Megatron and back, each in a process of its own and
    each synced to disk, and prints GB/s and the largest anonymous memory above what the process
    held before it began (Linux). Needs three times --gigabytes of disk; everything is removed at
    the end.

    Args:
        gigabytes: size of the model.
        folder: where to work; unset: the temporary folder.
    """

    gigabytes: float = setting(Range(above=0, most=1e4), default=8.0)
    folder: str | None = setting(InputFolder(), default=None)


def main(arguments: Sequence[str] | None = None) -> None:
    with command(ConversionBenchmark, arguments) as options:
        from megatron_mod.benchmark.conversion import compare

        compare(size=options.gigabytes * 1e9, folder=options.folder)
