"""What the configuration of a routed model holds beside its family's."""

from __future__ import annotations

from typing import Any

# A granularity's name and its two parts: what is computed or skipped, each by a router of its own,
# and who decides.
GRANULARITIES = {
    "+".join(f"{target}_{unit}" for target in targets): (targets, unit)
    for targets in (("attn",), ("mlp",), ("block",), ("attn", "mlp"))
    for unit in ("sequence", "token")
}
GRANULARITIES["expert_token"] = ("expert",), "token"
# Of these a number of tokens can be kept exactly (``selection: top_k``).
EXACT_GRANULARITIES = ("attn_token", "mlp_token", "block_token")
CAUSAL = ("auxiliary_loss", "predictor")
NO_ROUTING = {"granularity": "attn_sequence", "layers": [], "threshold": 0.5}


class RoutedConfig:
    """What a family's configuration gains: a ``routing`` entry.

    ``granularity`` (one of ``GRANULARITIES``), ``layers`` (zero-based indices of the routed
    layers), ``threshold`` (keep when ``sigmoid(logit)`` reaches it: a number, or one per router, in
    the order of ``places``; 0 keeps and 1 skips everything), ``keys_values`` (``all`` or
    ``selected``; where tokens skip attention), ``bias`` (whether routers have one),
    ``stand_in_rank`` (of what skipped units add; none without), ``work`` (of routers that serve a
    range of budgets, the least and the most) and ``budget`` (the one that is set), and what the
    routers were trained for.

    ``selection``: ``threshold`` (without), or ``top_k``: trained to keep exactly ``capacity`` (one
    number per router) of each text's tokens, those of the largest logits, which multiply what they
    are given. The threshold is then that of the causal rule, and ``causal`` says of which logits: a
    ``predictor``'s of hidden size ``predictor_size``, or, with an ``auxiliary_loss``, the router's.

    With ``expert_token`` a unit is a token and an expert that the gate assigned it to. Kept ones
    keep their weights, or, with ``renormalize``, share those of the skipped. Or there are no
    routers, and gates choose among ``num_noop_experts`` more, which return nothing.
    """

    routing: dict[str, Any]
    num_hidden_layers: int  # the family's, as what follows
    hidden_size: int
    hidden_act: str
    num_experts_per_tok: int  # of a family of mixtures, as what follows
    output_router_logits: bool

    def __init__(self, routing: dict[str, Any] | None = None, **kwargs: Any) -> None:
        self.routing = dict(routing or NO_ROUTING)
        super().__init__(**kwargs)
        self.check_routing()

    @property
    def targets(self) -> tuple[str, ...]:
        """What is computed or skipped, each by a router of its own: a layer's ``attn``, its
        ``mlp``, both, the ``block``, or each ``expert`` of its mixture."""
        return GRANULARITIES[self.routing["granularity"]][0]

    @property
    def attention_target(self) -> str | None:
        """The target whose router decides about attention."""
        return next((target for target in self.targets if target in ("attn", "block")), None)

    @property
    def experts(self) -> int:
        """Of a layer's mixture; 0: it has none."""
        for name in ("num_local_experts", "num_experts"):
            if number := getattr(self, name, None):
                return number
        return 0

    @property
    def places(self) -> list[tuple[int, str]]:
        """Of the routers: layer and target."""
        if self.routing.get("num_noop_experts"):
            return []
        return [(layer, target) for layer in self.routing["layers"] for target in self.targets]

    @property
    def per_sequence(self) -> bool:
        """One decision per sequence rather than per token."""
        return GRANULARITIES[self.routing["granularity"]][1] == "sequence"

    @property
    def stores_selected(self) -> bool:
        """Whether a token that skips an attention keeps its key and value from others."""
        return self.routing.get("keys_values") == "selected"

    @property
    def is_exact(self) -> bool:
        """Whether the routers were trained to keep a number of tokens exactly, and multiply."""
        return self.routing.get("selection", "threshold") == "top_k"

    def capacities(self) -> dict[tuple[int, str], float]:
        """The share of a text's tokens that each exact router keeps, by its place."""
        return dict(zip(self.places, self.routing["capacity"], strict=True))

    def check_routing(self) -> None:
        """Raise ``ValueError`` for a ``routing`` entry that cannot be run."""
        routing = self.routing
        granularity, layers = routing["granularity"], routing["layers"]
        if granularity not in GRANULARITIES:
            raise ValueError(
                f"routing.granularity = {granularity!r}: must be one of {', '.join(GRANULARITIES)}."
            )
        if any(not 0 <= layer < self.num_hidden_layers for layer in layers):
            raise ValueError(
                f"routing.layers = {layers}: must be from 0 to {self.num_hidden_layers - 1}."
            )
        chooses_keys = self.attention_target is not None and not self.per_sequence
        allowed = ("all", "selected") if chooses_keys else (None,)
        if routing.get("keys_values", allowed[0]) not in allowed:
            raise ValueError(
                f"routing.keys_values = {routing['keys_values']!r}: must be "
                f"{' or '.join(map(repr, allowed))} with granularity {granularity!r}."
            )
        if not isinstance(routing.get("bias", False), bool):
            raise ValueError(f"routing.bias = {routing['bias']!r}: must be true or false.")
        rank = routing.get("stand_in_rank")
        is_whole = isinstance(rank, int) and not isinstance(rank, bool)
        if rank is not None and not (is_whole and 0 < rank <= self.hidden_size):
            raise ValueError(
                f"routing.stand_in_rank = {rank!r}: must be a whole number from 1 to "
                f"{self.hidden_size}, or null."
            )
        self._check_selection()
        self._check_experts()
        self.thresholds()
        self.work_position()

    def _check_selection(self) -> None:
        """Raise ``ValueError`` for a selection that cannot be run."""
        routing = self.routing
        selection, causal = routing.get("selection", "threshold"), routing.get("causal")
        if selection not in ("threshold", "top_k"):
            raise ValueError(f"routing.selection = {selection!r}: must be 'threshold' or 'top_k'.")
        size, is_exact = routing.get("predictor_size"), self.is_exact
        if causal not in (CAUSAL if is_exact else (None,)):
            allowed = "'auxiliary_loss' or 'predictor'" if is_exact else "null"
            raise ValueError(
                f"routing.causal = {causal!r}: must be {allowed} with selection {selection!r}."
            )
        is_count = isinstance(size, int) and not isinstance(size, bool) and size > 0
        if not (is_count if causal == "predictor" else size is None):
            allowed = "a whole number above 0" if causal == "predictor" else "null"
            raise ValueError(
                f"routing.predictor_size = {size!r}: must be {allowed} with causal {causal!r}."
            )
        if not is_exact:
            return
        if routing["granularity"] not in EXACT_GRANULARITIES:
            raise ValueError(
                f"routing.granularity = {routing['granularity']!r}: must be one of "
                f"{', '.join(EXACT_GRANULARITIES)} with selection 'top_k'."
            )
        if self.attention_target is not None and not self.stores_selected:
            raise ValueError(
                f"routing.keys_values = {routing.get('keys_values')!r}: must be 'selected' with "
                "selection 'top_k'."
            )
        for name in ("stand_in_rank", "work"):
            if routing.get(name) is not None:
                raise ValueError(
                    f"routing.{name} = {routing[name]!r}: must be null with selection 'top_k'."
                )
        capacity = routing.get("capacity")
        shares = capacity if isinstance(capacity, (list, tuple)) else ()
        if len(shares) != len(self.places) or any(not 0.0 <= share <= 1.0 for share in shares):
            raise ValueError(
                f"routing.capacity = {capacity!r}: must be a list of numbers from 0 to 1, one per "
                f"routed layer ({len(self.places)}), with selection 'top_k'."
            )

    def _check_experts(self) -> None:
        """Raise ``ValueError`` for experts' routers, or no-op experts, that cannot be run."""
        routing = self.routing
        by_expert = "expert" in self.targets
        renormalize, noops = routing.get("renormalize", False), routing.get("num_noop_experts")
        if not isinstance(renormalize, bool) or (renormalize and not by_expert):
            raise ValueError(
                f"routing.renormalize = {renormalize!r}: must be true or false, and false with "
                f"granularity {routing['granularity']!r}."
            )
        is_count = isinstance(noops, int) and not isinstance(noops, bool) and noops > 0
        if noops is not None and not (is_count and by_expert):
            raise ValueError(
                f"routing.num_noop_experts = {noops!r}: must be a whole number above 0, and null "
                "with a granularity other than 'expert_token'."
            )
        if not by_expert:
            return
        if not self.experts:
            raise ValueError(
                "routing.granularity = 'expert_token': this model's layers are no mixtures of "
                "experts; choose another."
            )
        for name in ("stand_in_rank", "budget"):
            if routing.get(name) is not None:
                raise ValueError(
                    f"routing.{name} = {routing[name]!r}: must be null with granularity "
                    "'expert_token'."
                )

    def work_position(self) -> float | None:
        """Where the budget lies in the range that the routers serve, from 0 to 1; None: they serve
        none."""
        work, budget = self.routing.get("work"), self.routing.get("budget")
        if not isinstance(work, (list, tuple)):
            return None
        low, high = work
        if not low < high:
            raise ValueError(f"routing.work = {work}: must be the least budget and the most.")
        if not low <= budget <= high:
            raise ValueError(
                f"routing.budget = {budget}: must be from {low} to {high}, the budgets that the "
                "routers were trained for."
            )
        return (budget - low) / (high - low)

    def thresholds(self) -> dict[tuple[int, str], float]:
        """Each router's threshold, by its place."""
        places, threshold = self.places, self.routing["threshold"]
        values = threshold if isinstance(threshold, list) else [threshold] * len(places)
        if len(values) != len(places) or any(not 0.0 <= value <= 1.0 for value in values):
            raise ValueError(
                f"routing.threshold = {threshold}: must be a number from 0 to 1, or a list of one "
                f"per {self.of_each} ({len(places)})."
            )
        return dict(zip(places, values, strict=True))

    @property
    def of_each(self) -> str:
        """What has a threshold of its own, for messages."""
        return "routed layer" if len(self.targets) == 1 else "router: attention and MLP of a layer"

    def window(self, layer: int) -> int | None:
        """How many tokens back a layer's attention sees, itself included; None: all of them."""
        kinds = getattr(self, "layer_types", None)
        if kinds and kinds[layer] != "sliding_attention":
            return None
        return getattr(self, "sliding_window", None)
