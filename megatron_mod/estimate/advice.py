"""What to change where a training does not fit: settings with which, as estimated, it does."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import combinations, product

from megatron_mod.config.ranks import SETTINGS
from megatron_mod.config.recipes import NO_STAND_INS
from megatron_mod.config.schema import Config
from megatron_mod.config.validate import check_values
from megatron_mod.estimate.estimate import Estimate, estimate

MOST_CHANGES = 4
MORE_NODES = (1, 2, 4, 8, 16)
TENSOR, PIPELINE, EXPERT = (SETTINGS[name] for name in ("tensor", "pipeline", "expert"))

_NO_STAND_INS = {n: None if value == "null" else value for n, value in NO_STAND_INS.items()}


@dataclass(frozen=True)
class Change:
    """Settings and their new values, the nodes that these need, and the estimate with them."""

    settings: Mapping[str, object]
    nodes: int
    found: Estimate

    def options(self) -> list[str]:
        """For the command line of a training, or of the estimate."""
        return [f"--{name} {_text(value)}" for name, value in self.settings.items()]


def advise(first: Estimate) -> Change | None:
    """The fewest settings that make a training fit, and of as few the quickest; more nodes only
    where no settings do, and what changes what is learned only where no nodes do. ``None``: none
    were found."""
    half = first.placed.job.config.data.max_length // 2
    for given_up in ({}, {"data.max_length": max(half, 2)}, _NO_STAND_INS):
        for factor in MORE_NODES:
            nodes = factor * first.cluster.nodes
            for count in range(MOST_CHANGES + 1):
                found = [
                    change
                    for settings in _sets(first, count, nodes=nodes)
                    if (change := _tried(first, {**given_up, **settings}, nodes=nodes))
                ]
                if found:
                    return min(found, key=lambda change: change.found.step.seconds)
    return None


def _sets(first: Estimate, count: int, *, nodes: int) -> Iterator[dict[str, object]]:
    """All ways to change so many settings."""
    choices = _choices(first, nodes=nodes)
    for names in combinations(choices, count):
        for values in product(*(choices[name] for name in names)):
            settings: dict[str, object] = dict(zip(names, values, strict=True))
            if TENSOR in settings:
                settings["parallel.sequence_parallel"] = True
            yield settings


def _choices(first: Estimate, *, nodes: int) -> dict[str, list]:
    """Other values that lower the memory of a rank and leave what is learned as it is."""
    job, per_node = first.placed.job, first.cluster.per_node
    t, ranks, is_frozen = job.config.train, job.topology, not job.reach.trains_base
    recompute = ["none", "selective", "full"]
    degrees = [2**power for power in range(1, 11)]
    choices: dict[str, list] = {
        "train.recompute": recompute[recompute.index(t.recompute) + 1 :],
        "train.micro_batch_size": [
            size for size in degrees[::-1] + [1] if size < t.micro_batch_size
        ],
        "train.frozen_prefix": ["cache"] if t.frozen_prefix == "recompute" and is_frozen else [],
        "model.dtype": ["bfloat16"] if job.config.model.dtype == "float32" else [],
        TENSOR: [n for n in degrees if ranks.tensor < n <= per_node],
        PIPELINE: [n for n in degrees if ranks.pipeline < n <= nodes * per_node],
        EXPERT: [n for n in degrees if ranks.expert < n <= job.arch.num_experts]
        if job.arch.mixture
        else [],
    }
    return {name: values for name, values in choices.items() if values}


def _tried(first: Estimate, settings: Mapping[str, object], *, nodes: int) -> Change | None:
    """The estimate with these settings, if there can be such a training and it fits."""
    cluster = first.cluster
    try:
        found = estimate(
            changed(first.placed.job.config, settings),
            first.placed.job.arch,
            nodes=nodes,
            per_node=cluster.per_node,
            kind_of=lambda placed: cluster.kind,
        )
    except ValueError:
        return None
    return Change(settings, nodes, found) if found.fits else None


def changed(config: Config, settings: Mapping[str, object]) -> Config:
    """A configuration with other values of some settings.

    Raises:
        ValueError: they do not go together.
    """
    config = copy.deepcopy(config)
    for name, value in settings.items():
        section, _, field = name.partition(".")
        setattr(getattr(config, section), field, value)
    check_values(config)
    return config


def _text(value: object) -> str:
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else str(value)
