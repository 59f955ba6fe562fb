"""The layout of our checkpoint folders, and whole tensors in and out of them.

A base checkpoint (what ``convert_hf_to_megatron`` writes)::

    DIR/megatron_mod.json   kind, format and family
    DIR/huggingface/        config.json and tokenizer, as the original had them
    DIR/state/              Megatron distributed checkpoint of the weights

A training step (what ``pretrain_router`` writes, under ``checkpoint.save``)::

    RUN/step_00000100/megatron_mod.json   kind, step, base checkpoint, routing
    RUN/step_00000100/state/              routers, optimizer, schedule
    RUN/latest                            the name of the newest step folder
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing import ShardedTensor
from torch import Tensor

MANIFEST = "megatron_mod.json"
STATE = "state"
HUGGINGFACE = "huggingface"
LATEST = "latest"
FORMAT = 1


def write_manifest(folder: Path, values: dict) -> None:
    text = json.dumps({"format": FORMAT, **values}, indent=2)
    (folder / MANIFEST).write_text(text + "\n", encoding="utf-8")


def read_manifest(folder: str | Path, *, kind: str | None = None) -> dict:
    """What a checkpoint folder says of itself.

    Raises:
        ValueError: not one of our checkpoint folders, a newer format, or another kind.
    """
    folder = Path(folder)
    path = folder / MANIFEST
    if not path.is_file():
        state = "has no " + MANIFEST if folder.is_dir() else "does not exist"
        raise ValueError(
            f"{folder}: {state}; give a folder that tools/convert_hf_to_megatron.py or "
            "launch/pretrain_router.py wrote."
        )
    manifest = json.loads(path.read_text(encoding="utf-8"))
    if manifest.get("format") != FORMAT:
        raise ValueError(
            f"{path}: format {manifest.get('format')} is not {FORMAT}, the one this release reads."
        )
    if kind and manifest["kind"] != kind:
        raise ValueError(
            f"{folder}: is a {manifest['kind']!r} checkpoint where a {kind!r} one is needed."
        )
    return manifest


def resolve_step(folder: str | Path) -> Path:
    """The folder itself, or the newest step of a training run's folder."""
    folder = Path(folder)
    latest = folder / LATEST
    return folder / latest.read_text(encoding="utf-8").strip() if latest.is_file() else folder


@contextlib.contextmanager
def new_folder(path: str | Path) -> Iterator[Path]:
    """A folder to fill that appears under ``path`` only when the block ends well.

    Raises:
        ValueError: ``path`` exists.
    """
    path = Path(path)
    if path.exists():
        raise ValueError(f"{path}: already exists; remove it or give another output folder.")
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.incomplete-{os.getpid()}")
    partial.mkdir()
    try:
        yield partial
        partial.rename(path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def save_tensors(tensors: dict[str, Tensor], folder: Path) -> None:
    """Write whole tensors as a distributed checkpoint any topology can load (one process)."""
    folder.mkdir()
    sharded = {k: ShardedTensor.from_rank_offsets(k, t.contiguous()) for k, t in tensors.items()}
    dist_checkpointing.save(sharded, str(folder))


def load_tensors(folder: Path, keep: str = "") -> dict[str, Tensor]:
    """Every tensor of a distributed checkpoint whose key contains ``keep``, whole."""
    description = dist_checkpointing.load_tensors_metadata(str(folder))
    wanted = {key: value for key, value in description.items() if keep in key}
    loaded = dist_checkpointing.load(wanted, str(folder))  # with what is no tensor beside them
    return {key: loaded[key] for key in wanted}
