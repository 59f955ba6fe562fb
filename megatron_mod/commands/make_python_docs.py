"""``megatron-mod-make-python-docs``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_mod.commands.command import command
from megatron_mod.config.options import Options
from megatron_mod.config.rules import COUNT, OutputFolder, setting


@dataclass(frozen=True)
class PythonDocsOptions(Options):
    """Write questions and answers from Python's own documentation as JSON lines.

    Args:
        save: folder for the files, one a split.
        validation: records for validation.jsonl.
        ranking: records for ranking.jsonl.
        held_out: records for held_out.jsonl; train.jsonl gets the others.
    """

    save: str = setting(OutputFolder())
    validation: int = setting(COUNT, default=24)
    ranking: int = setting(COUNT, default=16)
    held_out: int = setting(COUNT, default=48)


def main(arguments: Sequence[str] | None = None) -> None:
    with command(PythonDocsOptions, arguments) as options:
        from megatron_mod.data.python_docs import write_splits

        sizes = {name: getattr(options, name) for name in ("validation", "ranking", "held_out")}
        for name, path in write_splits(options.save, {**sizes, "train": 0}).items():
            with path.open(encoding="utf-8") as lines:
                print(f"{path}: {sum(1 for _ in lines)} {name} records")
