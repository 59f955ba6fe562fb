"""``megatron-mod-compare-logits``."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_mod.commands.command import command, ranks
from megatron_mod.config.model_folder import HuggingFaceFolder, ModelFolder, check_base
from megatron_mod.config.ranks import RankOptions
from megatron_mod.config.rules import OutputFile, setting


@dataclass(frozen=True)
class Comparison(RankOptions):
    """Compare the logits of Megatron checkpoints with those of Hugging Face folders, in fp32.

        torchrun --standalone --nproc_per_node N tools/compare_logits.py --load DIR ... \\
            --hf-path DIR ...

    Prints, for each pair, the largest logit difference over the largest logit.

    Args:
        load: base checkpoints or training runs.
        hf_path: as many Hugging Face folders.
        json: also write the figures to this file.
    """

    load: tuple[str, ...] = setting(ModelFolder())
    hf_path: tuple[str, ...] = setting(HuggingFaceFolder())
    json: str | None = setting(OutputFile(), default=None)

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.load) != len(self.hf_path):
            raise ValueError(
                f"--load names {len(self.load)} folders and --hf-path {len(self.hf_path)}; give as "
                "many of each."
            )
        check_base(self.base, *self.load)


def main(arguments: Sequence[str] | None = None) -> None:
    with command(Comparison, arguments) as options, ranks(options) as topology:
        from megatron_mod.evaluation.parity import compare
        from megatron_mod.parallel.topology import print_once, write_once

        figures = []
        for load, hf_path in zip(options.load, options.hf_path, strict=True):
            difference = compare(load, hf_path, topology, base=options.base)
            figures.append({"load": load, "hf_path": hf_path, "max_rel": difference})
            print_once(f"{load} and {hf_path}: largest relative difference {difference:.2e}")
        if options.json:
            write_once(Path(options.json), json.dumps(figures, indent=2) + "\n")
