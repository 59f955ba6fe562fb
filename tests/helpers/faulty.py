"""``launch/pretrain_router.py`` with a fault in one rank: FAULT (``bug``, ``kill`` or ``stop``) in
the FAULT_CALL-th schedule of the ranks FAULT_RANK, unless torchrun has started them again."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from megatron_mod.commands.train import main


def break_steps() -> None:
    """Have the rank of the fault fall over in its schedule."""
    from megatron_mod.training import loop

    run_schedule, calls = loop.run_schedule, []

    def faulty(*args: object, **kwargs: object) -> object:
        calls.append(0)
        if len(calls) == int(os.environ["FAULT_CALL"]):
            fault = os.environ["FAULT"]
            if fault == "bug":
                raise ZeroDivisionError("a bug")
            os.kill(os.getpid(), {"kill": signal.SIGKILL, "stop": signal.SIGSTOP}[fault])
        return run_schedule(*args, **kwargs)

    loop.run_schedule = faulty


if __name__ == "__main__":
    os.environ["TORCH_CPP_LOG_LEVEL"] = "ERROR"  # as the script would, before torch is imported
    is_first_start = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0"
    if is_first_start and os.environ["RANK"] in os.environ["FAULT_RANK"].split():
        break_steps()
    main()
