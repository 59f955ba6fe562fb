"""``megatron-mod-benchmark-inference``."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from megatron_mod.commands.command import command
from megatron_mod.config.model_folder import HuggingFaceFolder
from megatron_mod.config.options import Options, option
from megatron_mod.config.rules import COUNT, SHARE, OutputFile, setting


@dataclass(frozen=True)
class InferenceBenchmark(Options):
    """Time prefill and decode of an export beside its original, and what share of the ideal is
    reached.

        python tools/benchmark/inference.py --dense HF_DIR --routed EXPORT_DIR [--capacity 0.5]
        python tools/benchmark/inference.py --shapes llama3-8b --granularity attn_token \\
            --capacity 0.5

    The two models take turns, who is first changes every turn, a first round is not counted,
    figures are medians. Beside each speed-up stands the ideal one, of the work that the decisions
    of the timed calls leave (floating-point operations of a prefill; bytes of weights, keys and
    values that a decode step reads), the share of it that is reached, and the share of the saving,
    (1 - routed / dense) / (1 - 1 / ideal), which is stricter. Prompts are pieces of Python's
    documentation, or random ids with --shapes.

    Args:
        dense: Hugging Face folder.
        routed: an export of it.
        shapes: random weights in their place.
        granularity: with --shapes.
        keys_values: with --shapes.
        capacity: share of the prompts' units to keep; unset: as the export's thresholds have it.
        batches: sequences.
        contexts: tokens.
        repetitions: prefills of each model.
        new_tokens: decode steps of each model.
        dtype: what weights and activations are held in; unset: bfloat16 on a GPU, else float32.
        json: also write machine and rows to this file.
    """

    dense: str | None = setting(HuggingFaceFolder(), default=None)
    routed: str | None = setting(HuggingFaceFolder(), default=None)
    shapes: Literal["llama3-8b", "llama3-70b", "llama3-405b", "smollm2-135m", "tiny"] | None = None
    granularity: (
        Literal[
            "attn_sequence",
            "attn_token",
            "mlp_sequence",
            "mlp_token",
            "block_sequence",
            "block_token",
        ]
        | None
    ) = None
    keys_values: Literal["all", "selected"] | None = None
    capacity: float | None = setting(SHARE, default=None)
    batches: tuple[int, ...] = setting(COUNT, default=(1, 4, 16))
    contexts: tuple[int, ...] = setting(COUNT, default=(128, 512, 2048))
    repetitions: int = setting(COUNT, default=5)
    new_tokens: int = setting(COUNT, default=24)
    dtype: Literal["float32", "bfloat16"] | None = None
    json: str | None = setting(OutputFile(), default=None)

    def __post_init__(self) -> None:
        super().__post_init__()
        if bool(self.dense) != bool(self.routed):
            given, other = ("dense", "routed") if self.dense else ("routed", "dense")
            raise ValueError(
                f"--{given} {getattr(self, given)}: is timed beside another model; add --{other} "
                "DIR."
            )
        if bool(self.shapes) == bool(self.dense):
            raise ValueError(
                f"--shapes {self.shapes}, --dense {self.dense}: give either --dense HF_DIR "
                "--routed EXPORT_DIR or --shapes NAME."
            )
        if self.shapes:
            self._check_shapes()
        else:
            for name in ("granularity", "keys_values"):
                if value := getattr(self, name):
                    raise ValueError(
                        f"{option(name)} {value}: an export has its own; leave it out, or use "
                        "--shapes."
                    )

    def _check_shapes(self) -> None:
        for name in ("granularity", "capacity"):
            if getattr(self, name) is None:
                raise ValueError(
                    f"--shapes {self.shapes}: its routers are random, so what they do must be "
                    f"said; add {option(name)}."
                )
        if self.keys_values and self.granularity not in ("attn_token", "block_token"):
            raise ValueError(
                f"--keys-values {self.keys_values}: has no meaning for --granularity "
                f"{self.granularity}; leave it out, or choose attn_token or block_token."
            )


def main(arguments: Sequence[str] | None = None) -> None:
    with command(InferenceBenchmark, arguments) as options:
        from megatron_mod.benchmark.inference import measure

        settings = dataclasses.asdict(options)
        save = settings.pop("json")
        report = measure(**settings)
        if save:
            Path(save).write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
