"""What a user wants a routed model calibrated for, and how."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Literal

from megatron_mod.config.evaluation import check_load
from megatron_mod.config.model_folder import ModelFolder, is_megatron
from megatron_mod.config.options import option
from megatron_mod.config.ranks import RankOptions
from megatron_mod.config.rules import (
    AT_LEAST_0,
    COUNT,
    SHARE,
    InputFile,
    NewFolder,
    Percentage,
    Range,
    setting,
)

_BUDGETS = ("capacity", "speedup", "max_perplexity_increase", "work")


@dataclass(frozen=True)
class BudgetRequest(RankOptions):
    """Set a routed model's thresholds so that it meets a budget, and show what every budget costs.

        python tools/calibrate_router.py --load EXPORT_DIR --data FILE --capacity 0.5
        python tools/calibrate_router.py --load EXPORT_DIR --data FILE --work 0.75
        python tools/calibrate_router.py --load EXPORT_DIR --data FILE --speedup 1.2 --save NEW_DIR
        python tools/calibrate_router.py --load EXPORT_DIR --data FILE --max-perplexity-increase 1%
        torchrun --standalone --nproc_per_node N tools/calibrate_router.py --load RUN_DIR \\
            --data FILE --capacity 0.5 --tensor T --pipeline P

    The thresholds go into the folder itself, or into a copy (--save); beside them calibration.json
    and calibration.png. Training and its checkpoints' other files are not touched. Exactly one of
    the four budgets is given.

    Args:
        load: an export, or a training run (not for --max-perplexity-increase).
        data: conversations (.jsonl, ...) or a text, of the kind the model will see.
        capacity: share of the routed units to keep, 0 to 1.
        speedup: of the counted work over the dense model's, above 1: the same as work 1 / speedup.
        max_perplexity_increase: over the dense model on this data, such as 1%.
        work: counted, as a share of the dense model's, above 0 and at most 1; shared out between
            routers at one price per operation where that loses less than one threshold for all.
        save: new folder for the calibrated copy; unset: change --load itself.
        scope: hold every `layer` to the capacity, or the mean of the `model` by one threshold;
            unset: as trained. With a work or a speedup, what its prices are compared with.
        curve: capacities to show beside the budget's.
        samples: so many of the data's samples, evenly spaced; 0: all.
        pooling: what a sequence's decision sees: its `prompt` (the default), or `all` of a text.
        batch_size: texts run together.
        max_length: most tokens of a text; unset: 2048, or what the model has positions for.
        dtype: what weights and activations are held in.

    Raises:
        ValueError: a value out of range, or a combination that cannot be.
    """

    load: str = setting(ModelFolder())
    data: str = setting(InputFile())
    capacity: float | None = setting(SHARE, default=None)
    speedup: float | None = setting(Range(above=1), default=None)
    max_perplexity_increase: str | None = setting(Percentage(), default=None)
    work: float | None = setting(Range(above=0, most=1), default=None)
    save: str | None = setting(NewFolder(), default=None)
    scope: Literal["layer", "model"] | None = None
    curve: tuple[float, ...] = setting(
        SHARE, default=(0.9, 0.75, 0.6, 0.5, 0.4, 0.25), may_be_empty=True
    )
    samples: int = setting(AT_LEAST_0, default=32)
    pooling: Literal["prompt", "all"] | None = None
    batch_size: int = setting(COUNT, default=1)
    max_length: int | None = setting(COUNT, default=None)
    dtype: Literal["float32", "bfloat16"] = "float32"

    def __post_init__(self) -> None:
        given = [name for name in _BUDGETS if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(
                f"{' '.join(map(option, given)) or 'no budget'}: give exactly one of "
                f"{' '.join(map(option, _BUDGETS))}."
            )
        super().__post_init__()
        check_load(self)
        if is_megatron(self.load) and self.max_perplexity_increase is not None:
            raise ValueError(
                f"{option(given[0])}: is for exports; give --capacity, or export {self.load} first "
                "(tools/convert_megatron_to_hf.py)."
            )

    def describe(self) -> str:
        """The budget as the user gave it."""
        (name,) = (name for name in _BUDGETS if getattr(self, name) is not None)
        return f"{option(name)} {getattr(self, name)}"

    def to_dict(self) -> dict:
        return {**asdict(self), "curve": list(self.curve)}
