"""The section ``router`` of a training's settings."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megatron_mod.config.rules import AT_LEAST_0, COUNT, SHARE, Range, setting
from megatron_mod.routing.config import (
    NO_ROUTERS,
    Layers,
    RoutingConfig,
    default_rank,
    predictor_size,
    resolve_capacity,
    resolve_layers,
)
from megatron_mod.routing.scheme import Causal, Granularity, Scheme, Selection

DEFAULT_CAPACITY = 0.5
CAUSAL_LOSS_WEIGHT = 0.01
# What is unset, where a threshold decides and where a number of tokens is kept exactly.
_THRESHOLD = {
    "capacity_warmup_fraction": 0.5, "bias": True, "init": "importance", "stand_in": "linear",
    "training_compute": "dense",
}  # fmt: skip
_EXACT = {
    "capacity_warmup_fraction": 0.0, "bias": False, "stand_in": "none", "training_compute": "sparse"
}  # fmt: skip


@dataclass
class RouterConfig:
    """The routers: where they sit, how they decide, what capacity they are held to.

    Args:
        granularity: what one decision covers: a layer's attention, its MLP or the whole block, for
            one sequence or one token (the units of this section); or attention and MLP apart, each
            with a router and a stand-in of its own (`attn_token+mlp_token`); or, in a model of
            experts, one expert for one token that the gate sends to it (`expert_token`).
        layers: routed layers: `all`; `{deepest: n}`, the n deepest but the last; `{every: n,
            offset: k}`, every n-th from index k on (offset defaults to n - 1); or a list of
            zero-based indices; `[]`: none, where adapters train alone (train.trainable: lora).
        capacity: target share of units that keep a layer, above 0 and at most 1; one number, or
            one per router (of a layer that has two, its attention's first); unset: 0.5, or what
            router.work leaves.
        work: in its place, the share of the dense model's operations (a prefill's, head included,
            at the training data's lengths) that may remain, above 0 and at most 1: what each router
            keeps of that is found in training, at a price per operation. A list of two, the least
            and the most, trains routers that serve all budgets between: each step draws one, low
            ones more often, and `model.set_work` of the export sets any.
        selection: which units are kept. `threshold`: those whose score reaches one; capacity is
            held on average, over the data. `top_k` (Mixture-of-Depths): of each document's n tokens
            the `capacity * n` with the largest scores, exactly; what they are given is multiplied
            by their score, and they attend to each other. `random`: as many, drawn by lot, to
            compare with. Both for attn_token, mlp_token and block_token.
        causal: with `top_k`, what says without later tokens whether one is kept, so that text can
            be generated: a small `predictor` (the default), which learns from the router's input
            and costs the language model nothing, or the router itself, whose scores an
            `auxiliary_loss` (binary cross entropy) draws to either side of the threshold.
        causal_loss_weight: of the auxiliary loss, above 0; unset: 0.01.
        scope: `layer` holds every layer to its target, `model` only their mean, so that
            important layers may stay on.
        capacity_loss_weight: weight of the penalty on capacity above target, above 0; or `auto`: a
            price of each kept unit, found during training, that needs no tuning.
        capacity_warmup_fraction: share of the steps, the first ones, over which the target falls
            from 1 to `capacity` or `work`; 0 to 1; unset: 0.5, or 0 with a selection of `top_k` or
            `random`.
        bias: give every router one, which follows the scores: after each step it is set so that
            the step's units would have been kept to the target, and at the end so that the last
            samples are. Without, as published, nothing but the penalty holds the capacity. With
            `top_k` and `random` it is a part of the score like any other, and starts at 1, where a
            model that was dense is still itself. Unset: yes with `threshold`, else no.
        init: where routers start that are not given (model.routers): at the `importance` of their
            layers, the cost of leaving each out, measured on the first samples (the default); or at
            `zeros`. With `top_k` and `random` they start at small random numbers.
        stand_in: what a skipped unit adds: `none`, nothing; `linear` (the default with `threshold`,
            but for experts, which have none), a small affine map of what the router reads, solved
            in closed form on the first samples, unless the routers that training starts from have
            them.
        stand_in_rank: rank of that map, at least 1; unset: 32 for attention alone, 64 for MLPs
            and blocks, or half the hidden size where that is less.
        stand_in_tokens: tokens it is solved on, at least 1; unset: 16384.
        stand_in_lr: peak learning rate of stand-ins that train (train.trainable), above 0; unset:
            a tenth of optimizer.lr, which is the routers'.
        threshold: a unit keeps a layer when sigmoid(logit) is at least this; between 0 and 1.
        pooling: tokens a sequence's decision averages over: `prompt` (the default) those before
            the first label, what a generation's prefill sees; `all` every token but padding.
        keys_values: with tokens that skip attention, whose keys and values kept tokens attend to:
            `all` (the default with `threshold`, as published) or those of `selected` tokens only.
        training_compute: `dense` (the default with `threshold`) computes skipped units too, for the
            full straight-through gradient; `sparse` skips them in training as well, and their
            routers hear from the capacity penalty only; with `top_k` and `random`, where scores are
            part of the output, there is nothing else to hear.
        renormalize: with expert_token, give the experts that are left to a token the weight of
            those that are skipped, in proportion to their own; else what a skipped expert would
            have added is dropped, as published.
        num_noop_experts: with expert_token, in the place of routers (integrated
            Mixture-of-Depths-and-Experts): so many experts, at least 1, that return nothing, among
            which the gate of a routed layer chooses as among its own. Nothing holds a capacity: the
            load-balancing loss counts them too. Needs train.trainable: all; unset: none.
        check_decisions_interval: steps between checks that all tensor-parallel ranks decide alike
            (a debugging aid, one host synchronisation per routed layer); 0: never.
    """

    granularity: Granularity = "attn_token"
    layers: Layers = setting(AT_LEAST_0, default={"deepest": 16})
    capacity: float | list[float] | None = setting(Range(above=0, most=1), default=None)
    work: float | list[float] | None = setting(Range(above=0, most=1), default=None)
    selection: Selection = "threshold"
    causal: Causal | None = None
    causal_loss_weight: float | None = setting(Range(above=0), default=None)
    scope: Literal["layer", "model"] = "model"
    capacity_loss_weight: float | Literal["auto"] = setting(
        Range(
            above=0,
            why=", or nothing holds the capacity; to train without a budget set router.capacity "
            "to 1.0",
        ),
        default="auto",
    )
    capacity_warmup_fraction: float | None = setting(SHARE, default=None)
    bias: bool | None = None
    init: Literal["importance", "zeros"] | None = None
    stand_in: Literal["none", "linear"] | None = None
    stand_in_rank: int | None = setting(COUNT, default=None)
    stand_in_tokens: int | None = setting(COUNT, default=None)
    stand_in_lr: float | None = setting(Range(above=0), default=None)
    threshold: float = setting(
        Range(above=0, below=1, why=" (0 keeps everything, 1 nothing)"), default=0.5
    )
    pooling: Literal["all", "prompt"] | None = None
    keys_values: Literal["all", "selected"] | None = None
    training_compute: Literal["dense", "sparse"] | None = None
    renormalize: bool = False
    num_noop_experts: int | None = setting(COUNT, default=None)
    check_decisions_interval: int = setting(AT_LEAST_0, default=0)

    def __post_init__(self) -> None:
        decides = self.layers != [] and self.num_noop_experts is None
        if self.capacity is None and self.work is None and decides:
            self.capacity = DEFAULT_CAPACITY
        by_threshold = self.selection == "threshold" and self.num_noop_experts is None
        defaults: dict[str, object] = _THRESHOLD if by_threshold else _EXACT
        if Scheme.parse(self.granularity).per_expert:
            defaults = {**defaults, "stand_in": "none"}
        for name, value in defaults.items():
            if getattr(self, name) is None:
                setattr(self, name, value)
        if self.selection == "top_k":
            self.causal = self.causal or "predictor"
            if self.causal == "auxiliary_loss" and self.causal_loss_weight is None:
                self.causal_loss_weight = CAUSAL_LOSS_WEIGHT

    def resolve(self, *, num_layers: int, hidden_size: int, num_experts: int = 1) -> RoutingConfig:
        """These settings for a model of ``num_layers`` layers, each of ``num_experts`` MLPs. With
        ``work`` the capacities are still to be found: all of them 1.

        Raises:
            ValueError: layers, capacities or a rank that do not fit the model, or settings without
                meaning for the granularity.
        """
        if self.layers == []:
            return NO_ROUTERS
        layers = resolve_layers(self.layers, num_layers=num_layers)
        capacity = 1.0 if self.capacity is None else self.capacity
        if self.num_noop_experts:
            capacity = num_experts / (num_experts + self.num_noop_experts)
        return RoutingConfig(
            granularity=self.granularity,
            layers=layers,
            capacity=resolve_capacity(
                capacity,
                num_layers=len(layers),
                targets=len(Scheme.parse(self.granularity).targets),
            ),
            work=(self.work[0], self.work[1]) if isinstance(self.work, list) else self.work,
            selection=self.selection,
            causal=self.causal,
            causal_loss_weight=self.causal_loss_weight,
            predictor_size=predictor_size(hidden_size) if self.causal == "predictor" else None,
            scope=self.scope,
            capacity_loss_weight=self.capacity_loss_weight,
            capacity_warmup_fraction=self.capacity_warmup_fraction or 0.0,
            threshold=self.threshold,
            pooling=self.pooling,
            keys_values=self.keys_values,
            training_compute=self.training_compute or "dense",
            bias=bool(self.bias),
            stand_in_rank=self._stand_in_rank(hidden_size),
            renormalize=self.renormalize,
            num_noop_experts=self.num_noop_experts,
        )

    def _stand_in_rank(self, hidden_size: int) -> int | None:
        if self.stand_in == "none":
            return None
        if (self.stand_in_rank or 0) > hidden_size:
            raise ValueError(
                f"router.stand_in_rank = {self.stand_in_rank}: must be at most the model's hidden "
                f"size, {hidden_size}."
            )
        scheme = Scheme.parse(self.granularity)
        return self.stand_in_rank or default_rank(scheme, hidden_size=hidden_size)
