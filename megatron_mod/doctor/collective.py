"""One all-reduce, by ranks that torchrun starts and that meet as those of a training do."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time

from megatron_mod.process import end_with_torchrun

SECONDS = 180  # for starting the ranks and all they do; a lone machine needs a tenth of it
MODULE = "megatron_mod.doctor.collective"


def try_collective(ranks: int, environment: dict[str, str], *, seconds: float = SECONDS) -> dict:
    """Whether so many ranks on this machine find one another and add up their numbers.

    Returns ``ranks``, ``works``, ``backend`` (``None`` where it did not come to that), ``seconds``
    it took with starting Python, and ``error`` in one line.
    """
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc_per_node", str(ranks), "-m", MODULE]
    began, error = time.monotonic(), None
    with subprocess.Popen(
        command,
        env={"OMP_NUM_THREADS": "1", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as started:
        try:
            out, err = started.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            os.killpg(started.pid, signal.SIGKILL)
            out, err = started.communicate()
            error = f"no answer within {seconds:g} seconds"
    told = re.search(r"^backend (\w+) works$", out, flags=re.MULTILINE)
    if error is None and (started.returncode or not told):
        error = _reason(err)
    return {
        "ranks": ranks,
        "works": error is None,
        "backend": told[1] if told else None,
        "seconds": round(time.monotonic() - began, 1),
        "error": error,
    }


def _reason(text: str) -> str:
    """The line that says most of what torchrun and its ranks printed."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    errors = [line for line in lines if re.search(r"\berror: |\w+(Error|Exception): ", line)]
    own = [line for line in errors if "ChildFailedError" not in line]
    return (own or lines or ["it ended without a word"])[-1]


def main() -> None:
    """What each rank does."""
    end_with_torchrun()
    import torch
    import torch.distributed as dist

    from megatron_mod.parallel import device, topology

    plan = topology.plan(tensor=1, pipeline=1, world_size=topology.environment_world_size())
    with topology.joined(plan, with_megatron=False, minutes=SECONDS / 60):
        numbers = torch.full((1024,), dist.get_rank() + 1.0, device=device.device())
        dist.all_reduce(numbers)
        wanted = plan.world_size * (plan.world_size + 1) / 2
        if not bool((numbers == wanted).all()):
            raise ValueError(f"an all-reduce gave {float(numbers[0])} instead of {wanted}")
        topology.print_once(f"backend {dist.get_backend()} works")


if __name__ == "__main__":
    main()
