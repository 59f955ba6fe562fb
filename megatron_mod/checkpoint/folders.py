"""Output folders that are complete or absent, and have one writer."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import io
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

_FULL = (errno.ENOSPC, errno.EDQUOT)
_NOTHING = 2**16  # bytes: what a disk that ran full while a file was written has left, at most


@contextlib.contextmanager
def new_folder(path: str | Path) -> Iterator[Path]:
    """A folder to fill that appears under ``path`` only when the block ends well.

    It is filled under a hidden name; what a killed process left there is cleared first.

    Raises:
        ValueError: ``path`` exists or cannot be made, another process is writing it, or the disk
            runs full.
    """
    path = Path(path)
    if os.path.lexists(path):
        raise ValueError(f"{path}: already exists; remove it or give another output folder.")
    partial = path.with_name(f".{path.name}.incomplete")
    with writing(path):
        partial.parent.mkdir(parents=True, exist_ok=True)
        _require_own(partial)
        partial.mkdir(exist_ok=True)
    with only_writer(partial, what=str(path)):
        try:
            with writing(path):
                for left in partial.iterdir():
                    remove(left)
            try:
                yield partial
            except BaseException as error:
                if is_full(error, partial):
                    raise _unwritten(path, error) from error
                raise
            with writing(path):
                publish(partial, path)
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def _require_own(partial: Path) -> None:
    """Refuse what no writer of ours leaves: filling it would change something of the user's."""
    if partial.is_symlink() or (partial.exists() and not partial.is_dir()):
        raise ValueError(
            f"{partial}: is in the way (a {'link' if partial.is_symlink() else 'file'}, where the "
            "output is put together); remove it."
        )


@contextlib.contextmanager
def only_writer(folder: Path, *, what: str) -> Iterator[None]:
    """Hold a folder for this process; the lock goes with the process, however it ends.

    Raises:
        ValueError: another process holds it, or it cannot be opened.
    """
    with writing(folder):  # a link put here in the meantime is no folder
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(
                f"{what}: another process is writing to this folder; wait for it to end, or give "
                "another output folder."
            ) from None
        yield
    finally:
        os.close(handle)


def require_room(folder: Path, size: int, *, what: str) -> None:
    """Refuse to begin with what the disk cannot hold.

    Args:
        folder: where it will be written; need not exist yet.
        size: bytes it will take.
        what: what it is, for the message.

    Raises:
        ValueError: fewer bytes are free.
    """
    free = free_bytes(folder)
    if size > free:
        raise ValueError(
            f"{folder}: {what} needs {size} bytes and {free} are free on its disk; make room, or "
            "give a folder on another disk."
        )


def require_writable(folder: Path, *, what: str) -> None:
    """Refuse an output folder that cannot be written, or made, before any work is done for it.

    Args:
        what: the setting that names it, for the message.

    Raises:
        ValueError: it is, or lies below, a file or a folder that this user cannot write.
    """
    there = _existing(folder)
    if not there.is_dir():
        raise ValueError(f"{what} = {folder}: {there} is no folder; give another output folder.")
    if not os.access(there, os.W_OK | os.X_OK):
        raise ValueError(
            f"{what} = {folder}: {there} cannot be written; give another output folder."
        )


def free_bytes(path: Path) -> int:
    """What can still be written below a path, which need not exist yet."""
    return shutil.disk_usage(_existing(path)).free


def _existing(path: Path) -> Path:
    path = Path(path).absolute()
    while not path.exists():
        path = path.parent
    return path


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn what the system says against writing a path into one message.

    Raises:
        ValueError: the disk is full, or ``path`` cannot be written there.
    """
    try:
        yield
    except OSError as error:
        raise _unwritten(path, error) from error


def _unwritten(path: Path, error: BaseException) -> ValueError:
    if is_full(error, path):
        return ValueError(
            f"{path}: could not be written: {reason(error, path)}; make room and run the same "
            "command again."
        )
    return ValueError(f"{path}: cannot be written: {reason(error, path)}; give another path.")


def is_full(error: BaseException, path: Path) -> bool:
    """Whether an error comes from a full disk, on which ``path`` was being written.

    Libraries pass it on as what they made of it: as text, or, as torch does, not at all.
    """
    for cause in causes(error):
        if isinstance(cause, OSError) and cause.errno in _FULL:
            return True
        if any(os.strerror(code) in str(cause) for code in _FULL):
            return True
        says_nothing = isinstance(cause, RuntimeError) or getattr(cause, "errno", 0) is None
        if says_nothing and free_bytes(path) < _NOTHING:
            return True
    return False


def reason(error: BaseException, path: Path) -> str:
    """What went wrong while ``path`` was written, in one line."""
    if is_full(error, path):
        return f"the disk is full ({free_bytes(path)} bytes are free)"
    first = list(causes(error))[-1]
    text = first.strerror if isinstance(first, OSError) and first.strerror else str(first)
    return (text.splitlines() or [type(first).__name__])[0]


def causes(error: BaseException) -> Iterator[BaseException]:
    """An error and what led to it, on any rank of a distributed checkpoint's; itself first."""
    seen: list[BaseException] = []
    queue = [error]
    while queue:
        error = queue.pop(0)
        if error in seen:
            continue
        seen.append(error)
        yield error
        failures = getattr(error, "failures", None)
        if isinstance(failures, dict):  # torch's CheckpointException: by rank, with its traceback
            queue += [failure[0] for failure in failures.values()]
        if came_from := error.__cause__ or error.__context__:
            queue.append(came_from)


def publish(partial: Path, path: Path) -> None:
    """Make a filled folder durable, then visible under its own name by one rename."""
    sync_folder(partial)
    partial.rename(path)
    _sync(path.parent)


def sync_folder(folder: Path) -> None:
    """Make a folder and all below it durable."""
    for inner, _, files in os.walk(folder):
        for name in files:
            _sync(Path(inner, name))
        _sync(Path(inner))


def write_durably(path: Path, text: str) -> None:
    """Replace a small file by one rename.

    Raises:
        ValueError: it cannot be written; the file is as it was.
    """
    new = path.with_name(partial_name(path.name))
    with writing(path):
        new.unlink(missing_ok=True)
        try:
            with new.open("x", encoding="utf-8") as file:  # never what a link points to
                file.write(text)
            _sync(new)
            new.rename(path)
        except OSError:
            new.unlink(missing_ok=True)
            raise
        _sync(path.parent)


def append(path: Path, content: bytes) -> None:
    """Add to a file, which is made if need be, whole or not at all.

    Raises:
        ValueError: it cannot be written; the file is as it was.
    """
    with writing(path), path.open("ab") as file:
        size = file.tell()
        try:
            file.write(content)
            file.flush()
        except OSError:
            with contextlib.suppress(OSError):
                os.truncate(path, size)
            raise


def partial_name(name: str) -> str:
    """Where a file that is replaced is put together; a killed process may leave it."""
    return f".{name}.new"


def remove(path: Path) -> None:
    """Remove a file or a folder; a folder loses its name first, so that none is ever half there."""
    if path.is_symlink() or not path.is_dir():
        path.unlink()
        return
    hidden = path
    if not path.name.startswith("."):
        hidden = path.with_name(f".{path.name}.removed")
        if os.path.lexists(hidden):
            remove(hidden)
        path.rename(hidden)
    shutil.rmtree(hidden, ignore_errors=True)


class ChunkedFile(io.BufferedWriter):
    """A new file that passes large writes to the kernel a piece at a time.

    Measured on ext4: half a gigabyte in one write takes two to six times as long as in pieces.
    """

    PIECE = 2**20

    def __init__(self, path: str | Path) -> None:
        super().__init__(io.FileIO(path, "wb"))

    def write(self, data) -> int:
        view = memoryview(data).cast("B")
        for start in range(0, len(view), self.PIECE):
            super().write(view[start : start + self.PIECE])
        return len(view)


def files_below(folder: Path) -> list[str]:
    """Every file of a folder, relative to it."""
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
