"""Which settings go with a selection of units, and with training the whole model."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from megatron_mod.config.router_section import RouterConfig
    from megatron_mod.config.schema import Config

EXACT_GRANULARITIES = ("attn_token", "mlp_token", "block_token")


def check_selection(r: RouterConfig, place: Callable[[str], str]) -> None:
    """Refuse settings that a selection would ignore or cannot meet.

    Raises:
        ValueError: naming the field, its value, the constraint and the remedy.
    """
    selection = f"router.selection = {r.selection}{place('router.selection')}"
    named = f"router.causal = {r.causal}{place('router.causal')}"
    if r.causal is not None and r.selection != "top_k":
        why = "decides by thresholds already" if r.selection == "threshold" else "knows no scores"
        raise ValueError(
            f"{named}: would be ignored, because {selection} {why}; leave it out, or set "
            "router.selection to top_k."
        )
    if r.causal_loss_weight is not None and r.causal != "auxiliary_loss":
        raise ValueError(
            f"router.causal_loss_weight = {r.causal_loss_weight:g}"
            f"{place('router.causal_loss_weight')}: is the weight of an auxiliary loss and there "
            "is none; leave it out, or set router.selection to top_k and router.causal to "
            "auxiliary_loss."
        )
    if r.selection == "threshold" or r.layers == []:
        return
    if r.granularity not in EXACT_GRANULARITIES:
        raise ValueError(
            f"{selection}: counts the tokens of one router a layer, and router.granularity = "
            f"{r.granularity}{place('router.granularity')} is another; choose one of "
            f"{', '.join(EXACT_GRANULARITIES)}, or set router.selection to threshold."
        )
    for name, value, why in _ignored(r):
        raise ValueError(
            f"router.{name} = {value}{place(f'router.{name}')}: {why} with {selection}; leave it "
            "out, or set router.selection to threshold."
        )


def _ignored(r: RouterConfig) -> list[tuple[str, object, str]]:
    """Settings of threshold routers that are set: name, value and why they have no meaning."""
    exact = "capacity is held exactly, in every document and layer,"
    of: dict[str, tuple[object, str]] = {
        "work": (None, exact),
        "capacity_loss_weight": ("auto", exact),
        "scope": ("model", exact),
        "stand_in": ("none", "tokens that are not selected pass by"),
        "training_compute": ("sparse", "only selected tokens are part of the output"),
        "init": (None, "routers start at small random numbers"),
        "keys_values": (("selected", None), "selected tokens attend to selected ones"),
    }
    if r.selection == "random":
        of["threshold"] = (0.5, "no score decides")
    found = []
    for name, (allowed, why) in of.items():
        value = getattr(r, name)
        if value != allowed and not (isinstance(allowed, tuple) and value in allowed):
            found.append((name, value, why))
    return found


def check_whole_model(config: Config, place: Callable[[str], str]) -> None:
    """Refuse settings that do not go with training all parameters, or that need it.

    Raises:
        ValueError: naming the field, its value, the constraint and the remedy.
    """
    model, t = config.model, config.train
    trainable = f"train.trainable = {t.trainable}{place('train.trainable')}"
    if model.config is not None:
        for name in ("checkpoint", "hf_path"):
            if (value := getattr(model, name)) is not None:
                raise ValueError(
                    f"model.config{place('model.config')} and model.{name} = {value}"
                    f"{place(f'model.{name}')}: a model is trained from scratch or from weights; "
                    "leave one of the two out."
                )
        if t.trainable != "all":
            raise ValueError(
                f"model.config{place('model.config')}: a model without weights has to be trained, "
                f"and {trainable} leaves it as it begins; set that to all, or name a model with "
                "weights (model.checkpoint, model.hf_path)."
            )
    if t.trainable != "all":
        return
    if t.loss != "task":
        raise ValueError(
            f"train.loss = {t.loss}{place('train.loss')}: the dense model to learn from is the one "
            f"that changes with {trainable}; set train.loss to task."
        )
    if t.frozen_prefix == "cache":
        raise ValueError(
            f"train.frozen_prefix = cache{place('train.frozen_prefix')}: nothing is frozen with "
            f"{trainable}; leave it out."
        )
    for name, value in (("lora.rank", config.lora.rank), ("model.lora", model.lora)):
        if value is not None:
            raise ValueError(
                f"{name} = {value}{place(name)}: adapters are for frozen weights, and {trainable} "
                f"trains them themselves; leave it out, or set train.trainable to routers+lora."
            )
