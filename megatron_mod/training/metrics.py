"""What a run tells while it goes: progress lines, JSON lines and a summary."""

from __future__ import annotations

import json
import time
from pathlib import Path

import torch.distributed as dist

from megatron_mod.routing.config import RoutingConfig


class Metrics:
    """Writes ``metrics.jsonl`` and the progress lines, on rank 0 only."""

    def __init__(self, run: str | Path, routing: RoutingConfig, *, steps: int) -> None:
        self.path = Path(run) / "metrics.jsonl"
        self.routing = routing
        self.steps = steps
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
        ``learning_rate``, ``grad_norm``.
        """
        now = time.perf_counter()
        record = {
            "step": step,
            **values,
            "tokens": self.tokens,
            "tokens_per_second": self._tokens_since / max(now - self._since, 1e-9),
        }
        self._since, self._tokens_since = now, 0
        self.first = self.first or record
        self.last = record
        capacity = sum(values["capacity"]) / len(values["capacity"])
        self._write(record)
        self._print(
            f"step {step:>{len(str(self.steps))}}/{self.steps}"
            f"  loss {values['loss']:.4f}  capacity {capacity:.3f}"
            f"  {record['tokens_per_second']:.0f} tokens/s  lr {values['learning_rate']:.2e}"
            f"  grad norm {values['grad_norm']:.3f}"
        )

    def log_validation(self, step: int, *, loss: float, capacity: list[float]) -> None:
        """Record a measurement on the validation data, with real skipping."""
        self._write({"step": step, "validation_loss": loss, "validation_capacity": capacity})
        mean = sum(capacity) / len(capacity)
        self._print(
            f"step {step:>{len(str(self.steps))}}/{self.steps}  validation loss {loss:.4f}"
            f"  capacity {mean:.3f}  (pooling: {self.routing.pooling})"
        )

    def tokens_per_second(self) -> float:
        """Over the whole run so far, validation and checkpoints included."""
        return self.tokens / max(time.perf_counter() - self._started, 1e-9)

    def padding(self) -> float | None:
        """Share of padding in what was trained on so far; nothing before the first step."""
        return 1 - self.tokens / self.positions if self.positions else None

    def _write(self, record: dict) -> None:
        if dist.get_rank() == 0:
            with self.path.open("a", encoding="utf-8") as lines:
                lines.write(json.dumps(record) + "\n")

    def _print(self, line: str) -> None:
        if dist.get_rank() == 0:
            print(line, flush=True)
