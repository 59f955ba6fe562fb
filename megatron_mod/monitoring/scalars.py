"""The names under which TensorBoard and Weights & Biases show what a record holds."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean

from megatron_mod.routing.scheme import Place

GIB = 2**30
# TensorBoard sorts groups by name and opens the first two: capacity, and loss.
CAPACITY, VALIDATION = "routed_layers", "routed_layers_validation"


def place_tag(group: str, place: Place, places: Sequence[Place]) -> str:
    """The name of the scalar of one router among ``places``; names sort as layers do."""
    width = len(str(max(places).layer))
    parted = any(other.target != place.target for other in places)
    return f"{group}/layer_{place.layer:0{width}}" + (f"_{place.target}" if parted else "")


def scalars(record: dict, places: Sequence[Place]) -> dict[str, float]:
    """A record of ``metrics.jsonl`` by name and value; the part before the slash groups them.

    Of what each rank has of its own, the mean is shown, of memory the rank with most.

    Args:
        places: of the routers.
    """
    found: dict[str, float] = {}
    for name, key in _NAMES.items():
        value = record.get(key)
        if value is not None:
            found[name] = _OF_RANKS[key](value) if key in _OF_RANKS else value
    for group, key in ((CAPACITY, "capacity"), (VALIDATION, "validation_capacity")):
        for place, share in zip(places, record.get(key, ()), strict=False):
            found[place_tag(group, place, places)] = share
    for part, seconds in record.get("seconds", {}).items():
        found[f"seconds_of_a_step/{part}"] = seconds
    if "skipped" in record:
        found["progress/skipped_step"] = 1.0
    return found


_NAMES = {
    "loss/total": "loss",
    "loss/task": "task_loss",
    "loss/penalty": "penalty",
    "optimizer/learning_rate": "learning_rate",
    "optimizer/lora_learning_rate": "lora_learning_rate",
    "optimizer/stand_in_learning_rate": "stand_in_learning_rate",
    "optimizer/grad_norm": "grad_norm",
    "loss/causal": "causal_loss",
    "loss/load_balancing": "load_balancing_loss",
    "loss/validation": "validation_loss",
    "loss/validation_causal": "validation_loss_causal",
    "capacity/mean": "capacity_mean",
    "capacity/target": "capacity_target",
    "capacity/validation_mean": "validation_capacity_mean",
    "capacity/causal_agreement": "causal_agreement",
    "work/share_of_dense": "work",
    "work/target": "work_target",
    "work/validation": "validation_work",
    "performance/tokens_per_second": "tokens_per_second",
    "performance/tflops_per_second_and_rank": "tflops_per_second",
    "performance/share_of_peak": "share_of_peak",
    "performance/memory_allocated_gib": "memory_allocated",
    "performance/memory_peak_gib": "memory_peak",
    "progress/tokens": "tokens",
    "progress/data_position": "data_position",
}
_OF_RANKS = {
    "tflops_per_second": fmean,
    "share_of_peak": fmean,
    "memory_allocated": lambda ranks: max(ranks) / GIB,
    "memory_peak": lambda ranks: max(ranks) / GIB,
}
