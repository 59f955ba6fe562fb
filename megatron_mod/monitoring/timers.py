"""How long the parts of a step take."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from megatron.core import Timers

PARTS = ("data", "forward_backward", "optimizer")
WITHIN = {"forward-compute": "forward", "backward-compute": "backward"}  # Megatron's own names
NAMES = (*PARTS, *WITHIN.values())
_OFF, _OURS, _MEGATRONS = 0, 1, 2  # Megatron's levels


class PartTimers:
    """Megatron's timers; they wait for the device at each border, and so do nothing unless on.

    What its schedules time of their own is taken too: the forward and backward passes, which leave
    of ``forward_backward`` what a pipeline's rank waits for others.
    """

    def __init__(self, *, on: bool, model_config: Any) -> None:
        """``model_config``: of the model that the schedules run."""
        self.on = on
        self._timers = Timers(_MEGATRONS if on else _OFF, "max")
        self._model_config = model_config
        if on:
            model_config.timers = self._timers

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Time the block as one of ``PARTS``."""
        timer = self._timers(name, log_level=_OURS)
        timer.start()
        yield
        timer.stop()

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Leave out what the model does in the block."""
        self._model_config.timers = None
        try:
            yield
        finally:
            self._model_config.timers = self._timers if self.on else None

    def take(self) -> list[float]:
        """Seconds of each of ``NAMES`` on this rank since they were last taken; none if off."""
        if not self.on:
            return []
        timers = [self._timers(name, log_level=_OURS) for name in PARTS]
        timers += [self._timers(name, log_level=_MEGATRONS) for name in WITHIN]
        return [timer.elapsed(reset=True) for timer in timers]
