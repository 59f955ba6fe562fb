"""The layout of our checkpoint folders.

A base checkpoint (what ``convert_hf_to_megatron`` writes)::

    DIR/megatron_mod.json   kind, format, family, checksum of every file, checksum of itself
    DIR/huggingface/        config.json and tokenizer, as the original had them
    DIR/state/              Megatron distributed checkpoint of the weights; content.json
    DIR/routers/            with ``--routers``: a step folder with the imported routers

A training run (what ``pretrain_router`` writes, under ``checkpoint.save``)::

    RUN/config.yaml         its settings, and in the first line who it is
    RUN/step_00000100/megatron_mod.json   kind, step, run, base and its fingerprint, routing,
                            adapters, settings, counts and state of the run, checksums
    RUN/step_00000100/state/              what was added, its average, optimizer, random states
    RUN/step_00000100/huggingface/        where the whole model was trained (``whole`` in the
                            manifest) and is in ``state``: config.json and tokenizer; the base is
                            then what it began with, and not needed any more
    RUN/latest              the name of the newest step folder, for people and scripts

Routers of ``fit_stand_ins`` are one such step folder, without a run around it.

A manifest has a checksum of itself, so all that a checkpoint holds is covered; a step names its
run and its number, so it is taken for no other.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path

import xxhash

from megatron_mod.checkpoint import checksums
from megatron_mod.checkpoint.folders import files_below
from megatron_mod.config import model_folder

MANIFEST, LATEST = model_folder.MANIFEST, model_folder.LATEST
HUGGINGFACE = model_folder.HUGGINGFACE
STATE = "state"
CONTENT = "content.json"  # in a base's state: what its tensors hold, however they are stored
ROUTERS = "routers"
CONFIG = model_folder.CONFIG
FORMAT = 3

_STEP = re.compile(r"step_(\d{8,})")
_RUN = re.compile(r"# run ([0-9a-f]{32}) checksum ([0-9a-f]{32})\n")


def write_manifest(folder: Path, values: Mapping) -> None:
    """Describe a folder that is otherwise complete, with the checksum of each of its files;
    called by one rank."""
    names = [name for name in files_below(folder) if name != MANIFEST]
    table = checksums.file_table(folder, names, together=False)
    text = manifest_text({"format": FORMAT, **values, "files": table})
    (folder / MANIFEST).write_text(text, encoding="utf-8")


def manifest_text(values: Mapping) -> str:
    """A manifest's values, with a checksum of them, as its file holds them."""
    values = {key: value for key, value in values.items() if key != "checksum"}
    return json.dumps({**values, "checksum": _checksum(json.dumps(values))}, indent=2) + "\n"


def read_manifest(folder: str | Path, *, kind: str | None = None) -> dict:
    """What a checkpoint folder says of itself.

    Raises:
        ValueError: not one of our checkpoint folders, a damaged manifest, another format, or
            another kind.
    """
    folder = Path(folder)
    path = folder / MANIFEST
    if not path.is_file():
        if _STEP.fullmatch(folder.name) or (folder / STATE).is_dir():
            raise ValueError(f"{path}: is missing; the checkpoint is damaged.")
        if model_folder.is_started_run(folder):
            raise ValueError(f"{folder}: {model_folder.NOT_SAVED}.")
        state = "has no " + MANIFEST if folder.is_dir() else "does not exist"
        raise ValueError(
            f"{folder}: {state}; give a folder that tools/convert_hf_to_megatron.py or "
            "launch/pretrain_router.py wrote."
        )
    try:
        text = path.read_text(encoding="utf-8")
        manifest = json.loads(text)
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror}.") from error
    except ValueError as error:
        raise ValueError(f"{path}: is not valid JSON; the checkpoint is damaged.") from error
    manifest = manifest if isinstance(manifest, dict) else {}
    other = manifest.get("format") != FORMAT
    if not (other and "checksum" not in manifest) and text != manifest_text(manifest):
        raise ValueError(
            f"{path}: its content is not what was written (its checksum differs); the checkpoint "
            "is damaged."
        )
    if other:
        raise ValueError(
            f"{path}: format {manifest.get('format')} is not {FORMAT}, the one this release reads; "
            "convert or train again."
        )
    if kind and manifest["kind"] != kind:
        raise ValueError(
            f"{folder}: is a {manifest['kind']!r} checkpoint where a {kind!r} one is needed."
        )
    return manifest


def verify_checkpoint(folder: str | Path) -> dict:
    """The manifest, once the folder is where it belongs and every file has the checksum it lists;
    called by all ranks alike.

    Raises:
        ValueError: naming the first file that is damaged, or the folder.
    """
    folder = Path(folder)
    manifest = read_manifest(folder)
    if manifest["kind"] == "routers":
        _check_place(folder, manifest)
    checksums.verify(folder, manifest["files"])
    return manifest


def _check_place(step: Path, manifest: dict) -> None:
    named = _STEP.fullmatch(step.name)
    if named and int(named[1]) != manifest["step"]:
        raise ValueError(
            f"{step}: holds step {manifest['step']}; the folder has another step's name."
        )
    run = run_of(step.parent)
    if run and manifest.get("run") != run:
        raise ValueError(f"{step}: was written by another run than the one in {step.parent}.")


def content_fingerprint(manifest: dict) -> str:
    """A name for the content of a base: its tensors, config and tokenizer. How the tensors lie in
    files is no part of it, so that the same conversion gives the same name wherever it is made."""
    files = manifest["files"]
    stored = {name for name in files if name.startswith(f"{STATE}/")} - {f"{STATE}/{CONTENT}"}
    return checksums.fingerprint({name: files[name] for name in files.keys() - stored})


def step_folder(run: Path, step: int) -> Path:
    return run / f"step_{step:08d}"


def step_folders(run: Path) -> list[Path]:
    """The checkpoints of a run, the newest first."""
    found = [path for path in run.glob("step_*") if _STEP.fullmatch(path.name)]
    return sorted(found, key=lambda path: int(path.name.removeprefix("step_")), reverse=True)


def resolve_step(folder: str | Path) -> Path:
    """The folder itself, or the newest step of a training run's folder."""
    folder = Path(folder)
    return folder if (folder / MANIFEST).is_file() else next(iter(step_folders(folder)), folder)


def is_whole(folder: str | Path) -> bool:
    """Whether it is a training of the whole model, or one of its steps, which hold all of it."""
    step = resolve_step(folder)
    return (step / MANIFEST).is_file() and bool(read_manifest(step).get("whole"))


def settings_text(run: str, settings: str) -> str:
    """``config.yaml`` of a run: its identity and a checksum in a comment, then the settings."""
    return f"# run {run} checksum {_checksum(run + settings)}\n{settings}"


def settings_run(run: Path) -> str | None:
    """The identity in a run's ``config.yaml``; ``None`` if the file is not what was written."""
    try:
        text = (run / CONFIG).read_text(encoding="utf-8")
    except (OSError, ValueError):
        return None
    first = _RUN.match(text)
    return first[1] if first and text == settings_text(first[1], text[first.end() :]) else None


def run_of(folder: Path) -> str | None:
    """The identity of the run in a folder, which all its checkpoints have.

    ``config.yaml`` says it; if that is lost, the checkpoints do. ``None``: it has neither.

    Raises:
        ValueError: without ``config.yaml``, checkpoints of several runs.
    """
    if run := settings_run(folder):
        return run
    found: dict[str | None, str] = {}
    for step in step_folders(folder):
        try:
            found.setdefault(read_manifest(step).get("run"), step.name)
        except ValueError:
            continue  # a damaged one says nothing
    if len(found) > 1:
        raise ValueError(
            f"{folder / CONFIG}: is missing or damaged, and the checkpoints beside it are of "
            f"{len(found)} runs (for example {' and '.join(found.values())}); remove those that "
            "do not belong here."
        )
    return next(iter(found), None)


def _checksum(text: str) -> str:
    return xxhash.xxh3_128(text.encode()).hexdigest()
