"""Which settings go with routers on the experts of a mixture."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from megatron_mod.routing.scheme import Scheme

if TYPE_CHECKING:
    from megatron_mod.config.router_section import RouterConfig
    from megatron_mod.model.architecture import Architecture

EXPERT_TOKEN = "expert_token"


def check_experts(r: RouterConfig, place: Callable[[str], str]) -> None:
    """Refuse settings that experts' routers would ignore or cannot meet, and theirs elsewhere.

    Raises:
        ValueError: naming the field, its value, the constraint and the remedy.
    """
    granularity = f"router.granularity = {r.granularity}{place('router.granularity')}"
    if not Scheme.parse(r.granularity).per_expert:
        if r.renormalize:
            raise ValueError(
                f"router.renormalize = true{place('router.renormalize')}: is about the weights "
                f"that a gate gives experts, which {granularity} does not route; leave it out, or "
                f"set router.granularity to {EXPERT_TOKEN}."
            )
        return
    if r.stand_in == "linear":
        raise ValueError(
            f"router.stand_in = linear{place('router.stand_in')}: nothing stands in for one of a "
            f"token's experts ({granularity}); leave it out (none), or set router.renormalize to "
            "true, which gives its weight to the others."
        )
    if isinstance(r.work, list):
        raise ValueError(
            f"router.work = {r.work}{place('router.work')}: routers of {granularity} serve one "
            "budget; give one number."
        )


def check_mixture(granularity: str, arch: Architecture) -> None:
    """Refuse routers on experts that a model does not have.

    Raises:
        ValueError: naming the granularity and the remedy.
    """
    if Scheme.parse(granularity).per_expert and arch.mixture is None:
        raise ValueError(
            f"router.granularity = {granularity}: routes the experts of a mixture, and this "
            "model's layers have one MLP each; choose another granularity, or a model of experts "
            "(Mixtral, Qwen3-MoE, OLMoE)."
        )
