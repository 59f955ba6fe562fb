"""``megatron-mod-convert-hf-to-megatron``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from megatron_mod.commands.command import command
from megatron_mod.config.model_folder import HuggingFaceFolder
from megatron_mod.config.options import Options
from megatron_mod.config.rules import InputFolder, NewFolder, setting


@dataclass(frozen=True)
class ToMegatron(Options):
    """Write a local Hugging Face model folder as a Megatron checkpoint for any TP and PP.

    Args:
        hf_path: local Hugging Face folder (safetensors).
        save: new folder for the Megatron checkpoint.
        dtype: change the weights' dtype; unset: keep each one's.
        routers: routers to put beside the weights: a folder of the published Router-Tuning code, or
            a training run.
    """

    hf_path: str = setting(HuggingFaceFolder())
    save: str = setting(NewFolder())
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    routers: str | None = setting(InputFolder(), default=None)


def main(arguments: Sequence[str] | None = None) -> None:
    with command(ToMegatron, arguments) as options:
        from megatron_mod.conversion.convert import hf_to_megatron
        from megatron_mod.parallel import topology

        with topology.single_process():
            hf_to_megatron(
                options.hf_path, options.save, dtype=options.dtype, routers_path=options.routers
            )
        print(f"Wrote {options.save}: set model.checkpoint to it, at any TP and PP.")
