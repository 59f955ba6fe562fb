"""Which settings go with experts that return nothing (integrated MoDE)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING

from megatron_mod.config.experts import EXPERT_TOKEN

if TYPE_CHECKING:
    from megatron_mod.config.schema import Config

_OWN = ("granularity", "layers", "num_noop_experts")


def check_noops(config: Config, place: Callable[[str], str]) -> None:
    """Refuse settings that a gate which chooses among no-ops would ignore, or that go without it.

    Raises:
        ValueError: naming the field, its value, the constraint and the remedy.
    """
    r, trainable = config.router, config.train.trainable
    if r.num_noop_experts is None or r.layers == []:
        return
    noops = f"router.num_noop_experts = {r.num_noop_experts}{place('router.num_noop_experts')}"
    if r.granularity != EXPERT_TOKEN:
        raise ValueError(
            f"{noops}: are chosen as experts are, and router.granularity = {r.granularity}"
            f"{place('router.granularity')} routes no experts; set that to {EXPERT_TOKEN}, or "
            "leave them out."
        )
    if trainable != "all":
        raise ValueError(
            f"{noops}: the model's own gate has to learn them, which stays as it is with "
            f"train.trainable = {trainable}{place('train.trainable')}; set that to all, or leave "
            "them out, for routers on the experts."
        )
    unset = type(r)(**{name: getattr(r, name) for name in _OWN})
    for field in dataclasses.fields(r):
        value = getattr(r, field.name)
        if value != getattr(unset, field.name):
            name = f"router.{field.name}"
            raise ValueError(
                f"{name} = {value}{place(name)}: would be ignored, because with {noops} the gate "
                "alone chooses; leave it out."
            )
