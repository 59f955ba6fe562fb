"""Which pairs of a topology and a training a quick run asks for; the slow one asks for all."""

from __future__ import annotations

from collections.abc import Iterable

import pytest


def is_asked(topology: int, training: int, every: int) -> bool:
    """Whether a pair, of these numbers, is among one in ``every`` that are spread over both."""
    return (topology + training) % every == 0


def number_asked(topologies: int, trainings: int, every: int) -> int:
    """How many of all pairs are."""
    return sum(is_asked(t, n, every) for t in range(topologies) for n in range(trainings))


def some(every: int, trainings: list, *values: object, id: str) -> list:
    """A test's parameters: of ``trainings`` one in ``every``, and ``values``; as a slow test all of
    them. For a single topology, with which ``one_in`` would leave trainings out unseen."""
    return [
        pytest.param(trainings[::every], *values, id=id),
        pytest.param(trainings, *values, id=f"{id}_whole", marks=pytest.mark.slow),
    ]


def pairs(every: int, first: Iterable, second: Iterable) -> list:
    """A test's cases: all pairs of two lists, of which one in ``every`` is quick, spread over both;
    the others are slow tests."""
    return [
        pytest.param(a, b, marks=[] if is_asked(at, to, every) else [pytest.mark.slow])
        for at, a in enumerate(first)
        for to, b in enumerate(second)
    ]


def one_in(every: int, *values: object, id: str) -> list:
    """A test's parameters: ``values``, and of all their pairs one in ``every``; as a slow test all
    of them."""
    return [
        pytest.param(*values, every, id=id),
        pytest.param(*values, 1, id=f"{id}_whole", marks=pytest.mark.slow),
    ]
