"""The benchmark of routed layers counts what the host dispatches."""

from __future__ import annotations

import torch

from megatron_mod.benchmark.routing import Setting, compare
from megatron_mod.routing.scheme import Scheme

BEYOND = 45  # operations of a router, and of skipping by it, on a batch of several documents


def test_a_router_asks_little_more_of_the_host(single_process):
    setting = Setting(3, 8, 1, training=False, implementation="local", dtype=torch.float32)
    for row in compare("tiny", setting):
        routers = len(Scheme.parse(row["granularity"]).targets)
        assert 0 < row["operations"] - row["dense_operations"] <= BEYOND * routers, row
