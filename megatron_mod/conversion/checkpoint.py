"""The layout of our checkpoint folders.

A base checkpoint (what ``convert_hf_to_megatron`` writes)::

    DIR/megatron_mod.json   kind, format, family, checksum of every file
    DIR/huggingface/        config.json and tokenizer, as the original had them
    DIR/state/              Megatron distributed checkpoint of the weights
    DIR/routers/            with ``--routers``: a step folder with the imported routers

A training step (what ``pretrain_router`` writes, under ``checkpoint.save``)::

    RUN/step_00000100/megatron_mod.json   kind, step, base and its fingerprint, routing, checksums
    RUN/step_00000100/state/              routers, their average, optimizer, schedule, run state
    RUN/latest                            the name of the newest step folder
    RUN/config.yaml                       the resolved configuration
"""

from __future__ import annotations

import json
from pathlib import Path

from megatron_mod.config import model_folder
from megatron_mod.conversion import checksums
from megatron_mod.folders import files_below

MANIFEST, LATEST = model_folder.MANIFEST, model_folder.LATEST
HUGGINGFACE = model_folder.HUGGINGFACE
STATE = "state"
ROUTERS = "routers"
FORMAT = 2


def write_manifest(folder: Path, values: dict) -> None:
    """Describe a folder that is otherwise complete, with the checksum of each of its files;
    called by one rank."""
    names = [name for name in files_below(folder) if name != MANIFEST]
    table = checksums.file_table(folder, names, together=False)
    text = json.dumps({"format": FORMAT, **values, "files": table}, indent=2)
    (folder / MANIFEST).write_text(text + "\n", encoding="utf-8")


def read_manifest(folder: str | Path, *, kind: str | None = None) -> dict:
    """What a checkpoint folder says of itself.

    Raises:
        ValueError: not one of our checkpoint folders, a damaged manifest, another format, or
            another kind.
    """
    folder = Path(folder)
    path = folder / MANIFEST
    if not path.is_file():
        if model_folder.is_started_run(folder):
            raise ValueError(f"{folder}: {model_folder.NOT_SAVED}.")
        state = "has no " + MANIFEST if folder.is_dir() else "does not exist"
        raise ValueError(
            f"{folder}: {state}; give a folder that tools/convert_hf_to_megatron.py or "
            "launch/pretrain_router.py wrote."
        )
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: is not valid JSON; the checkpoint is damaged.") from error
    if manifest.get("format") != FORMAT:
        raise ValueError(
            f"{path}: format {manifest.get('format')} is not {FORMAT}, the one this release reads; "
            "convert or train again."
        )
    if kind and manifest["kind"] != kind:
        raise ValueError(
            f"{folder}: is a {manifest['kind']!r} checkpoint where a {kind!r} one is needed."
        )
    return manifest


def verify(folder: str | Path) -> dict:
    """The manifest, once every file has the checksum it lists; called by all ranks alike.

    Raises:
        ValueError: naming the first file that is damaged.
    """
    manifest = read_manifest(folder)
    checksums.verify(Path(folder), manifest["files"])
    return manifest


def resolve_step(folder: str | Path) -> Path:
    """The folder itself, or the newest step of a training run's folder."""
    folder = Path(folder)
    latest = folder / LATEST
    return folder / latest.read_text(encoding="utf-8").strip() if latest.is_file() else folder
