"""Tokenised data, made once for all ranks and jobs and read from memory-mapped files.

An entry is a folder named after everything its content depends on: the bytes of the source, the
tokenizer, the template and the length. It appears when it is whole, so whoever sees it may read
it without a lock::

    CACHE/KEY/samples.arrow    ids, label spans and record number of each usable sample
    CACHE/KEY/rejects.jsonl    number, reason and content of each bad record
    CACHE/KEY/summary.json     counts, and what the key was made of
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock

from megatron_mod.checkpoint.folders import new_folder

FORMAT = 1  # of an entry's files; part of every key
SECONDS_BETWEEN_LOOKS = 0.2


def default_folder() -> Path:
    """Where tokenised data is kept when ``data.cache`` is not set."""
    return Path(os.environ.get("MEGATRON_MOD_CACHE") or Path.home() / ".cache" / "megatron_mod")


def entry(cache: Path, identity: dict, build: Callable[[Path], None]) -> Path:
    """The folder of what ``identity`` (JSON values) describes, built if it is not there.

    Of the ranks of one machine only the first builds, and others wait for it: its message about
    bad data is then the one that is heard. Jobs and machines that share the folder take turns.

    Args:
        build: fills a folder; what it raises leaves nothing behind.
    """
    text = json.dumps({"format": FORMAT, **identity}, sort_keys=True)
    folder = cache / hashlib.sha256(text.encode()).hexdigest()[:32]
    while int(os.environ.get("LOCAL_RANK", 0)) and not folder.is_dir():
        time.sleep(SECONDS_BETWEEN_LOOKS)
    if folder.is_dir():
        return folder
    cache.mkdir(parents=True, exist_ok=True)
    with FileLock(cache / f"{folder.name}.lock"):
        if not folder.is_dir():
            with new_folder(folder) as partial:
                build(partial)
    return folder


def digest_of_file(path: Path, *, cache: Path) -> str:
    """SHA-256 of a file's bytes, remembered for as long as the file is not touched."""
    status = path.stat()
    # ctime moves with every change of content or times, and cannot be set back.
    seen = [str(path.resolve()), status.st_ino, status.st_size, status.st_ctime_ns]
    name = hashlib.sha256(json.dumps(seen).encode()).hexdigest()[:32]
    note = cache / "digests" / name
    if note.is_file():
        return note.read_text(encoding="ascii")
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 22):
            digest.update(chunk)
    note.parent.mkdir(parents=True, exist_ok=True)
    partial = note.with_name(f".{name}.{os.getpid()}")
    partial.write_text(digest.hexdigest(), encoding="ascii")
    partial.replace(note)
    return digest.hexdigest()
