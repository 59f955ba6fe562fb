"""Runs parts one after the other, each in a process of its own, and keeps what they found."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

PASSED, FAILED, OUT_OF_TIME, LEFT_OUT = "passed", "failed", "out of time", "left out"
TAIL = 20  # lines of a part's output that are kept in the report
LEAST = 5.0  # seconds that are worth beginning a part with
GRACE = 5.0  # seconds between asking a part to end and ending it


@dataclass(frozen=True)
class Part:
    """Something to run.

    Args:
        name: in the report.
        command: from the repository's root.
        seconds: at most.
        figures: reads what it wrote; asked however it ended, and may fail.
        is_needed: whether nothing follows if it fails.
    """

    name: str
    command: Sequence[str]
    seconds: float
    figures: Callable[[], dict] | None = None
    is_needed: bool = False


class Runner:
    """Runs parts as long as there is time; the report is written before and after each.

    Args:
        report: file for it.
        logs: folder for the parts' output.
        cwd: where parts run.
        seconds: for all parts together, from now on.
    """

    def __init__(self, report: Path, logs: Path, *, cwd: Path, seconds: float) -> None:
        self.path, self.logs, self.cwd = report, logs, cwd
        self.ends = time.monotonic() + seconds
        self.report: dict = {"seconds": seconds, "complete": False, "parts": {}}
        logs.mkdir(parents=True, exist_ok=True)
        self._write()

    def run(self, parts: Sequence[Part]) -> bool:
        """Run them; whether all ran and passed."""
        needed = True
        for part in parts:
            if not needed or self._left() < LEAST:
                why = "no time was left" if needed else "what it needs failed"
                self._note(part, {"status": LEFT_OUT, "why": why})
                continue
            found = self._run(part)
            self._note(part, found)
            needed = needed and not (part.is_needed and found["status"] != PASSED)
        self.report["complete"] = True
        self._write()
        return all(one["status"] == PASSED for one in self.report["parts"].values())

    def _left(self) -> float:
        return self.ends - time.monotonic()

    def _run(self, part: Part) -> dict:
        log = self.logs / f"{part.name.replace(' ', '_')}.log"
        began, most = time.monotonic(), min(part.seconds, self._left())
        self._note(part, {"status": "running", "at_most": round(most, 1)}, quiet=True)
        with log.open("wb") as out:
            process = subprocess.Popen(
                list(part.command), cwd=self.cwd, stdout=out, stderr=out, start_new_session=True
            )
            try:
                status = PASSED if process.wait(most) == 0 else FAILED
            except subprocess.TimeoutExpired:
                status = OUT_OF_TIME
            finally:  # whatever it has left behind, too, and if this process is to end itself
                end_group(process)
        found = {"status": status, "seconds": round(time.monotonic() - began, 1)}
        if part.figures is not None:
            try:
                found["figures"] = part.figures()
            except (OSError, ValueError, KeyError, TypeError) as error:
                found["no_figures"] = f"{type(error).__name__}: {error}"
                if status == PASSED:
                    found["status"] = FAILED
        if found["status"] != PASSED:
            found["exit_status"] = process.returncode
            found["output"] = log.read_text(errors="replace").splitlines()[-TAIL:]
        return found

    def _note(self, part: Part, found: dict, *, quiet: bool = False) -> None:
        self.report["parts"][part.name] = found
        self._write()
        if not quiet:
            seconds = f"{found['seconds']:7.1f} s" if "seconds" in found else " " * 9
            print(
                f"{part.name:<24} {found['status']:<12} {seconds}  {self._words(found)}", flush=True
            )

    @staticmethod
    def _words(found: dict) -> str:
        summary = found.get("figures", {}).get("summary")
        last = found.get("output") or [""]
        return str(summary or found.get("why") or (last[-1] if found["status"] != PASSED else ""))

    def _write(self) -> None:
        new = self.path.with_suffix(".new")
        new.write_text(json.dumps(self.report, indent=1, default=str) + "\n", encoding="utf-8")
        new.replace(self.path)


def end_group(process: subprocess.Popen) -> None:
    """End a process that leads a group, and all of the group: asked first, then made to."""
    for number, seconds in ((signal.SIGTERM, GRACE), (signal.SIGKILL, GRACE)):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            process.poll()
            try:
                os.killpg(process.pid, 0)
            except ProcessLookupError:
                return
            time.sleep(0.05)


def read_json(path: Path, *keys: str) -> Callable[[], dict]:
    """Reads a JSON object, or these entries of it."""

    def read() -> dict:
        values = json.loads(path.read_text(encoding="utf-8"))
        values = values if isinstance(values, dict) else {"rows": values}
        return {key: values[key] for key in keys} if keys else values

    return read


def read_lines(path: Path, last: int) -> Callable[[], dict]:
    """The last lines of a text."""
    return lambda: {"lines": path.read_text(errors="replace").splitlines()[-last:]}
