"""The output folder of a training: its one owner, its checkpoints, and which of them is good."""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException

from megatron_mod.checkpoint import shared
from megatron_mod.checkpoint.folders import (
    only_writer,
    partial_name,
    publish,
    reason,
    remove,
    require_room,
    sync_folder,
    write_durably,
    writing,
)
from megatron_mod.checkpoint.manifest import (
    CONFIG,
    LATEST,
    run_of,
    settings_run,
    settings_text,
    step_folder,
    step_folders,
    verify_checkpoint,
)
from megatron_mod.config.schema import CheckpointConfig
from megatron_mod.monitoring.environment import FILE as ENVIRONMENT
from megatron_mod.monitoring.json_lines import LOG
from megatron_mod.parallel.agree import on_first_rank
from megatron_mod.parallel.topology import print_once
from megatron_mod.training.restarts import require_progress

SUMMARY = "summary.json"
_WRITTEN_ANEW = (CONFIG, ENVIRONMENT, LATEST, LOG, SUMMARY)


def _reserve(file: int, size: int) -> None:
    """Have the disk give an open file so many bytes."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(file, 0, size)
        return
    chunk = bytes(min(size, 2**20))  # macOS, which would give a longer file nothing
    while size > 0:
        size -= os.write(file, chunk[:size])


def is_new(folder: Path) -> bool:
    """Whether a run can start in a folder: it is not there, or holds no more than what a job that
    was killed as it began left half written."""
    if not os.path.lexists(folder):
        return True
    return folder.is_dir() and set(folder.iterdir()) <= set(_leftovers(folder))


def holds_run(folder: Path) -> bool:
    """Whether a run has started in a folder, with or without a checkpoint so far."""
    return (folder / CONFIG).is_file() or bool(step_folders(folder))


def _leftovers(folder: Path) -> list[Path]:
    half_written = [folder / partial_name(name) for name in _WRITTEN_ANEW]
    there = [path for path in half_written if os.path.lexists(path)]
    return [*folder.glob(".step_*"), *folder.glob(f"{shared.PREFIX}*"), *there]


class RunFolder:
    """``checkpoint.save`` while a job runs; every method is called by all ranks alike."""

    def __init__(self, settings: CheckpointConfig) -> None:
        self.path = Path(settings.save)
        self.settings = settings

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Own the folder, which is made if need be, and clear what a killed job left half done. A
        failure before anything was written leaves no folder that was made.

        Raises:
            ValueError: another job owns it, it cannot be made, not all nodes see it, or too many
                starts of this job have got no further.
        """
        with contextlib.ExitStack() as stack:
            made = on_first_rank(lambda: self._hold(stack))
            try:
                shared.require_shared(self.path, what=f"checkpoint.save = {self.path}")
                yield
            except BaseException:
                if dist.get_rank() == 0:
                    _unmake(made)
                raise

    def _hold(self, stack: contextlib.ExitStack) -> list[Path]:
        """Returns the folders that were made, each in the next."""
        path = self.path.absolute()
        made = [each for each in (path, *path.parents) if not each.exists()]
        require_progress(path)
        with writing(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
        stack.enter_context(only_writer(self.path.resolve(), what=f"checkpoint.save = {self.path}"))
        for left in _leftovers(self.path):
            remove(left)
        return made

    def identity(self) -> str:
        """The name that all checkpoints of the run in this folder have; a new run gets a new one.

        Raises:
            ValueError: checkpoints of several runs, and nothing that says which are its own.
        """
        return on_first_rank(lambda: run_of(self.path) or uuid.uuid4().hex)

    def write_settings(self, run: str, settings: str) -> None:
        """Record the settings, as ``--config`` takes them, for people and for the report: a run
        goes on by those in its checkpoints."""
        path = self.path / CONFIG
        if on_first_rank(lambda: path.exists() and settings_run(self.path) is None):
            print_once(
                f"warning: {path}: is not what the run wrote, and is written anew; the settings "
                "in its checkpoints hold.",
                level=logging.WARNING,
            )
        on_first_rank(lambda: write_durably(path, settings_text(run, settings)))

    def require_room(self, size: int) -> None:
        """Refuse to begin when a checkpoint of ``size`` bytes would not fit."""
        on_first_rank(lambda: require_room(self.path, size, what="a checkpoint"))

    def newest_good(self) -> tuple[Path, dict] | None:
        """The newest step whose files are as they were written, and its manifest, if any.

        Raises:
            ValueError: a damaged file, unless ``checkpoint.on_corrupt`` is ``previous`` and an
                earlier step is whole.
        """
        steps = on_first_rank(lambda: step_folders(self.path))
        for step in steps:
            try:
                manifest = verify_checkpoint(step)
            except ValueError as error:
                if self.settings.on_corrupt == "stop" or step == steps[-1]:
                    raise ValueError(
                        f"{error} Remove {step} to go on without it"
                        + (
                            ", or set checkpoint.on_corrupt to previous."
                            if self.settings.on_corrupt == "stop"
                            else "; no earlier step is whole."
                        )
                    ) from error
                print_once(
                    f"{error} Going back to the step before (checkpoint.on_corrupt).",
                    level=logging.WARNING,
                )
                on_first_rank(lambda step=step: self._put_aside(step))
            else:
                on_first_rank(lambda step=step: self._point_to(step, keep=0))
                return step, manifest
        return None

    def _put_aside(self, step: Path) -> None:
        aside = step.with_name(f"{step.name}.corrupt")
        if aside.exists():
            remove(aside)
        step.rename(aside)

    def _point_to(self, step: Path, *, keep: int) -> None:
        """Drop all but the newest ``keep`` steps (0: none), and have ``latest`` name this one.

        Neither is needed to go on: what stands against it is said, and does not stop the run.
        """
        try:
            for old in step_folders(self.path)[keep:] if keep else ():
                with writing(old):
                    remove(old)
            write_durably(self.path / LATEST, step.name + "\n")
        except ValueError as error:
            print_once(f"warning: {step.name} is saved, but {error}", level=logging.WARNING)

    def save(self, step: int, fill: Callable[[Path], None], *, size: int, last: bool) -> None:
        """Have ``fill`` write a step's folder aside, publish it by one rename, and drop old steps.

        Args:
            size: bytes it will take, at most.

        Raises:
            ValueError: it cannot be written; with ``checkpoint.on_save_error: continue`` only if
                it is the run's last.
        """
        folder = step_folder(self.path, step)
        partial = folder.with_name(f".{folder.name}.incomplete")
        try:
            on_first_rank(lambda: self._make_room(partial, size))
            fill(partial)
            on_first_rank(lambda: _publish(partial, folder))
        except (OSError, RuntimeError, CheckpointException) as error:
            why = reason(error, self.path)
            on_first_rank(lambda: shutil.rmtree(partial, ignore_errors=True))
            message = (
                f"checkpoint.save = {self.path}: step {step} could not be saved: {why}; earlier "
                "checkpoints are untouched."
            )
            if last or self.settings.on_save_error == "stop":
                raise ValueError(f"{message} Make room and run the same command again.") from error
            print_once(
                f"warning: {message} Going on (checkpoint.on_save_error).", level=logging.WARNING
            )
        else:
            on_first_rank(lambda: self._point_to(folder, keep=self.settings.keep))

    def _make_room(self, partial: Path, size: int) -> None:
        """Make the folder, and make sure that what comes will fit.

        Megatron writes its common files on one rank while the others already wait for it; an error
        there would reach them as a timeout only.
        """
        if partial.exists():
            remove(partial)
        partial.mkdir()
        probe = partial / "probe"
        with probe.open("wb") as file:
            _reserve(file.fileno(), size)
            os.fsync(file.fileno())
        probe.unlink()


def _unmake(folders: list[Path]) -> None:
    """Remove folders, each in the next, as far as they are empty."""
    with contextlib.suppress(OSError):
        for folder in folders:
            folder.rmdir()


def _publish(partial: Path, folder: Path) -> None:
    if folder.exists():  # a finished step of a run that is done over
        sync_folder(partial)
        remove(folder)
    publish(partial, folder)
