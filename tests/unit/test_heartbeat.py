"""Which rank is named when one does not answer."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from datetime import timedelta
from functools import partial

import pytest
import torch
import torch.distributed as dist

from megatron_mod import process
from megatron_mod.parallel import failure, heartbeat, topology
from megatron_mod.parallel.heartbeat import BEATS, Heartbeat

# Threads end as the process would.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
MINUTES = 0.02
HEARTS: list[Heartbeat] = []


@pytest.fixture
def store(monkeypatch):
    """A job's store, and a connection of a rank's to it."""
    server = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    monkeypatch.setenv("MASTER_PORT", str(server.port))
    monkeypatch.delenv("TORCHELASTIC_RESTART_COUNT", raising=False)
    timeout = timedelta(seconds=10)
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    client = dist.TCPStore("localhost", server.port, is_master=False, timeout=timeout)
    yield dist.PrefixStore("megatron_mod/heartbeat/0", client)
    for heart in HEARTS:
        heart._over.set()  # before its store goes
    HEARTS.clear()
    del server


@pytest.fixture
def ended(monkeypatch):
    """What this rank ended the job with."""
    said = []
    over = threading.Event()

    def end_alone(message: str, *, status: int) -> None:
        if not over.is_set():
            said.append((message, status))
        over.set()
        raise SystemExit  # nothing comes after it

    monkeypatch.setattr(process, "end_alone", end_alone)
    said_within = over.wait
    return said, said_within


def beat(store, rank: int, count: int, host: str = "elsewhere", pid: int = 4711) -> None:
    said = {"pid": pid, "host": host, "stage": 1, "at": f"step {count}", "beats": count}
    store.set(str(rank), json.dumps(said))


def start(world_size: int) -> Heartbeat:
    limit = "train.timeout = 0.02 minutes"
    connect = partial(topology._connect, "heartbeat", minutes=MINUTES, limit=limit)
    heart = Heartbeat(connect, rank=0, world_size=world_size, minutes=MINUTES, limit=limit)
    HEARTS.append(heart)
    return heart


def test_the_rank_that_stopped_is_named(store, ended):
    said, said_within = ended
    beat(store, 1, 1)
    heart = start(2)
    heart.at, heart.stage = "step 7", 0
    for count in range(2, 2 + BEATS):  # as long as it beats it is not
        beat(store, 1, count)
        time.sleep(heart.interval)
    assert not said
    assert said_within(30)
    ((message, status),) = said
    assert message.startswith("error: rank 1 (process 4711 on elsewhere) has not answered since ")
    assert "as long as train.timeout = 0.02 minutes allows" in message
    assert f"rank 1 was at step {1 + BEATS} (pipeline stage 1); rank 0 at step 7 (pip" in message
    assert status == process.LOST


def test_all_that_stopped_are_named_and_woken_to_end(store, ended):
    """Two of the other three, of which one is on this machine."""
    said, said_within = ended
    child = subprocess.Popen(["sleep", "60"])
    beat(store, 1, 1)
    beat(store, 3, 1, host=socket.gethostname(), pid=child.pid)
    child.send_signal(signal.SIGSTOP)
    beat(store, 2, 0)
    heart = start(4)
    count = 0
    while not said_within(heart.interval):
        beat(store, 2, count := count + 1)
    ((message, _),) = said
    names = f"rank 1 (process 4711 on elsewhere) and rank 3 (process {child.pid} on "
    assert message.startswith(f"error: {names}")
    assert "rank 2" not in message
    assert process.state_of(child.pid) == "T"
    assert heart.tell(message, status=2)
    assert process.state_of(child.pid) != "T"
    child.kill()
    child.wait()


def test_the_first_that_fails_speaks_for_all(store, monkeypatch, capsys):
    """Whether a rank hears of it, or an error of its own comes first."""
    monkeypatch.setattr(failure, "_SECONDS_TO_LEAVE", 0.1)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    monkeypatch.setenv("RANK", "0")
    beat(store, 1, 1)
    heart = start(2)
    left = []
    over = threading.Event()

    def leave(status: int) -> None:
        left.append(status)
        over.set()
        raise SystemExit  # nothing comes after it

    monkeypatch.setattr(os, "_exit", leave)
    told = {"rank": 1, "pid": 4711, "host": "elsewhere", "why": "a bug", "status": 1, "stopped": {}}
    store.set("failure", json.dumps(told))
    assert over.wait(10)
    assert left == [1]
    assert "Ended with rank 1 (process 4711 on elsewhere), which ended first: a bug" in (
        capsys.readouterr().err
    )
    closed = RuntimeError("[gloo/transport/tcp/pair.cc:537] Connection closed by peer")
    with pytest.raises(SystemExit):
        heart.explain(closed)
    assert left == [1, 1]
    assert not heart.tell("mine", status=2)


def test_a_store_that_does_not_answer_ends_the_job_too(monkeypatch, ended):
    """Without torchrun the first rank holds it, and it may be the one that is stopped."""
    said, said_within = ended
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
    code = (
        "import sys, time, torch.distributed as dist\n"
        "store = dist.TCPStore('localhost', 0, is_master=True, wait_for_workers=False)\n"
        "print(store.port, flush=True)\n"
        "time.sleep(100)"
    )
    holder = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    port = int(holder.stdout.readline())
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    monkeypatch.setenv("MASTER_PORT", str(port))
    connect = partial(topology._connect, "heartbeat", minutes=MINUTES, limit="the limit")
    beat(connect(), 0, 1)
    heart = Heartbeat(connect, rank=1, world_size=2, minutes=MINUTES, limit="the limit")
    heart.at, heart.stage = "step 3", 1
    holder.send_signal(signal.SIGSTOP)
    assert said_within(30)
    ((message, status),) = said
    assert message.startswith("error: rank 0 (process 4711 on elsewhere), which holds the job's ")
    assert "rank 1 at step 3 (pipeline stage 1) waited" in message
    assert status == process.LOST
    heart._over.set()
    holder.kill()
    holder.wait()


def test_a_rank_that_has_left_is_not_missed(store, ended):
    said, said_within = ended
    beat(store, 1, 1)
    heart = start(2)
    store.set("1", b"left")
    assert not said_within(MINUTES * 60 * 1.5)
    heart.stop()
    assert store.get("0") == b"left"
    assert not said


def test_an_error_of_a_collective_is_told_as_what_another_rank_did(store, monkeypatch):
    monkeypatch.setattr(heartbeat, "_SECONDS_OF_GRACE", 0)
    dead = subprocess.Popen(["true"])
    dead.wait()
    here = socket.gethostname()
    store.set("1", f'{{"pid": {dead.pid}, "host": "{here}", "at": "step 3"}}')
    heart = start(2)
    closed = RuntimeError("[gloo/transport/tcp/pair.cc:537] Connection closed by peer")
    late = RuntimeError("[gloo/transport/tcp/unbound_buffer.cc:81] Timed out waiting 1200ms")
    assert heart.explain(closed).startswith(f"error: rank 1 (process {dead.pid} on {here}) is gone")
    store.set("1", '{"pid": 4711, "host": "elsewhere", "at": "the checkpoint of step 3"}')
    heart.at, heart.stage = "step 4", 0
    heart._beat()
    assert "another rank is gone; rank 0 at step 4 (pipeline stage 0)" in heart.explain(closed)
    assert "rank 0 at step 4 (pipeline stage 0); rank 1 at the checkpoint of step 3" in (
        heart.explain(late)
    )
    assert heart.explain(RuntimeError("a shape is wrong")) is None
    heart.stop()


def test_ranks_that_never_come_are_named(store):
    beat(store, 2, 1)
    with pytest.raises(ValueError, match=r"ranks 1, 3 of 4 did not come within train.timeout = 0"):
        start(4)


def test_all_groups_have_the_timeout(single_process):
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
