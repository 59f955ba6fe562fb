"""Calibrated thresholds, written to where a model keeps its own."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

from megatron_mod.calibration.routed import Routed
from megatron_mod.checkpoint.companions import member
from megatron_mod.checkpoint.export_checksums import FILE as CHECKSUMS
from megatron_mod.checkpoint.export_checksums import write_checksums
from megatron_mod.checkpoint.folders import new_folder, write_durably
from megatron_mod.checkpoint.manifest import MANIFEST, manifest_text


def write_thresholds(
    model: Routed,
    thresholds: Sequence[float],
    *,
    save: str | Path | None,
    add: Callable[[Path], None],
) -> Path:
    """Change the thresholds of an export or of a training's step, or of a copy; returns its folder.

    Args:
        save: new folder for the copy; ``None``: change the model's own by one rename.
        add: writes further files into the folder.

    Raises:
        ValueError: ``save`` exists, or the folder holds a link to something outside of it.
    """
    settings = json.loads(model.settings.read_text(encoding="utf-8"))
    settings["routing"]["threshold"] = list(thresholds)
    if "base" in settings:  # relative for routers that lie in their base
        settings["base"] = str((model.folder / settings["base"]).resolve())
    is_manifest = model.settings.name == MANIFEST
    text = manifest_text(settings) if is_manifest else json.dumps(settings, indent=2) + "\n"
    if save is None:
        add(model.folder)
        checksums = model.folder / CHECKSUMS
        if has_checksums := checksums.exists():
            checksums.unlink()  # an export that is left without them is one all the same
        write_durably(model.settings, text)
        if has_checksums:
            write_checksums(model.folder)
        return model.folder
    with new_folder(save) as folder:
        for path in model.folder.rglob("*"):
            member(model.folder, path.relative_to(model.folder).as_posix())
        shutil.copytree(model.folder, folder, dirs_exist_ok=True)
        (folder / model.settings.name).write_text(text, encoding="utf-8")
        if (folder / CHECKSUMS).exists():
            write_checksums(folder)
        add(folder)
    return Path(save)
