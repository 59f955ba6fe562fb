"""Finds the rank that does not answer, and ends the job in its name.

A collective that waits for a stopped rank fails in the healthy ones, with their names. So every
rank also says at short intervals that it is there, from a thread of its own and through the job's
store, and listens to the next one: whoever hears nothing knows of whom.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
import time
from datetime import timedelta

import torch.distributed as dist

from megatron_mod import process

BEATS = 20  # in the time that a rank may take to answer
_SILENT = BEATS - 2  # that many missing ones come before the collectives' own timeout
_LEFT = b"left"


class Heartbeat:
    """This rank's pulse, and its ear for the next rank's; started on all ranks."""

    def __init__(self, *, rank: int, world_size: int, minutes: float, limit: str) -> None:
        """Wait for all ranks, then start both.

        Args:
            minutes: that a rank may take to answer.
            limit: the same in words, for the message.

        Raises:
            ValueError: ranks that do not come.
        """
        self.rank, self.next = rank, (rank + 1) % world_size
        self.limit, self.interval = limit, minutes * 60 / BEATS
        timeout = timedelta(minutes=minutes)
        # A connection of its own: torch's waits for others, and holds up whoever shares it.
        store = dist.TCPStore(
            os.environ["MASTER_ADDR"],
            int(os.environ["MASTER_PORT"]),
            is_master=False,
            timeout=timeout,
        )
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        self.store = dist.PrefixStore(f"megatron_mod/heartbeat/{attempt}", store)
        self._who = {"pid": os.getpid(), "host": socket.gethostname()}
        self._beats = 0
        self._beat()
        everyone = [str(number) for number in range(world_size)]
        try:
            self.store.wait(everyone, timeout)
        except dist.DistStoreError:
            absent = [number for number in everyone if not self.store.check([number])]
            raise ValueError(
                f"{_ranks(absent)} of {world_size} did not come within {limit}: not started, or "
                "stopped."
            ) from None
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Say that this rank leaves; it is not missed then."""
        self._over.set()
        self._thread.join(timeout=self.interval)
        with contextlib.suppress(RuntimeError):  # the store may have gone first
            self.store.set(str(self.rank), _LEFT)

    def _beat(self) -> None:
        self._beats += 1
        self.store.set(str(self.rank), json.dumps({**self._who, "beats": self._beats}))

    def _run(self) -> None:
        heard, missing = b"", 0
        try:
            while not self._over.wait(self.interval):
                self._beat()
                now = self.store.get(str(self.next))
                if now == _LEFT:
                    continue
                # Missing beats are counted, not timed: a job that was suspended as a whole goes on.
                heard, missing = now, missing + 1 if now == heard else 0
                if missing >= _SILENT:
                    self._end(json.loads(now))
        except RuntimeError:
            pass  # the store is gone, and the job with it

    def _end(self, who: dict) -> None:
        since = time.strftime("%H:%M:%S", time.localtime(time.time() - self.interval * _SILENT))
        process.end_alone(
            f"error: rank {self.next} (process {who['pid']} on {who['host']}) has not answered "
            f"since {since}, as long as {self.limit} allows: it is stopped, or its machine is "
            "gone. Run the same command again.",
            status=process.MISTAKE,
        )


def _ranks(numbers: list[str]) -> str:
    return f"rank{'s' * (len(numbers) > 1)} {', '.join(numbers)}"
