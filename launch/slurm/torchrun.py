"""``torchrun`` for a batch job, with two differences.

Its exit status is that of its first rank that failed, by which the job tells a training that a
signal stopped from a mistake. And a signal goes to the ranks, for as long as they take to save:
torchrun itself gives them 30 s, and ends at once on SIGUSR1.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading

import psutil

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
LEVEL = "TORCH_CPP_LOG_LEVEL"


def main(arguments: list[str]) -> None:
    for number in SIGNALS:
        signal.signal(number, hand_on)
    status: list[int] = []
    # Away from the main thread torchrun leaves signals alone.
    agent = threading.Thread(target=lambda: status.append(run_ranks(arguments)), name="agent")
    agent.start()
    agent.join()
    sys.exit(status[0] if status else 1)


def run_ranks(arguments: list[str]) -> int:
    """What this node's ranks leave with: 0, or the first failure's exit status, as shells count."""
    # The nodes do not leave in the same moment, of which torch warns at length. Not for the ranks.
    logging.getLogger("torch.distributed.elastic").setLevel(logging.ERROR)
    asked = os.environ.get(LEVEL)
    os.environ.setdefault(LEVEL, "ERROR")
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous import RendezvousConnectionError
    from torch.distributed.run import parse_args, run

    if asked is None:
        del os.environ[LEVEL]
    try:
        run(parse_args(arguments))
    except ChildFailedError as error:
        status = error.get_first_failure()[1].exitcode
        return status if status >= 0 else 128 - status
    except RendezvousConnectionError:
        return 1  # the first node has left, which knows why
    return 0


def hand_on(number: int, frame: object) -> None:
    for rank in psutil.Process().children():
        rank.send_signal(number)


if __name__ == "__main__":
    main(sys.argv[1:])
