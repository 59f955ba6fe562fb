"""Tokenised data, made once for all ranks and jobs and read from memory-mapped files.

An entry is a folder named after everything its content depends on: the bytes of the source, the
tokenizer, the template and the length. It appears when it is whole, so whoever sees it may read
it without a lock. Each job checks it against its checksums before it uses it, once a machine, and
makes a damaged one again::

    CACHE/KEY/samples.arrow    ids, label spans and record number of each usable sample
    CACHE/KEY/rejects.jsonl    number, reason and content of each bad record
    CACHE/KEY/summary.json     counts, and a fingerprint of the samples
    CACHE/KEY/entry.json       what the key was made of, and checksums of the other files
    CACHE/digests/             SHA-256 of the sources
    CACHE/checked/             of running jobs of several ranks: which entries were found whole
"""

from __future__ import annotations

import atexit
import hashlib
import json
import logging
import os
import platform
import time
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock

from megatron_mod.checkpoint.checksums import file_table, fingerprint
from megatron_mod.checkpoint.folders import files_below, new_folder, remove, writing
from megatron_mod.data.sources import reading

logger = logging.getLogger(__name__)

FORMAT = 4  # of an entry's files; part of every key
SECONDS_BETWEEN_LOOKS = 0.2
ENTRY = "entry.json"


def default_folder() -> Path:
    """Where tokenised data is kept when ``data.cache`` is not set."""
    return Path(os.environ.get("MEGATRON_MOD_CACHE") or Path.home() / ".cache" / "megatron_mod")


def make_folder(cache: Path, *, setting: str) -> None:
    """Make the cache's folder if need be.

    Raises:
        ValueError: it cannot be made; ``setting`` is what the user calls it.
    """
    try:
        cache.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(
            f"{setting} = {cache}: no folder for tokenised data can be made there "
            f"({error.strerror}); give another one."
        ) from error


def entry(cache: Path, identity: dict, build: Callable[[Path], None]) -> Path:
    """The folder of what ``identity`` (JSON values) describes, built if it is not there or damaged.

    Of the ranks of one machine only the first builds and checks, and others wait for it: its
    message about bad data is then the one that is heard. Jobs and machines that share the folder
    take turns.

    Args:
        cache: a folder that is there (``make_folder``).
        build: fills a folder; what it raises leaves nothing behind.

    Raises:
        ValueError: what ``build`` raises, or the folder cannot be written.
    """
    key = {"format": FORMAT, **identity}
    folder = cache / key_name(key)
    note = cache / "checked" / key_name([folder.name, *_job()])
    while _waits(cache):
        if note.is_file() and (_read(note) == _state(folder) or _damage(folder) is None):
            return folder
        time.sleep(SECONDS_BETWEEN_LOOKS)
    if not folder.is_dir() or _damage(folder):
        with writing(folder):
            lock = FileLock(cache / f"{folder.name}.lock")
            with lock:
                _make(folder, key, build)
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and os.access(cache, os.W_OK):
        _write(note, _state(folder))
        atexit.register(note.unlink, missing_ok=True)
    return folder


def _make(folder: Path, key: dict, build: Callable[[Path], None]) -> None:
    """Build an entry, unless another job has done so while this one waited for the lock."""
    if folder.is_dir():
        damage = _damage(folder)
        if damage is None:
            return
        logger.warning("%s: damaged tokenised data, which is made again: %s", folder, damage)
        remove(folder)
    with new_folder(folder) as partial:
        build(partial)
        files = file_table(partial, files_below(partial), together=False)
        content = {"key": key, "files": files, "fingerprint": fingerprint(files)}
        (partial / ENTRY).write_text(json.dumps(content, indent=2), encoding="utf-8")


def _damage(folder: Path) -> str | None:
    """What is wrong with an entry, if anything."""
    try:
        content = json.loads((folder / ENTRY).read_text(encoding="utf-8"))
        files = content["files"]
        if key_name(content["key"]) != folder.name or fingerprint(files) != content["fingerprint"]:
            return f"{ENTRY} does not describe it"
        found = file_table(folder, files, together=False)
    except (OSError, ValueError, TypeError, LookupError, AttributeError) as error:
        return f"{type(error).__name__}: {error}"
    wrong = [name for name in files if found[name] != files[name]]
    return f"{', '.join(wrong)}: not what was written (checksum)" if wrong else None


def digest_of_file(path: Path, *, cache: Path) -> str:
    """SHA-256 of a file's bytes, remembered for as long as the file is not touched, and computed by
    the first rank of each machine.

    Raises:
        ValueError: it cannot be read.
    """
    while True:
        with reading(path):
            status = path.stat()
        # ctime moves with every change of content or times, and cannot be set back.
        seen = [str(path.resolve()), status.st_ino, status.st_size, status.st_ctime_ns]
        note = cache / "digests" / key_name(seen)
        digest, _, again = _read(note).partition(" ")
        if digest and digest == again:
            return digest
        if not _waits(cache):
            break
        time.sleep(SECONDS_BETWEEN_LOOKS)
    content = hashlib.sha256()
    with reading(path), path.open("rb") as file:
        while chunk := file.read(1 << 22):
            content.update(chunk)
    digest = content.hexdigest()
    if os.access(cache, os.W_OK):
        _write(note, f"{digest} {digest}")  # twice, so that a damaged note is seen to be one
    return digest


def key_name(content: object) -> str:
    """What an entry of this identity (JSON values) is called."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:32]


def _waits(cache: Path) -> bool:
    """Whether another rank of this machine does the work; it can leave no word in a cache that
    cannot be written."""
    return int(os.environ.get("LOCAL_RANK", 0)) > 0 and os.access(cache, os.W_OK)


def _job() -> list[str | None]:
    """What the ranks of a job have in common on one machine."""
    names = ("MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT")
    return [platform.node(), *map(os.environ.get, names)]


def _state(folder: Path) -> str:
    """Changes whenever a file of a folder is touched or replaced."""
    status = [path.stat() for path in sorted(folder.iterdir())] if folder.is_dir() else []
    return json.dumps([[s.st_ino, s.st_size, s.st_ctime_ns] for s in status])


def _read(note: Path) -> str:
    try:
        return note.read_text(encoding="ascii")
    except (OSError, UnicodeDecodeError):
        return ""


def _write(note: Path, text: str) -> None:
    with writing(note):
        note.parent.mkdir(parents=True, exist_ok=True)
        partial = note.with_name(f".{note.name}.{os.getpid()}")
        partial.write_text(text, encoding="ascii")
        partial.replace(note)
