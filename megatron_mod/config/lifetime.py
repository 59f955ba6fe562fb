"""No process of a job outlives it."""

from __future__ import annotations

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1  # <linux/prctl.h>


def end_with_torchrun() -> None:
    """Have the kernel end this rank when the torchrun that started it is gone, even by ``kill -9``.

    A rank that goes on would hold the output folder, and write to it. Elsewhere than on Linux, or
    without torchrun, nothing changes: a shell may well end before what it started.
    """
    if sys.platform == "linux" and "TORCHELASTIC_RUN_ID" in os.environ:
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
