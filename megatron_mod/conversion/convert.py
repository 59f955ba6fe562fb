"""The conversions, each a walk over a family's table that holds one parameter at a time."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException

from megatron_mod.checkpoint.companions import check_companions, copy_companions
from megatron_mod.checkpoint.distributed import save_tensors
from megatron_mod.checkpoint.export_checksums import as_written, write_checksums
from megatron_mod.checkpoint.folders import new_folder, require_room
from megatron_mod.checkpoint.manifest import (
    HUGGINGFACE,
    MANIFEST,
    ROUTERS,
    STATE,
    content_fingerprint,
    is_whole,
    read_manifest,
    resolve_step,
    write_manifest,
)
from megatron_mod.config.lora import lora_of
from megatron_mod.config.model_folder import LORA
from megatron_mod.conversion import mappings, routers
from megatron_mod.conversion.check import check_hf_names, check_tied, megatron_shapes
from megatron_mod.conversion.export import add_routing, make_portable
from megatron_mod.conversion.families import family_of
from megatron_mod.conversion.finite import cast
from megatron_mod.conversion.fused_experts import open_weights
from megatron_mod.conversion.hf_reader import TensorReader, read_config
from megatron_mod.conversion.hf_writer import MAX_SHARD_BYTES, HFWriter
from megatron_mod.conversion.lora import read_step_adapters
from megatron_mod.conversion.merging import merged
from megatron_mod.conversion.peft import write_peft
from megatron_mod.conversion.progress import byte_progress
from megatron_mod.conversion.source import open_source
from megatron_mod.conversion.weights import Weight, hf_weights
from megatron_mod.model.architecture import Architecture
from megatron_mod.routing.config import RoutingConfig

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_OVERHEAD = 2**17  # bytes beside tensors and companions: manifest, metadata, modelling file
_PER_TENSOR = 2**12  # and with each tensor: its entry, or a file's frame and half a block


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
        ValueError: anything wrong with the folders, weights that are not finite, too little room,
            or ``save`` exists; nothing is left behind.
    """
    with new_folder(save) as folder, as_written(hf_path):
        _fill_base(folder, Path(hf_path), Path(save), dtype=dtype, routers_path=routers_path)


def _fill_base(
    folder: Path, hf_path: Path, save: Path, *, dtype: str | None, routers_path: str | Path | None
) -> None:
    hf_config = read_config(hf_path)
    family = family_of(hf_config)
    arch = family.architecture_of(hf_config)
    beside = check_companions(hf_path)
    found = _read_routers(routers_path, arch) if routers_path else None
    with open_weights(hf_path, family, arch) as reader:
        check_hf_names(family, arch, reader.names(), hf_path)
        check_tied(reader, tied=arch.tied_embeddings)
        table = family.table(arch)
        like = {name: _as(reader.like(name), dtype) for row in table for name in row.hf}
        shapes = megatron_shapes(family, arch, like, hf_path)
        tensors = {
            row.megatron: torch.empty(
                shapes[row.megatron], dtype=like[row.hf[0]].dtype, device="meta"
            )
            for row in table
        }
        total = _size(tensors.values())
        added = [t for own in found[1].values() for t in own.values()] if found else []
        size = total + _size(added) + beside + _OVERHEAD
        size += _PER_TENSOR * (len(tensors) + len(added))
        require_room(save, size, what="the checkpoint")
        with byte_progress(f"Writing {save}", total=total) as advance:
            read = {
                row.megatron: partial(_merge, row, reader, tensors[row.megatron], advance)
                for row in table
            }
            with _plain_errors():
                save_tensors(tensors, folder / STATE, read=read)
    copy_companions(hf_path, folder / HUGGINGFACE, dtype=dtype)
    write_manifest(folder, {"kind": "base", "family": family.model_type})
    if found:
        fingerprint = content_fingerprint(read_manifest(folder))
        routers.write_step(folder / ROUTERS, *found, base="..", fingerprint=fingerprint)


@contextlib.contextmanager
def _plain_errors() -> Iterator[None]:
    """Take a ``ValueError`` of reading out of what torch makes of it while it writes."""
    try:
        yield
    except CheckpointException as error:
        for cause, _ in error.failures.values():
            if isinstance(cause, ValueError):
                raise ValueError(str(cause)) from error
        raise


def _merge(
    row: mappings.Mapping, reader: TensorReader, like: Tensor, advance: Callable[[int], None]
) -> Tensor:
    tensor = mappings.to_megatron(row, reader.rows, len(like), 0, len(like))
    advance(like.nbytes)
    return cast(tensor, like.dtype, row.megatron)


def megatron_to_hf(
    load: str | Path,
    save: str | Path,
    *,
    base: str | Path | None = None,
    dtype: str | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    routers_path: str | Path | None = None,
    lora: Literal["merge", "apart"] | None = None,
) -> None:
    """Write a base checkpoint, or a training run with its routers, as a Hugging Face folder.

    Args:
        base: where the base of a training run is now, if not where it was.
        dtype: change all weights but the routers and adapters to this one of ``DTYPES``.
        routers_path: export the base with these routers.
        lora: ``merge`` a run's adapters into the weights, which is what becomes of them without it,
            or write them ``apart``, in the folder ``lora`` of PEFT's format.

    Raises:
        ValueError: ``load`` is no checkpoint of ours, is damaged or does not match its base, its
            weights are not finite, there is too little room, ``save`` exists, ``lora`` without
            adapters, or routers that draw lots; nothing is left behind.
    """
    source = open_source(load, base=base)
    _refuse_lots(source.routing, load)
    adapters = read_step_adapters(source.step) if source.step and source.lora else None
    if lora and adapters is None:
        raise ValueError(f"--lora {lora}: {load} has no adapters; leave it out.")
    chosen = routers.read_source(source)
    if routers_path is not None:
        if chosen:
            raise ValueError(
                f"--routers {routers_path}: {load} has routers of its own; give its base."
            )
        chosen = _read_routers(routers_path, source.base.arch)
        _refuse_lots(chosen[0], routers_path)
    beside = check_companions(source.base.huggingface)
    with new_folder(save) as folder, hf_weights(source.base) as weights:
        if adapters and lora != "apart":
            weights = merged(weights, *adapters)
        writer = HFWriter(folder, max_shard_bytes=max_shard_bytes)
        like = [_as(weight.like, dtype) for weight in weights]
        added = routers.hf_tensors(chosen[1], like[0].dtype) if chosen else {}
        total = _size(like) + _size(added.values())
        size = total + beside + _OVERHEAD + _PER_TENSOR * (len(weights) + len(added))
        if lora == "apart":
            size += sum(_size(own.values()) + _PER_TENSOR for own in adapters[1].values())
        require_room(Path(save), size, what="the export")
        with byte_progress(f"Writing {save}", total=total) as advance:
            for weight, tensor in zip(weights, like, strict=True):
                writer.add(weight.name, tensor, partial(_read, weight, tensor, advance))
            for name, tensor in added.items():
                writer.add(name, tensor, partial(_give, tensor, advance))
            writer.close()
        copy_companions(source.base.huggingface, folder, dtype=dtype)
        make_portable(folder)
        if chosen:
            add_routing(folder, chosen[0])
        if lora == "apart":
            write_peft(folder / LORA, *adapters, base=Path(save).resolve())
        write_checksums(folder)


def _refuse_lots(routing: RoutingConfig | None, folder: str | Path) -> None:
    """Refuse to export routers whose decisions are drawn by lot."""
    if routing is not None and routing.selection == "random":
        raise ValueError(
            f"{folder}: router.selection = random: its tokens are drawn by lot, which is for "
            "comparing losses in training, and nothing decides in generation; export a run that "
            "was trained with router.selection top_k."
        )


def _read(weight: Weight, like: Tensor, advance: Callable[[int], None]) -> Tensor:
    tensor = cast(weight.read(), like.dtype, weight.name)
    advance(like.nbytes)
    return tensor


def _give(tensor: Tensor, advance: Callable[[int], None]) -> Tensor:
    advance(tensor.nbytes)
    return tensor


def export_routers(load: str | Path, save: str | Path, *, base: str | Path | None = None) -> None:
    """Write a training run's routers alone, as the published code saves them.

    Raises:
        ValueError: ``load`` is no training run, is damaged or does not match its base, or ``save``
            exists; nothing is left behind.
    """
    source = open_source(load, base=base)
    chosen = routers.read_source(source)
    if chosen is None:
        raise ValueError(f"{load}: holds no routers; give a training run, or one of its steps.")
    _refuse_parting(source.step, "--routers-only")
    with new_folder(save) as folder:
        routers.write_published(folder, *chosen, read_config(source.base.huggingface))
        write_checksums(folder)


def _read_routers(folder: str | Path, arch: Architecture) -> tuple[RoutingConfig, routers.Added]:
    found = routers.read_routers(folder, arch)
    _refuse_parting(resolve_step(folder), f"--routers {folder}")
    return found


def _refuse_parting(step: Path, option: str) -> None:
    """Refuse to leave behind, unsaid, what a run trained beside its routers."""
    if is_whole(step):
        raise ValueError(
            f"{option}: these routers were trained with all of their model, which they would be "
            "without; export the whole run, or train on from it (model.checkpoint)."
        )
    if (step / MANIFEST).is_file() and lora_of(read_manifest(step)):
        raise ValueError(
            f"{option}: these routers were trained with adapters, which they would be without; "
            "export the whole run, or train on from it (model.routers and model.lora)."
        )


def _as(like: Tensor, dtype: str | None) -> Tensor:
    return like.to(DTYPES[dtype]) if dtype else like


def _size(tensors) -> int:
    return sum(tensor.nbytes for tensor in tensors)
