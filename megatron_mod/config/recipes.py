"""Settings that belong together."""

from __future__ import annotations

NO_STAND_INS: dict[str, object] = {
    "router.stand_in": "none",
    "router.stand_in_rank": "null",
    "router.stand_in_tokens": "null",
}
# Router-Tuning's way (arXiv 2410.13184): zeros, a threshold that stands, and a penalty. The
# penalty's weight is what was found best on SmolLM2-135M; published is none.
PUBLISHED: dict[str, object] = {
    "router.bias": "false",
    "router.init": "zeros",
    **NO_STAND_INS,
    "router.capacity_loss_weight": 0.05,
    "router.capacity_warmup_fraction": 0.0,
}


def as_options(settings: dict[str, object]) -> list[str]:
    """For a training's command line."""
    return [f"--{name}={value}" for name, value in settings.items()]
