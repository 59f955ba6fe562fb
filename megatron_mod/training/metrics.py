"""What a run measures while it goes: one record at a time, handed to all that show or keep it."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from statistics import fmean
from types import TracebackType
from typing import TYPE_CHECKING, NamedTuple, Protocol

import torch.distributed as dist

from megatron_mod.config.schema import Config
from megatron_mod.model.builder import ModelChunks
from megatron_mod.monitoring.json_lines import LOG, JsonLines
from megatron_mod.monitoring.screen import Screen
from megatron_mod.monitoring.tensorboard import FOLDER, TensorBoard
from megatron_mod.monitoring.timers import NAMES, PartTimers
from megatron_mod.monitoring.weights_and_biases import WeightsAndBiases
from megatron_mod.parallel import device
from megatron_mod.parallel.agree import of_every_rank, on_first_rank
from megatron_mod.parallel.peak import peak
from megatron_mod.parallel.topology import print_once
from megatron_mod.training.operations import Operations

if TYPE_CHECKING:
    from megatron_mod.training.plan import Plan

TFLOP = 10**12
VALIDATION, CHECKPOINT = "validation", "checkpoint"  # what no step is timed with


class Validation(NamedTuple):
    """What a pass over the validation data finds: nats per labelled token, the capacity of each
    router, the share of the dense model's work, and of an exact selection on what share of the
    tokens the causal rule agrees with it."""

    loss: float
    capacity: list[float]
    work: float
    agreement: float | None = None


class Sink(Protocol):
    """Something that takes records, on rank 0."""

    def write(self, record: dict) -> None:
        """Take a record.

        Raises:
            ValueError: it cannot.
        """

    def close(self, *, failed: bool) -> None:
        """Take no more; ``failed``: because the training has ended before its time."""


class Metrics:
    """Counts and measures; all ranks call it alike, and rank 0 keeps what there is to tell.

    As a context it shows the training for the block.
    """

    def __init__(self, config: Config, plan: Plan, model: ModelChunks) -> None:
        self.config, self.routing, self.steps = config, plan.routing, plan.steps
        self.operations = Operations(config, plan, model)  # that this rank does
        self.peak = peak(device.describe(), config.model.dtype)
        self.timers = PartTimers(on=config.logging.timers, model_config=model.config)
        self.tokens = 0
        self.positions = 0
        self.first: dict | None = None
        self.last: dict | None = None
        self._tokens_since = self._steps_since = 0
        self._apart: dict[str, float] = {}
        self._started = self._since = time.perf_counter()
        self._file = JsonLines(Path(config.checkpoint.save) / LOG)
        self._screen = Screen(self.routing, steps=self.steps)
        self._sinks: list[Sink] = [self._file, self._screen] if dist.get_rank() == 0 else []
        self._after, self._run = 0, ""
        self.ending: Callable[[], object] = bool

    def goes_on(self, step: int, state: dict | None = None, *, run: str) -> None:
        """Drop what is recorded of later steps, which will be taken again.

        Args:
            state: the ``state_dict`` of that step; ``None`` at the start of a run.
            run: what all checkpoints of this run say that they belong to.
        """
        if warning := on_first_rank(lambda: self._file.keep_until(step, state)):
            print_once(warning, level=logging.WARNING)
        self._after, self._run = step, run

    def __enter__(self) -> Metrics:
        """Open what shows and keeps records beside ``metrics.jsonl``.

        Raises:
            ValueError: something that is asked for does not start.
        """
        if self._after < self.steps:
            if place := on_first_rank(self._open):
                print_once(f"Weights & Biases: {place}")
            if dist.get_rank() == 0:
                self._screen.open(after=self._after, ending=self.ending)
        self._since = time.perf_counter()
        return self

    def _open(self) -> str | None:
        settings, place = self.config.logging, None
        if settings.tensorboard:
            folder = Path(self.config.checkpoint.save) / FOLDER
            self._sinks.append(TensorBoard(folder, self.routing.places, after=self._after))
        if settings.wandb:
            online = WeightsAndBiases(self.config, self.routing.places, run=self._run)
            self._sinks.append(online)
            place = online.place
        return place

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        for sink in reversed(self._sinks):
            sink.close(failed=kind is not None)

    def part(self, name: str) -> AbstractContextManager[None]:
        """Time the block as a part of each step, if timers are on."""
        return self.timers.part(name)

    @contextlib.contextmanager
    def apart(self, what: str) -> Iterator[None]:
        """Leave the block (``VALIDATION`` or ``CHECKPOINT``), from which all ranks come together,
        out of the time of steps."""
        began = time.perf_counter()
        self._screen.doing(what)
        with self.timers.paused():
            yield
        self._apart[what] = self._apart.get(what, 0.0) + time.perf_counter() - began

    def add_tokens(self, count: int, *, positions: int) -> None:
        """Count a step's tokens, and its positions: the tokens and the padding."""
        self.tokens += count
        self.positions += positions
        self._tokens_since += count
        self._steps_since += 1

    def log(self, step: int, **values: object) -> None:
        """Record a step (counted from 1), and how it went since the last one recorded.

        ``values``: ``loss``, ``task_loss``, ``capacity`` (a list, of each router),
        ``learning_rate``, ``lora_learning_rate`` and ``stand_in_learning_rate`` if adapters or
        stand-ins have their own, ``grad_norm``,
        ``causal_loss`` (nats a token, of all routers together) and ``causal_agreement`` of a
        selection that has a causal rule, ``load_balancing_loss`` (the mean of all gates'; 1: even)
        of mixtures of experts that train,
        ``data_position`` (sequences taken so far), ``penalty``, ``capacity_target`` (mean over the
        routers), ``work`` (share of the dense model's operations) and ``work_target``; targets are
        ``None`` where there is none.
        """
        now = time.perf_counter()
        seconds = max(now - self._since - sum(self._apart.values()), 1e-9)
        record = {
            "step": step,
            **values,
            "capacity_mean": _mean(values["capacity"]),
            "tokens": self.tokens,
            "tokens_per_second": self._tokens_since / seconds,
        }
        self.first = self.first or record
        self.last = record
        self._hand_on({**record, **self._of_ranks(seconds)})
        self._since, self._tokens_since, self._steps_since = now, 0, 0
        self._apart.clear()

    def _of_ranks(self, seconds: float) -> dict:
        """What each rank has of its own; lists are by rank. Called by all ranks."""
        mine = [self.operations.take(), *device.memory_in_use(), *self.timers.take()]
        operations, allocated, at_most, *parts = zip(*of_every_rank(mine), strict=True)
        speeds = [done / seconds for done in operations]
        found: dict = {
            "tflops_per_second": [speed / TFLOP for speed in speeds],
            "share_of_peak": self.peak and [speed / self.peak for speed in speeds],
            "memory_allocated": list(map(int, allocated)),
            "memory_peak": list(map(int, at_most)),
        }
        if self.timers.on:
            slowest = {name: max(each) for name, each in zip(NAMES, parts, strict=True)}
            found["seconds"] = {name: s / self._steps_since for name, s in slowest.items()}
            found["seconds"] |= {k: s for k, s in self._apart.items() if k != VALIDATION}
        return found

    def advance(self, step: int) -> None:
        """A step has been made, recorded or not."""
        self._screen.advance(step)

    def log_validation(
        self, step: int, found: Validation, *, causal: Validation | None = None
    ) -> None:
        """Record what was measured on the validation data, of an exact selection also by its
        ``causal`` rule."""
        record = {
            "step": step,
            "validation_loss": found.loss,
            "validation_capacity": found.capacity,
            "validation_capacity_mean": _mean(found.capacity),
            "validation_work": found.work,
        }
        if causal is not None:
            record |= {
                "validation_loss_causal": causal.loss,
                "validation_capacity_causal_mean": _mean(causal.capacity),
                "causal_agreement": found.agreement,
            }
        if self.timers.on:
            record["seconds"] = {VALIDATION: self._apart[VALIDATION]}
        self._hand_on(record)

    def log_skipped(self, step: int, *, samples: list[str]) -> None:
        """Record a step that was skipped because its loss or a gradient was not finite."""
        self._hand_on({"step": step, "skipped": "not finite", "samples": samples})

    def _hand_on(self, record: dict) -> None:
        """Give a record to each sink.

        Raises:
            ValueError: one cannot take it, and ``checkpoint.on_save_error`` is ``stop``.
        """
        for sink in self._sinks:
            try:
                sink.write(record)
            except ValueError as error:
                if self.config.checkpoint.on_save_error == "stop":
                    raise
                print_once(
                    f"warning: step {record['step']} is not recorded: {error}",
                    level=logging.WARNING,
                )

    def state_dict(self) -> dict:
        return {
            "tokens": self.tokens,
            "positions": self.positions,
            "first": self.first,
            "last": self.last,
            "elapsed": time.perf_counter() - self._started,
            **self._file.state_dict(),
        }

    def load_state_dict(self, state: dict) -> None:
        self.tokens, self.positions = state["tokens"], state["positions"]
        self.first, self.last = state["first"], state["last"]
        self._started = time.perf_counter() - state["elapsed"]

    def has_validation(self, step: int) -> bool:
        """Whether a measurement on the validation data after this step is recorded; all ranks."""
        return on_first_rank(lambda: self._file.has_validation(step))

    def tokens_per_second(self) -> float:
        """Over the whole run so far, validation and checkpoints included."""
        return self.tokens / max(time.perf_counter() - self._started, 1e-9)

    def padding(self) -> float | None:
        """Share of padding in what was trained on so far; nothing before the first step."""
        return 1 - self.tokens / self.positions if self.positions else None


def _mean(capacity: list[float]) -> float:
    """Of the routed layers; where there are none, everything is computed."""
    return fmean(capacity) if capacity else 1.0
