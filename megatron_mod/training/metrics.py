"""What a run tells while it goes: progress lines, JSON lines and a summary."""

from __future__ import annotations

import contextlib
import json
import os
import time
from pathlib import Path
from statistics import fmean

import torch.distributed as dist
import xxhash

from megatron_mod.checkpoint.folders import remove, write_durably, writing
from megatron_mod.parallel.agree import on_first_rank
from megatron_mod.routing.config import RoutingConfig

LOG = "metrics.jsonl"


def read_log(path: Path) -> tuple[list[tuple[str, dict]], str | None]:
    """The lines of a run's log that are whole, each with its record, and what kept it from being
    read whole, if anything did. A run that goes on may be writing the last line."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return [], "is missing"
    except OSError as error:
        return [], f"cannot be read ({error.strerror})"
    found, bad = [], []
    for number, raw in enumerate(content.split(b"\n")[:-1], start=1):
        try:
            line = raw.decode("utf-8")
            record = json.loads(line)
            found.append((line + "\n", {**record, "step": int(record["step"])}))
        except (ValueError, TypeError, KeyError, OverflowError, RecursionError):
            bad.append(number)
    return found, f"line {bad[0]} is no record" if bad else None


class Metrics:
    """Writes ``metrics.jsonl`` and the progress lines, on rank 0 only."""

    def __init__(
        self, run: str | Path, routing: RoutingConfig, *, steps: int, on_error: str = "stop"
    ) -> None:
        """``on_error``: ``stop``, or ``continue`` without the lines that cannot be written."""
        self.path = Path(run) / LOG
        self.routing = routing
        self.steps = steps
        self.on_error = on_error
        self.tokens = 0
        self.positions = 0
        self.first: dict | None = None
        self.last: dict | None = None
        self._tokens_since = 0
        self._lines, self._written = 0, xxhash.xxh3_128()
        self._started = self._since = time.perf_counter()

    def add_tokens(self, count: int, *, positions: int) -> None:
        """Count a step's tokens, and its positions: the tokens and the padding."""
        self.tokens += count
        self.positions += positions
        self._tokens_since += count

    def log(self, step: int, **values: object) -> None:
        """Record a step (counted from 1): a line on the screen, a line in the file.

        ``values``: ``loss``, ``task_loss``, ``capacity`` (list per routed layer),
        ``learning_rate``, ``grad_norm``, ``data_position`` (sequences taken so far).
        """
        now = time.perf_counter()
        capacity = fmean(values["capacity"])
        record = {
            "step": step,
            **values,
            "capacity_mean": capacity,
            "tokens": self.tokens,
            "tokens_per_second": self._tokens_since / max(now - self._since, 1e-9),
        }
        self._since, self._tokens_since = now, 0
        self.first = self.first or record
        self.last = record
        self._write(record)
        self._print(
            f"step {step:>{len(str(self.steps))}}/{self.steps}"
            f"  loss {values['loss']:.4f}  capacity {capacity:.3f}"
            f"  {record['tokens_per_second']:.0f} tokens/s  lr {values['learning_rate']:.2e}"
            f"  grad norm {values['grad_norm']:.3f}"
        )

    def log_validation(self, step: int, *, loss: float, capacity: list[float]) -> None:
        """Record a measurement on the validation data, with real skipping."""
        mean, pooling = fmean(capacity), self.routing.pooling
        measured = {"validation_loss": loss, "validation_capacity": capacity}
        self._write({"step": step, **measured, "validation_capacity_mean": mean})
        self._print(
            f"step {step:>{len(str(self.steps))}}/{self.steps}  validation loss {loss:.4f}"
            f"  capacity {mean:.3f}{f'  (pooling: {pooling})' if pooling else ''}"
        )

    def log_skipped(self, step: int, *, samples: list[str]) -> None:
        """Record a step that was skipped because its loss or a gradient was not finite."""
        self._write({"step": step, "skipped": "not finite", "samples": samples})
        self._print(f"step {step:>{len(str(self.steps))}}/{self.steps}  skipped: not finite")

    def state_dict(self) -> dict:
        elapsed = time.perf_counter() - self._started
        return {
            "tokens": self.tokens,
            "positions": self.positions,
            "first": self.first,
            "last": self.last,
            "elapsed": elapsed,
            "lines": self._lines,
            "lines_xxh3_128": self._written.hexdigest(),
        }

    def load_state_dict(self, state: dict) -> None:
        self.tokens, self.positions = state["tokens"], state["positions"]
        self.first, self.last = state["first"], state["last"]
        self._started = time.perf_counter() - state["elapsed"]

    def continue_after(self, step: int, state: dict | None = None) -> None:
        """Drop the lines of later steps, which will be taken again, and one that was cut short.

        No line is needed to go on, so what has become of them is said and stops nothing; a file
        that is not what was written is kept under another name.

        Args:
            state: the ``state_dict`` of that step; ``None`` at the start of a run.
        """
        if warning := on_first_rank(lambda: self._keep_until(step, state)):
            self._print(warning)

    def _keep_until(self, step: int, state: dict | None) -> str | None:
        lines, problem = read_log(self.path)
        kept = [line for line, record in lines if record["step"] <= step]
        text = "".join(kept)
        self._lines, self._written = len(kept), xxhash.xxh3_128(text.encode())
        is_file = self.path.is_file()
        if state is None and (is_file or not os.path.lexists(self.path)):
            as_written = True  # what an attempt without a checkpoint leaves is dropped
        else:
            as_written = state is not None and self._written.hexdigest() == state["lines_xxh3_128"]
        aside = None
        if not as_written and os.path.lexists(self.path):
            aside = self.path.with_name(f"{self.path.name}.damaged")
            if os.path.lexists(aside):
                remove(aside)
            self.path.replace(aside)
        if text or is_file:
            write_durably(self.path, text)
        if as_written:
            return None
        expected = state["lines"] if state else 0
        gap = f"a gap of {expected - len(kept)} lines" if expected > len(kept) else "changed lines"
        return (
            f"warning: {self.path}: {problem or 'is not what the run wrote'}: {gap} up to step "
            f"{step}, of {expected}. Going on with the {len(kept)} that can be read"
            + (f"; the file as it was is {aside.name}." if aside else ".")
        )

    def has_validation(self, step: int) -> bool:
        """Whether the file has a measurement on the validation data after this step; all ranks."""
        return on_first_rank(lambda: self._has_validation(step))

    def _has_validation(self, step: int) -> bool:
        records = (record for _, record in read_log(self.path)[0])
        return any(r["step"] == step and "validation_loss" in r for r in records)

    def tokens_per_second(self) -> float:
        """Over the whole run so far, validation and checkpoints included."""
        return self.tokens / max(time.perf_counter() - self._started, 1e-9)

    def padding(self) -> float | None:
        """Share of padding in what was trained on so far; nothing before the first step."""
        return 1 - self.tokens / self.positions if self.positions else None

    def _write(self, record: dict) -> None:
        if dist.get_rank() != 0:
            return
        line = json.dumps(record) + "\n"
        size = self.path.stat().st_size if self.path.exists() else 0
        try:
            with writing(self.path), self.path.open("a", encoding="utf-8") as lines:
                lines.write(line)
        except ValueError as error:
            with contextlib.suppress(OSError):
                os.truncate(self.path, size)
            if self.on_error == "stop":
                raise
            self._print(f"warning: step {record['step']} is not recorded: {error}")
        else:
            self._lines += 1
            self._written.update(line.encode())

    def _print(self, line: str) -> None:
        if dist.get_rank() == 0:
            print(line, flush=True)
