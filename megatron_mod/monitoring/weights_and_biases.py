"""A run at Weights & Biases, or in ``wandb/`` of its folder for later."""

from __future__ import annotations

import dataclasses
import io
import logging
import sys
import threading
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from megatron_mod.config.schema import Config, LoggingConfig
from megatron_mod.monitoring.scalars import scalars
from megatron_mod.parallel.topology import print_once
from megatron_mod.routing.scheme import Place

PROJECT = "megatron_mod"
SECONDS_TO_FINISH = 20  # of those that batch systems grant after a signal


def check_installed(settings: LoggingConfig) -> None:
    """Refuse to start without what is asked for.

    Raises:
        ValueError: it is not installed.
    """
    if settings.wandb and find_spec("wandb") is None:
        raise ValueError(
            f"logging.wandb = {_shown(settings)}: wandb is not installed; pip install wandb, or "
            "set logging.wandb to false."
        )


class WeightsAndBiases:
    """Hands each record on to a run of the same name as this one's checkpoints have, so that a
    training that goes on goes on there too. Steps that are taken again are left out there: they
    have been seen.
    """

    def __init__(self, config: Config, places: Sequence[Place], *, run: str) -> None:
        """Start it.

        Args:
            places: of the routers.
            run: what all checkpoints of this run say that they belong to.

        Raises:
            ValueError: it does not start.
        """
        import wandb

        self.places, self.settings = places, config.logging
        folder = Path(config.checkpoint.save)
        mode = None if isinstance(config.logging.wandb, bool) else config.logging.wandb
        stdin, sys.stdin = sys.stdin, io.StringIO()  # it would ask, and ranks wait meanwhile
        try:
            self.run = wandb.init(
                project=config.logging.wandb_project or PROJECT,
                name=config.logging.wandb_name or folder.name,
                id=run,
                resume="allow",
                dir=folder,
                mode=mode,
                config=dataclasses.asdict(config),
                settings=wandb.Settings(console="off", silent=True),
            )
        except Exception as error:  # of many kinds, which are its own
            raise ValueError(
                f"logging.wandb = {_shown(self.settings)}: does not start ({_line(error)}); log in "
                "by `wandb login`, or set it to offline or false."
            ) from error
        finally:
            sys.stdin = stdin

    @property
    def place(self) -> str:
        """Where the run is to be seen."""
        if self.run.offline:
            return f"offline; `wandb sync {Path(self.run.dir).parent}` sends it"
        return str(self.run.url)

    def write(self, record: dict) -> None:
        """Hand a record on.

        Raises:
            ValueError: it is not taken. Nothing more is handed on then.
        """
        if self.run is None:
            return
        try:
            self.run.log(scalars(record, self.places), step=record["step"])
        except Exception as error:
            self.run = None
            raise ValueError(
                f"logging.wandb = {_shown(self.settings)}: takes no more records "
                f"({_line(error)}); run the same command again to go on, or set it to false."
            ) from error

    def close(self, *, failed: bool) -> None:
        """Have what is under way sent, within ``SECONDS_TO_FINISH``."""
        if self.run is None:
            return
        problem = [f"it takes longer than {SECONDS_TO_FINISH} s"]

        def finish() -> None:
            try:
                self.run.finish(exit_code=int(failed))
            except Exception as error:
                problem[:] = [_line(error)]
            else:
                problem.clear()

        thread = threading.Thread(target=finish, daemon=True)
        thread.start()
        thread.join(SECONDS_TO_FINISH)
        for why in problem:
            print_once(
                f"warning: Weights & Biases has not got all records: {why}", level=logging.WARNING
            )


def _shown(settings: LoggingConfig) -> str:
    return str(settings.wandb).lower()


def _line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
