"""What a user wants a routed model calibrated for, and how."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass
from pathlib import Path

from megatron_mod.evaluation.calibration import Calibration, Point
from megatron_mod.evaluation.curve import CAPACITIES
from megatron_mod.evaluation.request import check_load, is_megatron

FAR = 0.1  # from a capacity that was asked for


@dataclass(frozen=True)
class BudgetRequest:
    """The settings of one calibration; exactly one of the three budgets is set.

    Args:
        load: an export, or a training run (``capacity`` only).
        data: conversations (``.jsonl``, ...) or a text, of the kind the model will see.
        capacity: share of the routed units to keep, from 0 to 1.
        speedup: of the counted work, above 1.
        max_perplexity_increase: over the dense model, such as ``1%``.
        save: new folder for the calibrated model; ``None`` changes ``load`` itself.
        scope: ``layer`` or ``model``, as in training (``None``: as trained).
        curve: capacities to show beside the budget's.
        samples: so many of the data's samples, evenly spaced (0: all).
        pooling: what a sequence's decision sees: its ``prompt`` (default), or ``all`` of a text.
        tensor, pipeline: parallel degrees, of a training run.

    Raises:
        ValueError: a value out of range, or a combination that cannot be.
    """

    load: str
    data: str
    capacity: float | None = None
    speedup: float | None = None
    max_perplexity_increase: str | None = None
    save: str | None = None
    scope: str | None = None
    curve: tuple[float, ...] = CAPACITIES
    samples: int = 32
    pooling: str | None = None
    batch_size: int = 1
    max_length: int | None = None
    dtype: str = "float32"
    tensor: int = 1
    pipeline: int = 1

    def __post_init__(self) -> None:
        if not Path(self.data).is_file():
            raise ValueError(f"--data {self.data}: no such file; give conversations or a text.")
        for name, values in (("capacity", [self.capacity]), ("curve", self.curve)):
            for value in values:
                if value is not None and not 0 <= value <= 1:
                    raise ValueError(f"--{name} {value:g}: must be from 0 (skip all) to 1.")
        if self.speedup is not None and self.speedup <= 1:
            raise ValueError(f"--speedup {self.speedup:g}: must be above 1, the dense model's.")
        if self.max_perplexity_increase is not None:
            parse_percentage(self.max_perplexity_increase)
        if self.samples < 0:
            raise ValueError(f"--samples {self.samples}: must be at least 1, or 0 for all.")
        if self.save and Path(self.save).exists():
            raise ValueError(
                f"--save {self.save}: already exists; remove it or give another output folder."
            )
        check_load(self.load, tensor=self.tensor, pipeline=self.pipeline)
        if is_megatron(self.load) and self.capacity is None:
            name = "speedup" if self.speedup else "max-perplexity-increase"
            raise ValueError(
                f"--{name}: is for exports; give --capacity, or export {self.load} first "
                "(tools/convert_megatron_to_hf.py)."
            )

    def find(self, calibration: Calibration) -> Point:
        """The point that meets the budget.

        Raises:
            ValueError: none does.
        """
        if self.capacity is not None:
            point = calibration.at_capacity(self.capacity)
            if abs(point.mean_capacity - self.capacity) > max(FAR, calibration.unit):
                raise ValueError(
                    f"--capacity {self.capacity:g}: the nearest that thresholds reach on this data "
                    f"is {point.mean_capacity:.3f}, because too many of the routers' scores are "
                    "equal; train the routers, or give other data or more --samples."
                )
            return point
        if self.speedup is not None:
            return calibration.at_speedup(self.speedup)
        increase = parse_percentage(self.max_perplexity_increase)
        return calibration.at_perplexity(calibration.dense.perplexity * (1 + increase))

    def describe(self) -> str:
        """The budget as the user gave it."""
        for name in ("capacity", "speedup", "max_perplexity_increase"):
            if (value := getattr(self, name)) is not None:
                return f"--{name.replace('_', '-')} {value}"
        raise AssertionError

    def to_dict(self) -> dict:
        return {**asdict(self), "curve": list(self.curve)}


def parse_percentage(text: str) -> float:
    """0.01 of ``1%``.

    Raises:
        ValueError: not a percentage from 0 up.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*%", text.strip())
    if not match:
        raise ValueError(
            f"--max-perplexity-increase {text}: write a percentage from 0 up, such as 1%."
        )
    return float(match[1]) / 100
