"""How a mistake of the user's reaches the user."""

from __future__ import annotations

import contextlib
import os
import sys
import time
import traceback
from collections.abc import Iterator
from pathlib import Path

SECONDS_TO_SPEAK = 5


@contextlib.contextmanager
def one_message() -> Iterator[None]:
    """Turn a ``ValueError`` this package raised into one message, from one rank, and exit status 2.

    The script that was started counts as the package. What a library raised goes through with its
    traceback: it is not about the user's input.
    """
    try:
        yield
    except ValueError as error:
        if not _raised_here(error):
            raise
        if int(os.environ.get("RANK", 0)) == 0:
            print(f"error: {error}", file=sys.stderr, flush=True)
        else:
            # The first rank to end makes torchrun end the others: let it be the one that speaks.
            time.sleep(SECONDS_TO_SPEAK)
        sys.exit(2)


def _raised_here(error: BaseException) -> bool:
    frames = traceback.extract_tb(error.__traceback__)
    last, script = Path(frames[-1].filename).resolve(), Path(sys.argv[0]).resolve()
    return last == script or last.is_relative_to(Path(__file__).resolve().parents[1])
