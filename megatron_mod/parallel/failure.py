"""Which rank failed first, and why: told through the job's store, and heard by all at once."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import threading
import time
from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from megatron_mod import process

_KEY, _OVER = "failure", b"over"
_FOR_EVER = timedelta(days=20)  # in the milliseconds that poll(2) takes
_SECONDS_TO_LEAVE = 2  # for a rank to end in its own way, before it is ended because of another


class Failures:
    """The word of the first rank that fails, which speaks for all.

    Args:
        me: ``rank``, ``pid`` and ``host`` of this rank.
        connect: makes a connection to the job's store. A rank listens on one of its own, because a
            store's connection is held up by whoever waits.
        holder: who holds the store, in words.
        host: of the first rank, if it is that one.
        patience: seconds after the store's end in which the job may still end in peace.
        is_over: whether this rank has left the job in peace.
    """

    def __init__(
        self,
        me: Mapping[str, Any],
        connect: Callable[[], dist.Store],
        *,
        holder: str,
        host: str | None,
        patience: float,
        is_over: threading.Event,
    ) -> None:
        self.me, self.holder, self.host = me, holder, host
        self.patience, self.is_over = patience, is_over
        self.without_store = False
        self._store, self._ear = connect(), connect()
        self._first: dict | None = None
        self._heard = threading.Event()
        self._thread = threading.Thread(target=self._listen, name="failures", daemon=True)
        self._thread.start()

    def tell(self, message: str, *, status: int, stopped: Mapping[str, list[int]]) -> bool:
        """Tell the others why this rank ends, which ends them too.

        Args:
            stopped: processes by host that have to be woken to end.

        Returns:
            Whether this rank is the one to speak: the first that tells; without a store the first
            that is left on its machine.
        """
        why = message.strip().splitlines()[-1].removeprefix("error: ")
        mine = json.dumps({**self.me, "why": why, "status": status, "stopped": stopped})
        asleep = stopped.get(self.me["host"], [])
        with contextlib.suppress(RuntimeError):
            if not self.without_store:
                first = self._store.compare_set(_KEY, "", mine)
                _wake(asleep)
                return first in (mine.encode(), _OVER)
            self._store.set(_KEY, mine)  # for a holder that is woken now; this waits for nothing
        _wake(asleep)
        here = os.environ.get("LOCAL_RANK")
        is_beside_holder = here is None or self.me["host"] == self.host
        return int(here or self.me["rank"]) == int(is_beside_holder)

    def leave(self) -> None:
        """Listen no more, and let nobody: who leaves in peace leaves last, with the others. Python
        aborts where it ends while a thread is on its way back from torch."""
        with contextlib.suppress(RuntimeError):
            self._store.compare_set(_KEY, "", _OVER.decode())
        self._thread.join(timeout=_SECONDS_TO_LEAVE)

    def linger(self) -> None:
        """Let the others hear, if this rank holds the store."""
        if self.host is not None and self.me["rank"] == 0:
            time.sleep(_SECONDS_TO_LEAVE)

    def leave_if_heard(self, *, within: float) -> None:
        """End this rank if another one tells, within so many seconds, why it ends."""
        if self._heard.wait(within):
            self._follow()

    def _listen(self) -> None:
        try:
            self._ear.wait([_KEY], _FOR_EVER)
            told = self._ear.get(_KEY)
        except RuntimeError:
            self._end_without_store()
            return
        if told == _OVER:
            return
        self._first = json.loads(told)
        if self._first["rank"] == self.me["rank"]:
            return
        stopped = self._first["stopped"].get(self.me["host"], [])
        _wake(stopped)
        self._heard.set()
        # One that has been woken must not take another step with those that have not left yet.
        grace = 0 if self.me["pid"] in stopped else _SECONDS_TO_LEAVE
        if not self.is_over.wait(grace):
            self._follow()

    def _follow(self) -> None:
        first = self._first
        assert first is not None, "follows nobody"
        process.follow(
            f"Ended with rank {first['rank']} (process {first['pid']} on {first['host']}), which "
            f"ended first: {first['why']}",
            status=first["status"],
        )

    def _end_without_store(self) -> None:
        if self.is_over.wait(self.patience):
            return
        self.without_store = True
        process.end_alone(
            f"error: {self.holder} is gone: ended from outside (by a lack of memory?), or by an "
            "error above. Run the same command again.",
            status=process.LOST,
        )


def _wake(pids: list[int]) -> None:
    """Let stopped ranks go on, so that they end with the others: a batch system, or torchrun, would
    wait for them and then kill them."""
    for pid in pids:
        if process.state_of(pid) == "T":
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGCONT)
