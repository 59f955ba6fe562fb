"""Fixtures all tests share."""

from __future__ import annotations

import os
import signal

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as a shell starts what it puts aside
    signal.signal(signal.SIGINT, signal.default_int_handler)
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


@pytest.fixture(scope="session", autouse=True)
def own_data_cache(tmp_path_factory):
    """Tokenised data of tests does not go to the user's cache."""
    os.environ["MEGATRON_MOD_CACHE"] = str(tmp_path_factory.mktemp("cache"))
