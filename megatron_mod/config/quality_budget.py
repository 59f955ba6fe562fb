"""A budget of the quality benchmark, as its option says it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from megatron_mod.routing.scheme import Scheme

WORK = "work="


class Budget(NamedTuple):
    """What routers of a granularity may keep: ``shares`` ``of`` ``capacity`` or ``work``. Several
    shares of work are budgets that the same routers serve, trained for the range of them."""

    granularity: str
    of: str
    shares: tuple[float, ...]

    @classmethod
    def parse(cls, text: str) -> Budget:
        """``attn_token:0.5``, a capacity; ``block_token:work=0.8``; ``block_token:work=0.7,0.9``.

        Raises:
            ValueError: it is something else.
        """
        granularity, _, value = text.partition(":")
        Scheme.parse(granularity)
        listed = value.removeprefix(WORK)
        is_work = listed != value
        try:
            shares = tuple(sorted(map(float, listed.split(",") if is_work else [listed])))
        except ValueError:
            shares = (math.nan,)
        if not all(0 < share <= 1 for share in shares) or len(set(shares)) < len(shares):
            raise ValueError(
                f"--budgets {text}: write a granularity and a capacity above 0 and at most 1, as "
                f"attn_token:0.5, or a share of work, as block_token:{WORK}0.8, or several that "
                f"the same routers serve, as block_token:{WORK}0.7,0.8,0.9."
            )
        return cls(granularity, "work" if is_work else "capacity", shares)

    @property
    def range(self) -> tuple[float, float] | None:
        """The least and the most of several shares of work."""
        several = self.of == "work" and len(self.shares) > 1
        return (self.shares[0], self.shares[-1]) if several else None

    @property
    def trained_for(self) -> float | list[float]:
        """What a training is asked for: a range, or the least share, from which it is calibrated
        for others."""
        return list(self.range) if self.range else self.shares[0]

    @property
    def label(self) -> str:
        """Tells its training from others of the granularity."""
        prefix, ends = WORK if self.of == "work" else "", self.range or self.shares[:1]
        return prefix + "-".join(f"{end:g}" for end in ends)


def trainings(budgets: Sequence[Budget]) -> list[Budget]:
    """What is trained for these: a granularity's capacities by one training, and shares of work by
    one for each range, or for each that stands alone."""
    shares: dict[tuple, set[float]] = {}
    for budget in budgets:
        training = budget.label if budget.of == "work" else ""
        shares.setdefault((budget.granularity, budget.of, training), set()).update(budget.shares)
    return [
        Budget(granularity, of, tuple(sorted(own))) for (granularity, of, _), own in shares.items()
    ]
