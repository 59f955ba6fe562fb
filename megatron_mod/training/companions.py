"""What lies beside the weights of a model that a training keeps whole."""

from __future__ import annotations

from typing import TYPE_CHECKING

from megatron_mod.config.schema import Config

if TYPE_CHECKING:
    from megatron_mod.training.plan import Plan


def companions_of(config: Config, plan: Plan) -> dict[str, bytes] | None:
    """Config, tokenizer and generation settings that a step of such a training has, by file, read
    once: the folder they come from may be gone when a step is saved. ``None``: steps refer to their
    base."""
    if not plan.is_whole:
        return None
    return plan.base.companions(dtype=config.model.dtype)
