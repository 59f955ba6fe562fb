"""How many layers each stage of a pipeline holds.

A layout counts the layers of each stage in the model's order; with a virtual pipeline of each
chunk, of which rank ``r`` of ``n`` holds ``r``, ``n + r``, ...
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Sequence

from megatron_mod.model.cost import Costs

Layout = tuple[int, ...]


def even_layout(num_layers: int, stages: int) -> Layout:
    """As many layers each; those left over go to the first ones."""
    each, left = divmod(num_layers, stages)
    return tuple(each + (stage < left) for stage in range(stages))


@functools.lru_cache(maxsize=256)
def cheapest_layout(costs: Costs, stages: int, *, in_first: int = 1) -> Layout:
    """The layout whose slowest stage costs least; of several such the most even one.

    Every stage has a layer but the last, which may have the head alone.

    Args:
        in_first: the fewest layers of the first stage.
    """
    slowest, _ = _search(costs, stages, in_first, value=lambda cost: cost, join=max)
    assert slowest is not None, "more stages than layers"

    def evenness(cost: int) -> int | None:
        return cost * cost if cost <= slowest else None

    _, layout = _search(costs, stages, in_first, value=evenness, join=operator.add)
    return layout


def _search(
    costs: Costs,
    stages: int,
    in_first: int,
    *,
    value: Callable[[int], int | None],
    join: Callable[[int, int], int],
) -> tuple[int | None, Layout]:
    """The layout whose stages' values (``None``: not this stage) join to the least."""
    num_layers, before = len(costs.layers), [0]
    for layer in costs.layers:
        before.append(before[-1] + layer)
    # Of so many layers, the best way to give them to the stages so far.
    best: dict[int, tuple[int, Layout]] = {0: (0, ())}
    for stage in range(stages):
        last, fewest = stage == stages - 1, 1 if stage else max(1, in_first)
        longer: dict[int, tuple[int, Layout]] = {}
        for start, (so_far, layout) in best.items():
            for end in range(num_layers if last else start + fewest, num_layers + 1):
                own = value(before[end] - before[start] + costs.head * last)
                if own is None:
                    continue
                found = join(so_far, own), (*layout, end - start)
                longer[end] = min(found, longer.get(end, found))
        best = longer
    return best.get(num_layers, (None, ()))


def step_cost(costs: Costs, layout: Layout, *, ranks: int, micro_batches: int) -> float:
    """Operations of a step that follow one another, if each micro-batch costs ``costs``; see
    ``step_length``."""
    return step_length(costs.of(layout), ranks=ranks, micro_batches=micro_batches)


def step_length(stages: Sequence[float], *, ranks: int, micro_batches: int) -> float:
    """What of a step follows one another, in the unit of ``stages``, what a micro-batch costs each:
    the first fills the pipeline, and every later one waits for the slowest stage.

    Args:
        ranks: that share the stages; each has ``len(stages) / ranks`` of them.
        micro_batches: of a step, on each rank.
    """
    chunks = len(stages) // ranks
    return (micro_batches * chunks - 1) * max(stages) + sum(stages) / chunks


def megatron_layout(layout: Layout) -> list[list[str]]:
    """As ``TransformerConfig.pipeline_model_parallel_layout`` takes it."""
    stages = [["decoder"] * count for count in layout]
    stages[0].insert(0, "embedding")
    stages[-1].append("loss")
    return stages
