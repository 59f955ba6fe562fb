"""``megatron-mod-compare-logits``."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from megatron_mod.commands.command import command, ranks
from megatron_mod.config.model_folder import HuggingFaceFolder, ModelFolder, check_base
from megatron_mod.config.ranks import RankOptions
from megatron_mod.config.rules import AT_LEAST_0, OutputFile, setting
from megatron_mod.process import is_first_rank

DIFFERENT = 1  # exit status


@dataclass(frozen=True)
class Comparison(RankOptions):
    """Compare the logits of Megatron checkpoints with those of Hugging Face folders, in fp32.

        torchrun --standalone --nproc_per_node N tools/compare_logits.py --load DIR ... \\
            --hf-path DIR ...

    Prints, for each pair, the largest logit difference over the largest logit, and exits with
    status 1 if one is larger than the tolerance.

    Args:
        load: base checkpoints or training runs.
        hf_path: as many Hugging Face folders.
        json: also write the figures to this file.
        tolerance: largest relative difference that passes; unset: 1e-4, or eight steps of the
            coarser dtype where the two folders' weights differ in it.
        trust_remote_code: run the code that a Hugging Face folder brings (an export needs no
            trust).
        fp8: run Megatron's side with Transformer Engine in bfloat16, its products in FP8, to see
            what these do to the logits (as trainings have them, model.fp8); tolerance is then
            unset a step of E4M3, 0.125.
    """

    load: tuple[str, ...] = setting(ModelFolder())
    hf_path: tuple[str, ...] = setting(HuggingFaceFolder())
    json: str | None = setting(OutputFile(), default=None)
    tolerance: float | None = setting(AT_LEAST_0, default=None)
    trust_remote_code: bool = False
    fp8: Literal["hybrid", "e4m3"] | None = None

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

        figures, faults = [], []
        for load, hf_path in zip(options.load, options.hf_path, strict=True):
            difference, rounding = compare(
                load,
                hf_path,
                topology,
                base=options.base,
                fp8=options.fp8,
                trust_remote_code=options.trust_remote_code,
            )
            figures.append({"load": load, "hf_path": hf_path, "max_rel": difference})
            print_once(f"{load} and {hf_path}: largest relative difference {difference:.2e}")
            tolerance = rounding if options.tolerance is None else options.tolerance
            if difference > tolerance:
                faults.append(
                    f"error: {load} and {hf_path} differ by {difference:.2e}, more than the "
                    f"{tolerance:.2e} of rounding (--tolerance): they are not the same model."
                )
        if options.json:
            write_once(Path(options.json), json.dumps(figures, indent=2) + "\n")
        if faults and is_first_rank():
            print(*faults, sep="\n", file=sys.stderr, flush=True)
    if faults:
        sys.exit(DIFFERENT)
