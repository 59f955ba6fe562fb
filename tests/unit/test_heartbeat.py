"""Which rank is named when one does not answer."""

from __future__ import annotations

import threading
import time
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from megatron_mod import process
from megatron_mod.parallel.heartbeat import BEATS, Heartbeat

MINUTES = 0.02


@pytest.fixture
def store(monkeypatch):
    """A job's store, and a connection of a rank's to it."""
    server = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    monkeypatch.setenv("MASTER_PORT", str(server.port))
    monkeypatch.delenv("TORCHELASTIC_RESTART_COUNT", raising=False)
    timeout = timedelta(seconds=10)
    client = dist.TCPStore("localhost", server.port, is_master=False, timeout=timeout)
    yield dist.PrefixStore("megatron_mod/heartbeat/0", client)
    del server


@pytest.fixture
def ended(monkeypatch):
    """What this rank ended the job with."""
    said = []
    over = threading.Event()

    def end_alone(message: str, *, status: int) -> None:
        said.append((message, status))
        over.set()
        raise RuntimeError  # nothing comes after it

    monkeypatch.setattr(process, "end_alone", end_alone)
    said_within = over.wait
    return said, said_within


def beat(store, rank: int, count: int) -> None:
    store.set(str(rank), f'{{"pid": 4711, "host": "elsewhere", "beats": {count}}}')


def start(world_size: int) -> Heartbeat:
    limit = "train.timeout = 0.02 minutes"
    return Heartbeat(rank=0, world_size=world_size, minutes=MINUTES, limit=limit)


def test_the_rank_that_stopped_is_named(store, ended):
    said, said_within = ended
    beat(store, 1, 1)
    heart = start(2)
    for count in range(2, 2 + BEATS):  # as long as it beats it is not
        beat(store, 1, count)
        time.sleep(heart.interval)
    assert not said
    assert said_within(30)
    ((message, status),) = said
    assert message.startswith("error: rank 1 (process 4711 on elsewhere) has not answered since ")
    assert "as long as train.timeout = 0.02 minutes allows" in message
    assert status == 2


def test_a_rank_that_has_left_is_not_missed(store, ended):
    said, said_within = ended
    beat(store, 1, 1)
    heart = start(2)
    store.set("1", b"left")
    assert not said_within(MINUTES * 60 * 1.5)
    heart.stop()
    assert store.get("0") == b"left"
    assert not said


def test_ranks_that_never_come_are_named(store):
    beat(store, 2, 1)
    with pytest.raises(ValueError, match=r"ranks 1, 3 of 4 did not come within train.timeout = 0"):
        start(4)


def test_all_groups_have_the_timeout(single_process):
    from megatron_mod.parallel import topology

    topology.shutdown()
    try:
        topology.initialize(topology.plan(tensor=1, pipeline=1, world_size=1), minutes=7)
        found = {
            group.group_desc: group._get_backend(torch.device("cpu")).options._timeout
            for group in dist.distributed_c10d._world.pg_map
        }
        found.pop("EXPERT_DATA_PARALLEL_GROUP_GLOO")  # Megatron's default; no model has experts
        assert len(found) > 10
        assert set(found.values()) == {timedelta(minutes=7)}
    finally:
        topology.shutdown()
        topology.initialize(topology.plan(tensor=1, pipeline=1, world_size=1))
