"""The scripts under tools/, run in the test's own process, which is a world of one rank."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest

from megatron_mod.parallel import topology

TOOLS = Path(__file__).resolve().parents[2] / "tools"


def run_tool(monkeypatch: pytest.MonkeyPatch, name: str, *arguments: object) -> int:
    """A script's exit status; the fixture ``single_process`` has to be there."""
    with monkeypatch.context() as context:
        context.setattr(sys, "argv", [str(TOOLS / name), *map(str, arguments)])
        for function in ("initialize", "shutdown"):
            context.setattr(topology, function, lambda *args, **kwargs: None)
        try:
            runpy.run_path(str(TOOLS / name), run_name="tool")["main"]()
        except SystemExit as end:
            return end.code or 0
    return 0
