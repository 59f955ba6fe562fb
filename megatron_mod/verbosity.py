"""How much is said: lines of this package, and what libraries log."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator

LEVELS = {
    "debug": logging.DEBUG,
    "info": logging.INFO,
    "warning": logging.WARNING,
    "error": logging.ERROR,
}
PACKAGE = "megatron_mod"
LIBRARIES = ("megatron", "megatron.core", "transformers", "datasets", "torch.distributed")
_FORMAT = "%(levelname)s %(name)s (rank {rank}): %(message)s"
_level = logging.INFO


def says(level: int = logging.INFO) -> bool:
    """Whether lines of this level are said."""
    return level >= _level


@contextlib.contextmanager
def at(name: str) -> Iterator[None]:
    """Say, for the block, what is at least at this level (a key of ``LEVELS``).

    ``debug`` adds what the libraries log, of all ranks. Otherwise theirs is left as it is, below an
    error of the first rank alone: all ranks meet the same warnings, and they are said once.
    """
    global _level
    level, rank = LEVELS[name], int(os.environ.get("RANK", 0))
    before = _level
    logged = max(level, logging.ERROR) if rank and level > logging.DEBUG else level
    changed: tuple[str, ...] = (PACKAGE,)
    if logged != logging.INFO and logged != logging.WARNING:
        changed += (*LIBRARIES, "py.warnings")
    levels = {each: logging.getLogger(each).level for each in changed}
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter(_FORMAT.format(rank=rank)))
    _level = level
    for each in changed:
        logging.getLogger(each).setLevel(logged)
    if logged >= logging.ERROR:
        logging.captureWarnings(True)
    if level == logging.DEBUG and before > logging.DEBUG:  # else a block around this one has
        logging.getLogger().addHandler(handler)
    try:
        yield
    finally:
        _level = before
        for each, its in levels.items():
            logging.getLogger(each).setLevel(its)
        if logged >= logging.ERROR:
            logging.captureWarnings(False)
        logging.getLogger().removeHandler(handler)


def tell_libraries(name: str) -> None:
    """Have libraries that set their own level when they are imported, and progress bars, follow;
    call before importing them. What the environment already says holds."""
    if name in ("debug", "error"):
        for library in ("TRANSFORMERS", "DATASETS"):
            os.environ.setdefault(f"{library}_VERBOSITY", name)
    if LEVELS[name] > logging.INFO:
        os.environ["TQDM_DISABLE"] = "1"
