"""The benchmark of routed layers counts what the host dispatches."""

from __future__ import annotations

from megatron_mod.benchmark.routing import measure
from megatron_mod.routing.scheme import Scheme

BEYOND = 45  # operations of a router, and of skipping by it, on a batch of several documents


def test_a_router_asks_little_more_of_the_host():
    rows = measure(
        ["tiny"], batch=3, length=8, repetitions=1, training=False, implementation="local"
    )
    for row in rows:
        routers = len(Scheme.parse(row["granularity"]).targets)
        assert 0 < row["operations"] - row["dense_operations"] <= BEYOND * routers, row
