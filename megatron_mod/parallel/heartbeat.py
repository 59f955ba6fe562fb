"""Finds the rank that does not answer, and ends the job in its name.

A collective that waits for a stopped rank fails in the healthy ones, with their names. So every
rank also says at short intervals that it is there, from a thread of its own and through the job's
store, and listens to the next one: whoever hears nothing knows of whom.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import socket
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from datetime import timedelta

import torch.distributed as dist

from megatron_mod import process
from megatron_mod.parallel.failure import Failures

BEATS = 20  # in the time that a rank may take to answer
_SECONDS_TO_LEAVE = 5  # for all ranks, after the one that holds the store has left in peace
_SILENT = BEATS - 2  # that many missing ones come before the collectives' own timeout
_LEFT = b"left"
_SECONDS_OF_GRACE = 3  # for a rank with an error of its own to speak before those that miss it


class Heartbeat:
    """This rank's pulse, and its ear for the next rank's; started on all ranks."""

    def __init__(
        self,
        connect: Callable[[], dist.Store],
        *,
        rank: int,
        world_size: int,
        minutes: float,
        limit: str,
    ) -> None:
        """Wait for all ranks, then start both.

        Args:
            connect: makes a connection to the job's store; torch's own waits for others, and holds
                up whoever shares it.
            minutes: that a rank may take to answer.
            limit: the same in words, for the message.

        Raises:
            ValueError: ranks that do not come.
        """
        self.rank, self.next, self.world_size = rank, (rank + 1) % world_size, world_size
        self.at, self.stage = "its start", None
        self.limit, self.interval = limit, minutes * 60 / BEATS
        self._ticks = math.ceil(self.interval)  # of a second at most, in which a new place is told
        self.store = connect()
        self._who = {"pid": os.getpid(), "host": socket.gethostname()}
        self._beats, self._told = 0, ""
        self._beat()
        everyone = [str(number) for number in range(world_size)]
        try:
            self.store.wait(everyone, timedelta(minutes=minutes))
        except dist.DistStoreError:
            absent = [number for number in everyone if not self.store.check([number])]
            raise ValueError(
                f"{_ranks(absent)} of {world_size} did not come within {limit}: not started, or "
                "stopped."
            ) from None
        self._over = threading.Event()
        self._stopped: dict[str, list[int]] = {}  # ranks by host that may have been, by a signal
        self._first = None if process.is_under_torchrun() else json.loads(self.store.get("0"))
        if self._first is None:
            # Without its torchrun a rank saves, and all the others with it.
            name, host, patience = f"torchrun on {os.environ['MASTER_ADDR']}", None, minutes * 60
        else:
            name, host = _name(0, self._first), self._first["host"]
            patience = _SECONDS_TO_LEAVE
        self.failures = Failures(
            {"rank": rank, **self._who},
            connect,
            holder=f"{name}, which holds the job's store,",
            host=host,
            patience=patience,
            is_over=self._over,
        )
        process.with_others(self)
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)
        self._thread.start()
        threading.Thread(target=self._watch, name="watch", daemon=True).start()

    def stop(self) -> None:
        """Say that this rank leaves; it is not missed then."""
        process.with_others(None)
        self._over.set()
        self._thread.join(timeout=self.interval)
        with contextlib.suppress(RuntimeError):  # the store may have gone first
            self.store.set(str(self.rank), _LEFT)
        self.failures.leave()

    def tell(self, message: str, *, status: int) -> bool:
        """As ``Failures.tell``."""
        return self.failures.tell(message, status=status, stopped=self._stopped)

    def linger(self) -> None:
        """As ``Failures.linger``."""
        self.failures.linger()

    def lost(self) -> bool:
        """Whether a rank of this machine has ended without leaving."""
        return self._dead(self._all()) is not None

    def explain(self, error: BaseException) -> str | None:
        """Whose fault it is that a collective failed here, if ``error`` is about one.

        A rank that has died breaks the others' connections; one that hangs, though it beats, is
        behind them. Does not return where a rank says itself what has become of it.
        """
        if not isinstance(error, dist.DistError) and not re.search("gloo|NCCL", str(error)):
            return None
        self.failures.leave_if_heard(within=_SECONDS_OF_GRACE)
        cause = str(error).splitlines()[0]
        ranks = self._all() or {self.rank: {**self._who, "at": self.at, "stage": self.stage}}
        if (dead := self._dead(ranks)) is not None:
            return (
                f"error: {_name(dead, ranks[dead])} is gone: ended from outside (by a lack of "
                f"memory?), or by an error above; {self._here()} waited for it. Run the same "
                "command again."
            )
        if not re.search("timed? ?out", cause, re.IGNORECASE):
            self.failures.leave_if_heard(within=_SECONDS_OF_GRACE)  # its own machine knows better
            return (
                f"error: another rank is gone; {self._here()} waited for it. Run the same command "
                f"again. ({cause})"
            )
        places: dict[str, list[int]] = {}
        for number, who in ranks.items():
            places.setdefault(_place(who), []).append(number)
        found = "; ".join(f"{_ranks(numbers)} {place}" for place, numbers in places.items())
        return f"error: the ranks waited longer than {self.limit} allows: {found}. ({cause})"

    def _all(self) -> dict[int, dict]:
        """What every rank that has not left said last."""
        beats: dict[int, bytes] = {}
        with contextlib.suppress(RuntimeError):  # the store may have gone
            beats = {n: self.store.get(str(n)) for n in range(self.world_size)}
        return {n: json.loads(beat) for n, beat in beats.items() if beat != _LEFT}

    def _dead(self, ranks: Mapping[int, dict]) -> int | None:
        """The first rank of this machine whose process is gone."""
        here = (n for n, who in ranks.items() if who["host"] == self._who["host"])
        return next((n for n in here if not process.is_alive(ranks[n]["pid"])), None)

    def _here(self) -> str:
        """This rank, and where it is."""
        return f"rank {self.rank} {_place({'at': self.at, 'stage': self.stage})}"

    def _beat(self) -> None:
        self._beats, self._told = self._beats + 1, self.at
        beat = {**self._who, "stage": self.stage, "at": self.at, "beats": self._beats}
        self.store.set(str(self.rank), json.dumps(beat))

    def _run(self) -> None:
        tick, heard, missing, before = 0, b"", 0, {}
        with contextlib.suppress(RuntimeError):  # the store is gone, of which Failures hears
            while not self._over.wait(self.interval / self._ticks):
                tick = (tick + 1) % self._ticks
                if tick == 0 or self.at != self._told:
                    self._beat()
                if tick:
                    continue
                now = self.store.get(str(self.next))
                if now == _LEFT:
                    continue
                # Missing beats are counted, not timed: a job that was suspended as a whole goes on.
                heard, missing = now, missing + 1 if now == heard else 0
                if missing == _SILENT - 2:
                    before = self._all()
                if missing >= _SILENT:
                    after = self._all()
                    self._end({n: who for n, who in after.items() if before.get(n) == who})

    def _end(self, silent: Mapping[int, dict]) -> None:
        """Say who has not answered, those after this rank first, and end."""
        order = sorted(silent, key=lambda number: (number - self.rank) % self.world_size)
        names = " and ".join(_name(number, silent[number]) for number in order)
        last = "; ".join(f"rank {number} was {_place(silent[number])}" for number in order)
        have, they_are = ("has", "it is") if len(order) == 1 else ("have", "they are")
        for who in silent.values():
            self._stopped.setdefault(who["host"], []).append(who["pid"])
        process.end_alone(
            f"error: {names} {have} not answered since {self._since()}, as long as {self.limit} "
            f"allows: {they_are} stopped, or the machine is gone. When last heard of, {last}; "
            f"{self._here()} waited. Run the same command again.",
            status=process.LOST,
        )

    def _since(self) -> str:
        silence = self.interval * _SILENT
        return time.strftime("%H:%M:%S", time.localtime(time.time() - silence))

    def _watch(self) -> None:
        """End this rank when the store does not answer, whom one waits for whatever the timeout,
        and the ranks do not get on either."""
        seen, missing = (0, self.at), 0
        while not self._over.wait(self.interval):
            now = (self._beats, self.at)
            seen, missing = now, missing + 1 if now == seen else 0
            if missing >= _SILENT:
                self.failures.without_store = True
                if (who := self._first) is not None:
                    self._stopped = {who["host"]: [who["pid"]]}
                process.end_alone(
                    f"error: {self.failures.holder} has not answered since {self._since()}, as "
                    f"long as {self.limit} allows: it is stopped, or its machine is gone; "
                    f"{self._here()} waited. Run the same command again.",
                    status=process.LOST,
                )


def _name(number: int, who: Mapping[str, object]) -> str:
    return f"rank {number} (process {who['pid']} on {who['host']})"


def _place(who: Mapping[str, object]) -> str:
    """How far a rank has come, and which part of the model it has."""
    stage = who.get("stage")
    return f"at {who['at']}" + (f" (pipeline stage {stage})" if stage is not None else "")


def _ranks(numbers: Iterable[object]) -> str:
    numbers = [str(number) for number in numbers]
    return f"rank{'s' * (len(numbers) > 1)} {', '.join(numbers)}"
