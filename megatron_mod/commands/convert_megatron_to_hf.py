"""``megatron-mod-convert-megatron-to-hf``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from megatron_mod.commands.command import command
from megatron_mod.config.model_folder import LORA, ModelFolder, check_base
from megatron_mod.config.options import Options
from megatron_mod.config.rules import InputFolder, NewFolder, Size, setting


@dataclass(frozen=True)
class ToHuggingFace(Options):
    """Write a Megatron checkpoint, with the routers trained on it if any, as a Hugging Face folder.

    Args:
        load: a folder of convert_hf_to_megatron.py, a training's checkpoint.save folder (its latest
            step), or one of its step folders.
        save: new folder for the Hugging Face model.
        base: where a run's base checkpoint is now, if it was moved.
        dtype: change the weights' dtype; unset: keep each one's.
        max_shard_size: largest file, such as 5GB, 500MB or 2GiB.
        routers: export a base with these routers: a folder of the published Router-Tuning code, or
            a training run.
        routers_only: write the routers alone, as the published Router-Tuning code saves them.
        lora: what becomes of a run's LoRA adapters: `merge` them into the weights, or put them
            `apart`, as a PEFT adapter in the folder `lora` of the export, whose weights are then
            the base's; unset: merge.
    """

    load: str = setting(ModelFolder())
    save: str = setting(NewFolder())
    base: str | None = setting(InputFolder(), default=None)
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    max_shard_size: str = setting(Size(), default="5GB")
    routers: str | None = setting(InputFolder(), default=None)
    routers_only: bool = False
    lora: Literal["merge", "apart"] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_base(self.base, self.load)
        if self.routers_only and (self.routers or self.dtype or self.lora):
            raise ValueError(
                "--routers-only writes --load's routers as they are: no --routers, no --dtype, no "
                "--lora."
            )


def main(arguments: Sequence[str] | None = None) -> None:
    with command(ToHuggingFace, arguments) as options:
        from megatron_mod.conversion.convert import export_routers, megatron_to_hf
        from megatron_mod.parallel import topology

        with topology.single_process():
            if options.routers_only:
                export_routers(options.load, options.save, base=options.base)
                print(f"Wrote {options.save}: routers alone, for the published code or --routers.")
                return
            megatron_to_hf(
                options.load,
                options.save,
                base=options.base,
                dtype=options.dtype,
                max_shard_bytes=Size.bytes_of(options.max_shard_size),
                routers_path=options.routers,
                lora=options.lora,
            )
        print(f"Wrote {options.save}: load it with AutoModelForCausalLM.from_pretrained.")
        if options.lora == "apart":
            print(
                f"Its adapters are in {Path(options.save, LORA)}: PeftModel.from_pretrained(model, "
                "that folder)."
            )
