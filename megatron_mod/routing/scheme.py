"""What one decision of a router covers, and for whom it is made."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

Granularity = Literal[
    "attn_sequence", "attn_token", "mlp_sequence", "mlp_token", "block_sequence", "block_token",
    "attn_sequence+mlp_sequence", "attn_token+mlp_token", "expert_token",
]  # fmt: skip
Selection = Literal["threshold", "top_k", "random"]
Causal = Literal["auxiliary_loss", "predictor"]
GRANULARITIES: tuple[str, ...] = get_args(Granularity)
EXPERT = "expert"  # a target: each of the experts of a layer that is a mixture of them
# Those that any model can have.
OF_ANY_MODEL = tuple(name for name in GRANULARITIES if not name.startswith(EXPERT))


class Place(NamedTuple):
    """Where a router sits: a layer, by its global index, and what of it the router decides about,
    its ``attn``, its ``mlp``, the ``block``, or each ``expert``."""

    layer: int
    target: str


@dataclass(frozen=True)
class Scheme:
    """``targets`` are what is computed or skipped, each by a router of its own: a layer's ``attn``,
    its ``mlp``, both of these, or the whole ``block`` as one; ``unit`` is who decides, a whole
    ``sequence`` or each ``token``. Of a mixture of experts it may be each ``expert``: a unit is
    then a token with one of the experts that the model's gate sends it to.

    Its name, in settings and on disk, is a ``Granularity``.
    """

    targets: tuple[str, ...]
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
        parts = [part.split("_") for part in granularity.split("+")]
        return cls(tuple(target for target, _ in parts), parts[0][1])

    def __str__(self) -> str:
        return "+".join(f"{target}_{self.unit}" for target in self.targets)

    def places(self, layer: int) -> tuple[Place, ...]:
        """Of a routed layer's routers."""
        return tuple(Place(layer, target) for target in self.targets)

    def label(self, place: Place) -> int | str:
        """What a place is called among those of this scheme, for a person or in JSON: by its layer,
        and where a layer has several routers by ``LAYER.TARGET``."""
        return place.layer if len(self.targets) == 1 else f"{place.layer}.{place.target}"

    @property
    def per_sequence(self) -> bool:
        """One decision per sequence rather than per token."""
        return self.unit == "sequence"

    @property
    def per_expert(self) -> bool:
        """A decision for each pair of a token and an expert that it is sent to."""
        return EXPERT in self.targets

    def units(self, *, sequences: int, tokens: int, top_k: int) -> int:
        """How many decisions each router makes on so many sequences and tokens, each of which is
        sent to ``top_k`` experts."""
        if self.per_expert:
            return tokens * top_k
        return sequences if self.per_sequence else tokens

    @property
    def covers_attention(self) -> bool:
        return self.attention_target is not None

    @property
    def covers_mlp(self) -> bool:
        return self.mlp_target is not None

    @property
    def attention_target(self) -> str | None:
        """The target whose router decides about a layer's attention, if one does."""
        return next((target for target in self.targets if target in ("attn", "block")), None)

    @property
    def mlp_target(self) -> str | None:
        """The target whose router decides about a layer's MLP, if one does."""
        return next((target for target in self.targets if target in ("mlp", "block")), None)

    @property
    def chooses_keys(self) -> bool:
        """Whether kept tokens may attend to all tokens or to kept ones only."""
        return self.covers_attention and not self.per_sequence
