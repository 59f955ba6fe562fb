"""What a run tells while it goes: progress lines, JSON lines and a summary."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from statistics import fmean

import torch.distributed as dist

from megatron_mod.folders import write_durably
from megatron_mod.parallel.agree import on_first_rank
from megatron_mod.routing.config import RoutingConfig


class Metrics:
    """Writes ``metrics.jsonl`` and the progress lines, on rank 0 only."""

    def __init__(
        self, run: str | Path, routing: RoutingConfig, *, steps: int, on_error: str = "stop"
    ) -> None:
        """``on_error``: ``stop``, or ``continue`` without the lines that cannot be written."""
        self.path = Path(run) / "metrics.jsonl"
        self.routing = routing
        self.steps = steps
        self.on_error = on_error
        self.tokens = 0
        self.positions = 0
        self.first: dict | None = None
        self.last: dict | None = None
        self._tokens_since = 0
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
        counts = {"tokens": self.tokens, "positions": self.positions}
        return {**counts, "first": self.first, "last": self.last, "elapsed": elapsed}

    def load_state_dict(self, state: dict) -> None:
        self.tokens, self.positions = state["tokens"], state["positions"]
        self.first, self.last = state["first"], state["last"]
        self._started = time.perf_counter() - state["elapsed"]

    def continue_after(self, step: int) -> None:
        """Drop the lines of later steps, which will be taken again, and one that was cut short."""
        on_first_rank(lambda: self._keep_until(step))

    def _keep_until(self, step: int) -> None:
        if not self.path.exists():
            return
        kept = []
        for line in self.path.read_text(encoding="utf-8").splitlines(keepends=True):
            if line.endswith("\n") and json.loads(line)["step"] <= step:
                kept.append(line)
        write_durably(self.path, "".join(kept))

    def has_validation(self, step: int) -> bool:
        """Whether the file has a measurement on the validation data after this step; all ranks."""
        return on_first_rank(lambda: self._has_validation(step))

    def _has_validation(self, step: int) -> bool:
        if not self.path.exists():
            return False
        with self.path.open(encoding="utf-8") as lines:
            records = (json.loads(line) for line in lines)
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
        size = self.path.stat().st_size if self.path.exists() else 0
        try:
            with self.path.open("a", encoding="utf-8") as lines:
                lines.write(json.dumps(record) + "\n")
        except OSError as error:
            os.truncate(self.path, size)
            if self.on_error == "stop":
                raise ValueError(
                    f"{self.path}: cannot be written: {error.strerror}; make room and run the same "
                    "command again."
                ) from error
            self._print(f"warning: {self.path}: step {record['step']} not recorded: {error}")

    def _print(self, line: str) -> None:
        if dist.get_rank() == 0:
            print(line, flush=True)
