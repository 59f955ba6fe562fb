"""What one decision of a router covers, and for whom it is made."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

Granularity = Literal[
    "attn_sequence", "attn_token", "mlp_sequence", "mlp_token", "block_sequence", "block_token"
]
GRANULARITIES: tuple[str, ...] = get_args(Granularity)


class Place(NamedTuple):
    """Where a router sits: a layer, by its global index, and what of it the router decides about,
    its ``attn``, its ``mlp`` or the ``block``."""

    layer: int
    target: str


@dataclass(frozen=True)
class Scheme:
    """``target`` is what is computed or skipped, a layer's ``attn``, its ``mlp`` or the whole
    ``block``; ``unit`` is who decides, a whole ``sequence`` or each ``token``.

    Its name, in settings and on disk, is a ``Granularity``.
    """

    target: str
    unit: str

    @classmethod
    def parse(cls, granularity: str) -> Scheme:
        """The scheme of a name.

        Raises:
            ValueError: there is none of that name.
        """
        if granularity not in GRANULARITIES:
            raise ValueError(
                f"router.granularity = {granularity!r}: must be one of {', '.join(GRANULARITIES)}."
            )
        return cls(*granularity.split("_"))

    def __str__(self) -> str:
        return f"{self.target}_{self.unit}"

    @property
    def per_sequence(self) -> bool:
        """One decision per sequence rather than per token."""
        return self.unit == "sequence"

    @property
    def covers_attention(self) -> bool:
        return self.target != "mlp"

    @property
    def covers_mlp(self) -> bool:
        return self.target != "attn"

    @property
    def chooses_keys(self) -> bool:
        """Whether kept tokens may attend to all tokens or to kept ones only."""
        return self.covers_attention and not self.per_sequence
