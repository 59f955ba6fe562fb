"""``metrics.jsonl``: every record of a run, one JSON object a line."""

from __future__ import annotations

import json
import os
from pathlib import Path

import xxhash

from megatron_mod.checkpoint.folders import append, remove, write_durably

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


class JsonLines:
    """The file while its run goes on."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lines, self._written = 0, xxhash.xxh3_128()

    def write(self, record: dict) -> None:
        """Add a record, whole or not at all.

        Raises:
            ValueError: it cannot be written.
        """
        line = (json.dumps(record) + "\n").encode()
        append(self.path, line)
        self._lines += 1
        self._written.update(line)

    def close(self, *, failed: bool) -> None:
        """Nothing is left to write."""

    def state_dict(self) -> dict:
        return {"lines": self._lines, "lines_xxh3_128": self._written.hexdigest()}

    def keep_until(self, step: int, state: dict | None) -> str | None:
        """Drop the lines of later steps, which will be taken again, and one that was cut short.

        No line is needed to go on, so what has become of them is told and stops nothing; a file
        that is not what was written is kept under another name.

        Args:
            state: the ``state_dict`` of that step; ``None`` at the start of a run.

        Returns:
            A warning, if there is anything to tell.
        """
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
        """Whether there is a measurement on the validation data after this step."""
        records = (record for _, record in read_log(self.path)[0])
        return any(r["step"] == step and "validation_loss" in r for r in records)
