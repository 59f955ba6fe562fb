"""``megatron-mod-reformat-datasets``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from megatron_mod.commands.command import command
from megatron_mod.config.options import Options
from megatron_mod.config.rules import NewFolder, OutputFolder, setting
from megatron_mod.data.formats import parse_sources, raw_sources, reformat

Corpus = Literal[
    "vicuna_sharegpt", "evol_instruct", "slim_orca", "meta_math_qa", "evol_code_alpaca", "alpaca"
]


@dataclass(frozen=True)
class ReformatOptions(Options):
    """Bring raw instruction corpora to JSON lines of messages.

    Writes data.jsonl and, with what was dropped, report.json.

    Args:
        raw_data_root: folder with a sub-folder for each corpus.
        save_path: folder that gets a new sub-folder for each corpus.
        datasets: corpora to read; unset: all there.
        sources: corpora that lie elsewhere, as NAME=SOURCE: a file, a folder, or a dataset's
            name[:split].
    """

    raw_data_root: str = "data/raw"
    save_path: str = setting(OutputFolder(), default="data/reformatted")
    datasets: tuple[Corpus, ...] = ()
    sources: tuple[str, ...] = ()

    def where(self) -> dict[str, str]:
        """Where each corpus lies.

        Raises:
            ValueError: a corpus that is not there, or whose output is.
        """
        found = parse_sources(self.sources)
        names = [name for name in self.datasets if name not in found]
        if names or not found:
            found |= raw_sources(self.raw_data_root, names)
        for name in found:
            save = Path(self.save_path, name)
            if problem := NewFolder().problem(str(save)):
                raise ValueError(f"{save}: {problem}.")
        return found


def main(arguments: Sequence[str] | None = None) -> None:
    with command(ReformatOptions, arguments, network=True) as options:
        for name, source in options.where().items():
            print(f"Reading {name} from {source} ...", flush=True)
            print(reformat(name, source, Path(options.save_path, name)), flush=True)
