"""The output folder of a training: its one owner, its checkpoints, and which of them is good."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from torch.distributed.checkpoint.api import CheckpointException

from megatron_mod.config.schema import CheckpointConfig
from megatron_mod.conversion import checkpoint as layout
from megatron_mod.folders import only_writer, publish, remove, write_durably
from megatron_mod.parallel.agree import on_first_rank
from megatron_mod.parallel.topology import print_once


class RunFolder:
    """``checkpoint.save`` while a job runs; every method is called by all ranks alike."""

    def __init__(self, settings: CheckpointConfig) -> None:
        self.path = Path(settings.save)
        self.settings = settings

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Own the folder, which is made if need be, and clear what a killed job left half done.

        Raises:
            ValueError: another job owns it.
        """
        with contextlib.ExitStack() as stack:
            on_first_rank(lambda: self._hold(stack))
            yield

    def _hold(self, stack: contextlib.ExitStack) -> None:
        self.path.mkdir(parents=True, exist_ok=True)
        stack.enter_context(only_writer(self.path, what=f"checkpoint.save = {self.path}"))
        for left in (*self.path.glob(".step_*"), *self.path.glob(".*.new")):
            remove(left)

    def newest_good(self) -> tuple[Path, dict] | None:
        """The newest step whose files are as they were written, and its manifest, if any.

        Raises:
            ValueError: a damaged file, unless ``checkpoint.on_corrupt`` is ``previous`` and an
                earlier step is whole.
        """
        steps = on_first_rank(lambda: sorted(self.path.glob("step_*[0-9]"), reverse=True))
        for step in steps:
            try:
                manifest = layout.verify(step)
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
                print_once(f"{error} Going back to the step before (checkpoint.on_corrupt).")
                on_first_rank(lambda step=step: self._put_aside(step))
            else:
                on_first_rank(lambda step=step: self._point_to(step))
                return step, manifest
        return None

    def _put_aside(self, step: Path) -> None:
        aside = step.with_name(f"{step.name}.corrupt")
        if aside.exists():
            remove(aside)
        step.rename(aside)

    def _point_to(self, step: Path) -> None:
        write_durably(self.path / layout.LATEST, step.name + "\n")

    def save(self, step: int, fill: Callable[[Path], None], *, size: int, last: bool) -> None:
        """Have ``fill`` write a step's folder aside, publish it by one rename, and drop old steps.

        Args:
            size: bytes it will take, at most.

        Raises:
            ValueError: it cannot be written; with ``checkpoint.on_save_error: continue`` only if
                it is the run's last.
        """
        folder = self.path / f"step_{step:08d}"
        partial = folder.with_name(f".{folder.name}.incomplete")
        try:
            on_first_rank(lambda: self._make_room(partial, size))
            fill(partial)
            on_first_rank(lambda: self._publish(partial, folder))
        except (OSError, RuntimeError, CheckpointException) as error:
            on_first_rank(lambda: shutil.rmtree(partial, ignore_errors=True))
            message = (
                f"checkpoint.save = {self.path}: step {step} could not be saved: {_cause(error)} "
                f"({shutil.disk_usage(self.path).free} bytes are free); earlier checkpoints are "
                "untouched."
            )
            if last or self.settings.on_save_error == "stop":
                raise ValueError(f"{message} Make room and run the same command again.") from error
            print_once(f"warning: {message} Going on (checkpoint.on_save_error).")

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
            file.write(bytes(size))
            file.flush()
            os.fsync(file.fileno())
        probe.unlink()

    def _publish(self, partial: Path, folder: Path) -> None:
        if folder.exists():  # a finished step of a run that is done over
            remove(folder)
        publish(partial, folder)
        self._point_to(folder)
        if self.settings.keep:
            for old in sorted(self.path.glob("step_*[0-9]"))[: -self.settings.keep]:
                remove(old)


def _cause(error: BaseException) -> str:
    if isinstance(error, CheckpointException):
        error = next(iter(error.failures.values()))[0]
    while error.__cause__ or error.__context__:
        error = error.__cause__ or error.__context__
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return "the disk is full"
    return str(error).splitlines()[0]
