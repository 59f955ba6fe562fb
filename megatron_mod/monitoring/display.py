"""A training on a terminal: progress, numbers, and a bar for each routed layer."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from statistics import fmean
from typing import Any

from rich.console import (
    Console,
    ConsoleOptions,
    ConsoleRenderable,
    RenderableType,
    RenderResult,
)
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from megatron_mod.routing.config import RoutingConfig

SECONDS_BETWEEN_DRAWINGS = 0.2
OTHER_LINES = 8  # of the screen's, which bars leave free
BAR, GAP = 8, 2  # columns of a bar at least, and between two
EIGHTHS = " ▁▂▃▄▅▆▇█"
_FULL, _EMPTY, _TARGET = "━", "─", "┿"
_ASCII = str.maketrans("━─┿", "#-|")


class Display:
    """Redraws itself below what is printed, when a step has been made and not in between: what
    another process prints while this one waits stays as it is, and so does everything once the
    training is to end, which others have to say something about. The cursor is never hidden, so
    that no end of the process, however sudden, leaves it so.
    """

    def __init__(
        self, routing: RoutingConfig, *, steps: int, after: int, ending: Callable[[], object]
    ) -> None:
        """``after``: the step that the run goes on from, or 0; ``ending``: whether it is to end."""
        self.routing, self.steps = routing, steps
        self.step = self._first = after
        self.record: dict = {}
        self.what = ""
        self._began = self._drawn = time.monotonic()
        self.console = _Console(file=sys.stdout, highlight=False, soft_wrap=True)
        self._live = _Live(
            ending,
            get_renderable=lambda: self,
            console=self.console,
            auto_refresh=False,
            redirect_stderr=sys.stderr.isatty(),
        )
        self._handlers: list[logging.StreamHandler] = []

    def start(self) -> None:
        before = sys.stderr
        self._live.start(refresh=True)
        # Libraries' handlers print past sys.stderr, to what it was when they were made.
        self._handlers = [each for each in _handlers() if each.stream in (before, sys.__stderr__)]
        for handler in self._handlers:
            handler.setStream(sys.stderr)

    def stop(self, *, failed: bool) -> None:
        """``failed``: leave what is there as it is."""
        self.what = ""
        self._live.is_left = failed
        self._live.stop()
        for handler in self._handlers:
            handler.setStream(sys.stderr)

    def advance(self, step: int) -> None:
        self.step, self.what = step, ""
        self._draw()

    def doing(self, what: str) -> None:
        self.what = what
        self._draw(at_once=True)

    def show(self, record: dict) -> None:
        self.step, self.record = record["step"], record
        self._draw(at_once=record["step"] == self.steps)

    def _draw(self, *, at_once: bool = False) -> None:
        now = time.monotonic()
        if at_once or now - self._drawn >= SECONDS_BETWEEN_DRAWINGS:
            self._drawn = now
            self._live.refresh()

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        options = options.update(no_wrap=False, overflow="fold")
        parts: list[RenderableType] = [self._progress(options)]
        if self.record:
            parts += [*self._numbers(options.max_width), *self._capacities(options)]
        for part in (*parts, Text("")):  # where another process may begin a line
            yield from console.render(part, options)

    def _progress(self, options: ConsoleOptions) -> RenderableType:
        gone, made = time.monotonic() - self._began, self.step - self._first
        left = f"{_clock(gone / made * (self.steps - self.step))} left" if made else "-:-- left"
        table = Table.grid(padding=(0, 1), expand=True)
        table.add_column(no_wrap=True, overflow="crop")
        table.add_column(ratio=1)
        table.add_column(no_wrap=True, overflow="crop")
        table.add_row(
            Text(f"step {self.step}/{self.steps}", "bold"),
            ProgressBar(total=max(self.steps, 1), completed=self.step),
            Text(f"{self.what}... " if self.what else "", "yellow") + Text(left),
        )
        return table

    def _numbers(self, width: int) -> Iterator[Text]:
        """As many of them a line as there is room for."""
        record, line = self.record, Text()
        held = "capacity" if self.routing.work is None else "work"
        numbers = {
            "loss": f"{record['loss']:.4f}",
            "capacity": f"{record['capacity_mean']:.3f}",
            **({} if held == "capacity" else {held: f"{record[held]:.3f}"}),
            "target": f"{record[f'{held}_target']:.3f}",
            "tokens/s": f"{record['tokens_per_second']:.0f}",
            "lr": f"{record['learning_rate']:.2e}",
            "grad norm": f"{record['grad_norm']:.3f}",
        }
        if record["share_of_peak"]:
            numbers["of peak"] = f"{fmean(record['share_of_peak']):.0%}"
        numbers["gone"] = _clock(time.monotonic() - self._began)
        for name, value in numbers.items():
            number = Text(f"{name} ", "dim") + Text(value, "not dim")
            if line and len(line) + GAP + len(number) > width:
                yield line
                line = Text()
            line += Text(" " * GAP * bool(line)) + number
        yield line

    def _capacities(self, options: ConsoleOptions) -> Iterator[RenderableType]:
        """A bar for each router, or a letter where the screen has no room for that."""
        labels, shares = self.routing.labels, self.record["capacity"]
        if not labels:
            return
        digits, width = max(map(len, labels)), options.max_width
        label = digits + len("  0.00")  # number, space, bar, space, share
        columns = max(1, (width + GAP) // (label + BAR + GAP))
        rows = -(-len(labels) // columns)
        if rows > options.size.height - OTHER_LINES or label + BAR > width:
            yield Text(f"capacity of layers {labels[0]} to {labels[-1]}", "dim")
            marks = " .:-=+*#@" if options.ascii_only else EIGHTHS
            yield Text("".join(marks[round(share * 8)] for share in shares), "cyan")
            return
        columns = -(-len(labels) // rows)
        bar = min(24, (width + GAP) // columns - GAP - label)
        target = self.record["capacity_target"]
        cells = [
            Text(f"{label:>{digits}} ", "dim") + _bar(share, target, bar) + f" {share:.2f}"
            for label, share in zip(labels, shares, strict=True)
        ]
        for row in range(rows):
            line = Text(" " * GAP).join(cells[row::rows])
            yield Text(line.plain.translate(_ASCII)) if options.ascii_only else line


class _Live(Live):
    def __init__(self, ending: Callable[[], object], **options: Any) -> None:
        super().__init__(**options)
        self.ending, self.is_left = ending, False

    def process_renderables(self, renderables: list[ConsoleRenderable]) -> list[ConsoleRenderable]:
        self.is_left = self.is_left or bool(self.ending())
        return renderables if self.is_left else super().process_renderables(renderables)


class _Console(Console):
    def show_cursor(self, show: bool = True) -> bool:
        return False


def _bar(share: float, target: float | None, width: int) -> Text:
    """A share of 1, with a mark at its target, if it has one."""
    full = round(share * width)
    text = Text(_FULL * full, "cyan") + Text(_EMPTY * (width - full), "dim")
    if target is None:
        return text
    mark = min(round(target * width), width - 1)
    return text[:mark] + Text(_TARGET, "yellow") + text[mark + 1 :]


def _clock(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))


def _handlers() -> Iterator[logging.StreamHandler]:
    for logger in (logging.getLogger(), *logging.Logger.manager.loggerDict.values()):
        for handler in getattr(logger, "handlers", ()):
            if isinstance(handler, logging.StreamHandler) and hasattr(handler, "setStream"):
                yield handler
