"""A training that is asked to end, by a signal or a limit: it saves at the end of the step, then
leaves."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable

from megatron_mod import process
from megatron_mod.config.schema import TrainConfig
from megatron_mod.parallel.agree import largest

_SECONDS_BETWEEN_TWO_ORDERS = 1  # one order may come twice, from a batch system and from torchrun
_SECONDS_UNTIL_ANNOUNCED = 2
_SECONDS_WITHOUT_TORCHRUN = 30  # as many as torchrun itself gives a rank
EXIT_DURATION, EXIT_INTERVAL = 1001, 1002  # what asks, beside the numbers of signals


class StopRequest:
    """What signals and the time have asked of this rank, and what the ranks make of it together.

    It is a rank's own until ``agreed``; whichever ranks a signal reached, all of them end alike.
    """

    def __init__(self) -> None:
        self.minutes: float | None = None
        """Since the job began that are granted it; ``None``: all."""
        self._asked: signal.Signals | None = None
        self._since = 0.0
        process.on_signal(self._ask)
        if process.catches_signals():
            process.end_with_torchrun(signal.SIGTERM)  # an order too, not the loss of all steps
            sys.stdout, sys.stderr = process.Unread(sys.stdout), process.Unread(sys.stderr)

    def _ask(self, number: signal.Signals) -> None:
        """Take a signal, in a thread of its own. After Ctrl-C a second one ends the rank at once.

        (torchrun makes a second Ctrl-C a SIGTERM.)
        """
        if number == signal.SIGTERM and process.loses_another():
            os._exit(0)  # torchrun ends this rank: there is nobody left to agree with
        if process.torchrun_is_gone():
            _after(_SECONDS_WITHOUT_TORCHRUN, lambda: os.kill(os.getpid(), signal.SIGKILL))
        if self._asked is None:
            self._asked, self._since = number, time.monotonic()
            if process.is_first_rank():
                _after(_SECONDS_UNTIL_ANNOUNCED, self._announce)
        elif (
            self._asked == signal.SIGINT
            and number in (signal.SIGINT, signal.SIGTERM)
            and time.monotonic() - self._since > _SECONDS_BETWEEN_TWO_ORDERS
        ):
            os._exit(128 + number)

    def _announce(self) -> None:
        again = "; Ctrl-C again ends at once" if self._asked == signal.SIGINT else ""
        print(
            f"{self._asked.name}: ending after this step, which is saved first{again}.",
            file=sys.stderr,
            flush=True,
        )

    @property
    def asked(self) -> int:
        """The signal that this rank got, ``EXIT_DURATION`` or 0: for ``largest`` to carry along."""
        if self._asked is None and self.minutes is not None:
            return EXIT_DURATION if process.seconds_of_job() > 60 * self.minutes else 0
        return self._asked or 0

    def agreed(self) -> int:
        """The largest ``asked`` of all ranks, which call it together."""
        (number,) = largest(self.asked)
        return int(number)


def _after(seconds: float, act: Callable[[], None]) -> None:
    timer = threading.Timer(seconds, act)
    timer.daemon = True
    timer.start()


def stopped(
    asked: int, train: TrainConfig, *, step: int, steps: int, run: object
) -> process.Stopped:
    """The end of a run that was ``asked`` to stop after a step, which has been saved."""
    if asked == EXIT_DURATION:
        by = f"train.exit_duration = {train.exit_duration:g} minutes"
    elif asked == EXIT_INTERVAL:
        by = f"train.exit_interval = {train.exit_interval}"
    else:
        by = signal.Signals(asked).name
    return process.Stopped(
        f"Stopped by {by} after step {step} of {steps}, which is saved in {run}; run the same "
        "command again to go on."
    )
