"""Fixtures all tests share."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "2")
os.environ.setdefault("MEET", "")

import pytest


@pytest.fixture(scope="session")
def single_process():
    """A world of one rank in the test's own process."""
    from megatron_mod.parallel import topology

    os.environ["WORLD_SIZE"] = "1"
    with topology.single_process():
        yield
