"""The names under which TensorBoard and Weights & Biases show what a record holds."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean

GIB = 2**30
# TensorBoard sorts groups by name and opens the first two: capacity, and loss.
CAPACITY, VALIDATION = "routed_layers", "routed_layers_validation"


def layer_tag(group: str, layer: int, layers: Sequence[int]) -> str:
    """The name of a routed layer's scalar; names sort as layers do."""
    return f"{group}/layer_{layer:0{len(str(max(layers)))}}"


def scalars(record: dict, layers: Sequence[int]) -> dict[str, float]:
    """A record of ``metrics.jsonl`` by name and value; the part before the slash groups them.

    Of what each rank has of its own, the mean is shown, of memory the rank with most.

    Args:
        layers: the routed ones.
    """
    found: dict[str, float] = {}
    for name, key in _NAMES.items():
        value = record.get(key)
        if value is not None:
            found[name] = _OF_RANKS[key](value) if key in _OF_RANKS else value
    for group, key in ((CAPACITY, "capacity"), (VALIDATION, "validation_capacity")):
        for layer, share in zip(layers, record.get(key, ()), strict=False):
            found[layer_tag(group, layer, layers)] = share
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
    "optimizer/grad_norm": "grad_norm",
    "loss/validation": "validation_loss",
    "capacity/mean": "capacity_mean",
    "capacity/target": "capacity_target",
    "capacity/validation_mean": "validation_capacity_mean",
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
