"""Checksums of the files of a checkpoint, computed by all ranks together.

A file is hashed in blocks, which the ranks share out, so that a folder of hundreds of gigabytes is
read once by the whole job, however few files it has. A file's checksum is the hash of its blocks'.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
import torch.distributed as dist
import xxhash
from torch import Tensor

BLOCK = 64 * 2**20
_PIECE = 2**20


def file_table(folder: Path, names: Iterable[str], *, together: bool = True) -> dict[str, dict]:
    """``{name: {"bytes": size, "xxh3_128": checksum}}``; called by all ranks alike, or by one that
    does not work ``together`` with the others.

    Raises:
        ValueError: a file cannot be read; on all ranks, whichever met it.
    """
    names = sorted(names)
    sizes = {name: (folder / name).stat().st_size for name in names}
    blocks = [(n, start) for n in names for start in range(0, sizes[n], BLOCK)]
    together = together and dist.is_initialized()
    rank, world = (dist.get_rank(), dist.get_world_size()) if together else (0, 1)
    mine = {block: _digest_or_problem(folder, *block) for block in blocks[rank::world]}
    if world > 1:
        parts: list = [None] * world
        dist.all_gather_object(parts, mine)
        mine = {block: digest for part in parts for block, digest in part.items()}
    whole = {name: xxhash.xxh3_128() for name in names}
    for block in blocks:
        if isinstance(mine[block], str):
            raise ValueError(f"{folder / block[0]}: cannot be read: {mine[block]}.")
        whole[block[0]].update(mine[block])
    return {n: {"bytes": sizes[n], "xxh3_128": whole[n].hexdigest()} for n in names}


def _digest_or_problem(folder: Path, name: str, start: int) -> bytes | str:
    try:
        return _block_digest(folder, name, start)
    except OSError as error:
        return error.strerror or str(error)


def _block_digest(folder: Path, name: str, start: int) -> bytes:
    digest, piece = xxhash.xxh3_128(), memoryview(bytearray(_PIECE))
    with (folder / name).open("rb", buffering=0) as file:
        file.seek(start)
        left = BLOCK
        while left and (count := file.readinto(piece[: min(left, _PIECE)])):
            digest.update(piece[:count])
            left -= count
    return digest.digest()


def verify(folder: Path, table: dict[str, dict], *, together: bool = True) -> None:
    """Check a folder's files against the table written with them; called as ``file_table``.

    Raises:
        ValueError: a file is missing, has another size, or other content, or is none of the
            folder's; it is named.
    """
    for name, entry in table.items():
        path = folder / name
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise ValueError(f"{folder}: lists {name}, which is not a file of this folder.")
        if not path.is_file():
            raise ValueError(f"{path}: is missing; the checkpoint is damaged.")
        if path.stat().st_size != entry["bytes"]:
            raise ValueError(
                f"{path}: has {path.stat().st_size} bytes instead of the {entry['bytes']} that "
                "were written; the checkpoint is damaged."
            )
    for name, entry in file_table(folder, table, together=together).items():
        if entry != table[name]:
            raise ValueError(
                f"{folder / name}: its content is not what was written (its checksum differs); "
                "the checkpoint is damaged."
            )


def fingerprint(table: dict[str, dict]) -> str:
    """One short name for everything a table describes."""
    digest = xxhash.xxh3_128()
    for name in sorted(table):
        digest.update(f"{name} {table[name]['bytes']} {table[name]['xxh3_128']}\n".encode())
    return digest.hexdigest()


def digest_of(tensor: Tensor) -> str:
    """The checksum of a tensor's bytes, row by row."""
    flat = tensor.detach().contiguous().view(-1).view(torch.uint8)
    return xxhash.xxh3_128(flat.numpy()).hexdigest()
