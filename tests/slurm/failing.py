"""Runs a script, with a training step that fails: ``failing.py SCRIPT [arguments]``."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from megatron_mod.training import loop

if __name__ == "__main__":
    take = loop.Training.take

    def fail(self, step: int) -> int:
        if step == 3:
            raise RuntimeError(f"something is wrong in step {step}")
        return take(self, step)

    loop.Training.take = fail
    sys.argv = sys.argv[1:]
    sys.path[0] = str(Path(sys.argv[0]).parent)
    runpy.run_path(sys.argv[0], run_name="__main__")
