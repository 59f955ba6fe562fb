"""The tools, run in the test's own process, which is a world of one rank."""

from __future__ import annotations

from importlib import import_module

import pytest

from megatron_mod.parallel import topology


def run_tool(monkeypatch: pytest.MonkeyPatch, name: str, *arguments: object) -> int:
    """A tool's exit status; the fixture ``single_process`` has to be there."""
    with monkeypatch.context() as context:
        for function in ("initialize", "shutdown"):
            context.setattr(topology, function, lambda *args, **kwargs: None)
        command = import_module(f"megatron_mod.commands.{name.removesuffix('.py')}")
        try:
            command.main([str(argument) for argument in arguments])
        except SystemExit as end:
            return end.code or 0
    return 0
