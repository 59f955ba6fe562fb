"""A budget of the quality benchmark, as its option says it."""

from __future__ import annotations

import math
from typing import NamedTuple

from megatron_mod.routing.scheme import Scheme

WORK = "work="


class Budget(NamedTuple):
    """What routers of a granularity may keep: a ``share`` ``of`` ``capacity`` or ``work``."""

    granularity: str
    of: str
    share: float

    @classmethod
    def parse(cls, text: str) -> Budget:
        """``attn_token:0.5``, a capacity, or ``block_token:work=0.8``.

        Raises:
            ValueError: it is something else.
        """
        granularity, _, value = text.partition(":")
        Scheme.parse(granularity)
        try:
            share = float(value.removeprefix(WORK))
        except ValueError:
            share = math.nan
        if not 0 < share <= 1:
            raise ValueError(
                f"--budgets {text}: write a granularity and a capacity above 0 and at most 1, as "
                f"attn_token:0.5, or a share of work, as block_token:{WORK}0.8."
            )
        return cls(granularity, "work" if value.startswith(WORK) else "capacity", share)
