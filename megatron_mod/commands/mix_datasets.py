"""``megatron-mod-mix-datasets``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_mod.commands.command import command
from megatron_mod.config import rules
from megatron_mod.config.options import Options
from megatron_mod.config.rules import InputFolder, NewFolder, setting
from megatron_mod.data.mixing import DEFAULT_PORTIONS, SEED, mix, parse_portions


@dataclass(frozen=True)
class MixOptions(Options):
    """Mix reformatted corpora into one shuffled file, each in its portion.

    Writes SAVE_PATH/data.jsonl.

    Args:
        reformatted_dir: what reformat_datasets.py wrote.
        save_path: new folder.
        portions: the sub-folders to mix as NAME=PORTION, how many times each is taken; 2.9 is twice
            and 90 percent more; unset: those that are there of vicuna_sharegpt=2.9
            evol_instruct=1.0 slim_orca=1.0 meta_math_qa=1.0 evol_code_alpaca=1.0.
        seed: of the drawing and of the order.
    """

    reformatted_dir: str = setting(InputFolder(), default="data/reformatted")
    save_path: str = setting(NewFolder(), default="data/mixed")
    portions: tuple[str, ...] = ()
    seed: int = setting(rules.SEED, default=SEED)

    def __post_init__(self) -> None:
        super().__post_init__()
        parse_portions(self.portions)


def main(arguments: Sequence[str] | None = None) -> None:
    with command(MixOptions, arguments) as options:
        portions = parse_portions(options.portions) or None
        report = mix(
            options.reformatted_dir, options.save_path, portions=portions, seed=options.seed
        )
        for name in set(portions or DEFAULT_PORTIONS) - set(report):
            print(f"{name}: not there, so not in the mix")
        for name, part in report.items():
            print(f"{name}: {part['read']} records x {part['portion']} = {part['written']}")
        print(f"Wrote {options.save_path}/data.jsonl: {sum(p['written'] for p in report.values())}")
