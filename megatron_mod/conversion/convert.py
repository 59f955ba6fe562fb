"""The conversions, each a walk over a family's table that holds one parameter at a time."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from megatron_mod.conversion import checkpoint, mappings, routers
from megatron_mod.conversion.check import check_hf_names, megatron_shapes
from megatron_mod.conversion.checksums import fingerprint
from megatron_mod.conversion.export import add_routing, make_portable
from megatron_mod.conversion.families import family_of
from megatron_mod.conversion.hf_reader import COMPANION_FILES, HFReader, read_config
from megatron_mod.conversion.hf_writer import MAX_SHARD_BYTES, HFWriter
from megatron_mod.conversion.progress import byte_progress
from megatron_mod.conversion.routers import HF_ROUTER_KEY
from megatron_mod.conversion.source import open_source
from megatron_mod.conversion.state import save_tensors
from megatron_mod.conversion.weights import hf_weights
from megatron_mod.folders import new_folder

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def hf_to_megatron(
    hf_path: str | Path,
    save: str | Path,
    *,
    dtype: str | None = None,
    routers_path: str | Path | None = None,
) -> None:
    """Write ``hf_path`` as a base checkpoint under ``save``.

    Args:
        dtype: change all weights to this one of ``DTYPES``; ``None`` keeps each one's own.
        routers_path: routers to put beside the base, of a run of ours or of the published code.

    Raises:
        ValueError: anything wrong with the folders, or ``save`` exists; nothing is left behind.
    """
    hf_path = Path(hf_path)
    hf_config = read_config(hf_path)
    family = family_of(hf_config)
    arch = family.architecture_of(hf_config)
    found = routers.read_routers(routers_path, arch) if routers_path else None
    with new_folder(save) as folder, HFReader(hf_path) as reader:
        check_hf_names(family, arch, reader.names(), hf_path)
        table = family.table(arch)
        like = {name: _as(reader.like(name), dtype) for row in table for name in row.hf}
        shapes = megatron_shapes(family, arch, like, hf_path)
        tensors = {
            row.megatron: torch.empty(
                shapes[row.megatron], dtype=like[row.hf[0]].dtype, device="meta"
            )
            for row in table
        }
        with byte_progress(f"Writing {save}", total=_size(tensors.values())) as advance:
            read = {
                row.megatron: partial(_merge, row, reader, tensors[row.megatron], advance)
                for row in table
            }
            save_tensors(tensors, folder / checkpoint.STATE, read=read)
        copy_companions(hf_path, folder / checkpoint.HUGGINGFACE, dtype=dtype)
        checkpoint.write_manifest(folder, {"kind": "base", "family": family.model_type})
        if found:
            files = checkpoint.read_manifest(folder)["files"]
            routers.write_step(
                folder / checkpoint.ROUTERS, *found, base="..", fingerprint=fingerprint(files)
            )


def _merge(
    row: mappings.Mapping, reader: HFReader, like: Tensor, advance: Callable[[int], None]
) -> Tensor:
    tensor = mappings.to_megatron(row, reader.rows, len(like), 0, len(like))
    advance(like.nbytes)
    return tensor.to(like.dtype)


def megatron_to_hf(
    load: str | Path,
    save: str | Path,
    *,
    base: str | Path | None = None,
    dtype: str | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    routers_path: str | Path | None = None,
) -> None:
    """Write a base checkpoint, or a training run with its routers, as a Hugging Face folder.

    Args:
        base: where the base of a training run is now, if not where it was.
        dtype: change all weights but the routers to this one of ``DTYPES``.
        routers_path: export the base with these routers.

    Raises:
        ValueError: ``load`` is no checkpoint of ours, is damaged or does not match its base, or
            ``save`` exists; nothing is left behind.
    """
    source = open_source(load, base=base)
    chosen = None
    if routers_path is not None:
        if source.routing:
            raise ValueError(
                f"--routers {routers_path}: {load} has routers of its own; give its base."
            )
        chosen = routers.read_routers(routers_path, source.base.arch)
    elif source.routing:
        chosen = source.routing, routers.read_step(source.step, source.routing)
    with new_folder(save) as folder, hf_weights(source.base) as weights:
        writer = HFWriter(folder, max_shard_bytes=max_shard_bytes)
        total = _size(_as(weight.like, dtype) for weight in weights)
        with byte_progress(f"Writing {save}", total=total) as advance:
            for weight in weights:
                like = _as(weight.like, dtype)
                writer.add(weight.name, like, partial(_read, weight.read, like, advance))
            for layer, weight in chosen[1].items() if chosen else ():
                writer.add(HF_ROUTER_KEY.format(layer), weight)
            writer.close()
        copy_companions(source.base.huggingface, folder, dtype=dtype)
        make_portable(folder)
        if chosen:
            add_routing(folder, chosen[0])


def _read(read: Callable[[], Tensor], like: Tensor, advance: Callable[[int], None]) -> Tensor:
    tensor = read().to(like.dtype)
    advance(like.nbytes)
    return tensor


def export_routers(load: str | Path, save: str | Path, *, base: str | Path | None = None) -> None:
    """Write a training run's routers alone, as the published code saves them.

    Raises:
        ValueError: ``load`` is no training run, is damaged or does not match its base, or ``save``
            exists; nothing is left behind.
    """
    source = open_source(load, base=base)
    if source.routing is None:
        raise ValueError(f"{load}: holds no routers; give a training run, or one of its steps.")
    weights = routers.read_step(source.step, source.routing)
    with new_folder(save) as folder:
        routers.write_published(
            folder, source.routing, weights, read_config(source.base.huggingface)
        )


def copy_companions(source: Path, target: Path, *, dtype: str | None = None) -> None:
    """Copy config, tokenizer and generation settings; the config tells of a changed dtype."""
    target.mkdir(exist_ok=True)
    for name in COMPANION_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)
    if dtype:
        path = target / "config.json"
        config = json.loads(path.read_text(encoding="utf-8"))
        key = "dtype" if "dtype" in config else "torch_dtype"
        path.write_text(json.dumps({**config, key: dtype}, indent=2) + "\n", encoding="utf-8")


def _as(like: Tensor, dtype: str | None) -> Tensor:
    return like.to(DTYPES[dtype]) if dtype else like


def _size(tensors) -> int:
    return sum(tensor.nbytes for tensor in tensors)
