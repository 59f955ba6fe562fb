"""Whether a training that has ended early is to be started again, of which the batch job asks:
``may_requeue.py STATUS [the training's arguments]``. If not, one message, and exit status 1."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from megatron_mod.config import cli
from megatron_mod.training.restarts import why_not_again

if __name__ == "__main__":
    run = Path(cli.parse(sys.argv[2:]).checkpoint.save)
    if reason := why_not_again(run, status=int(sys.argv[1])):
        sys.exit(f"error: {reason}")
