"""The two conversions, each a walk over a family's table."""

from __future__ import annotations

import shutil
from pathlib import Path

from torch import Tensor
from tqdm import tqdm

from megatron_mod.conversion import checkpoint
from megatron_mod.conversion.export import add_routing, make_portable
from megatron_mod.conversion.families import family_of
from megatron_mod.conversion.families.base import Family
from megatron_mod.conversion.hf_reader import COMPANION_FILES, HFReader, read_config
from megatron_mod.conversion.hf_writer import HFWriter
from megatron_mod.model.architecture import Architecture
from megatron_mod.routing.config import RoutingConfig

ROUTER_KEY = "decoder.layers.{}.router.weight"
HF_ROUTER_KEY = "model.layers.{}.router.weight"


def hf_to_megatron(hf_path: str | Path, save: str | Path) -> None:
    """Write ``hf_path`` as a base checkpoint under ``save``.

    Raises:
        ValueError: anything wrong with the folder, or ``save`` exists; nothing is left behind.
    """
    hf_path = Path(hf_path)
    hf_config = read_config(hf_path)
    family = family_of(hf_config)
    arch = family.architecture_of(hf_config)
    with checkpoint.new_folder(save) as folder, HFReader(hf_path) as reader:
        _check_names(family, arch, reader.names(), hf_path)
        tensors = {}
        for row in tqdm(family.table(arch), desc="reading", unit="tensor"):
            parts = [reader.tensor(name) for name in row.hf]
            try:
                tensors[row.megatron] = row.to_megatron(*parts)
            except RuntimeError as error:
                raise _mismatch(hf_path, row.hf, [tuple(p.shape) for p in parts]) from error
        _check_shapes(arch, tensors, hf_path)
        checkpoint.save_tensors(tensors, folder / checkpoint.STATE)
        copy_companions(hf_path, folder / checkpoint.HUGGINGFACE)
        checkpoint.write_manifest(folder, {"kind": "base", "family": family.model_type})


def megatron_to_hf(load: str | Path, save: str | Path) -> None:
    """Write a base checkpoint, or a training run with its routers, as a Hugging Face folder.

    Raises:
        ValueError: ``load`` is no checkpoint of ours or does not match its base, or ``save``
            exists; nothing is left behind.
    """
    step = checkpoint.resolve_step(load)
    manifest = checkpoint.read_manifest(step)
    base = step if manifest["kind"] == "base" else Path(manifest["base"])
    hf_config = read_config(base / checkpoint.HUGGINGFACE)
    family = family_of(hf_config)
    arch = family.architecture_of(hf_config)
    with checkpoint.new_folder(save) as folder:
        weights = checkpoint.load_tensors(base / checkpoint.STATE)
        writer = HFWriter(folder)
        for row in tqdm(family.table(arch), desc="writing", unit="tensor"):
            for name, tensor in zip(row.hf, row.to_hf(weights.pop(row.megatron)), strict=True):
                writer.add(name, tensor)
        if weights:
            raise ValueError(f"{base}: parameters without a row in the table: {sorted(weights)}.")
        copy_companions(base / checkpoint.HUGGINGFACE, folder)
        make_portable(folder)
        if manifest["kind"] == "routers":
            routing = RoutingConfig.from_dict(manifest["routing"])
            for layer, weight in load_routers(step, routing).items():
                writer.add(HF_ROUTER_KEY.format(layer), weight)
            add_routing(folder, routing)
        writer.close()


def load_routers(step: Path, routing: RoutingConfig) -> dict[int, Tensor]:
    """Router weights ``[1, H]`` by layer of a training step.

    Raises:
        ValueError: the saved routers are not those of ``routing``.
    """
    saved = checkpoint.load_tensors(step / checkpoint.STATE, keep="router.weight")
    saved = {k: v for k, v in saved.items() if k.startswith("decoder.")}
    wanted = {ROUTER_KEY.format(layer): layer for layer in routing.layers}
    if set(saved) != set(wanted):
        difference = sorted(set(saved) ^ set(wanted))
        raise ValueError(f"{step}: routers do not match its manifest: {difference}.")
    return {layer: saved[key] for key, layer in wanted.items()}


def copy_companions(source: Path, target: Path) -> None:
    """Copy config, tokenizer and generation settings."""
    target.mkdir(exist_ok=True)
    for name in COMPANION_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)


def _check_names(family: Family, arch: Architecture, names: set[str], folder: Path) -> None:
    wanted = {name for row in family.table(arch) for name in row.hf}
    missing = sorted(wanted - names)
    left = sorted(name for name in names - wanted if not family.ignored(arch, name))
    if missing:
        raise ValueError(f"{folder}: {len(missing)} tensors are missing: {_some(missing)}.")
    if left:
        raise ValueError(
            f"{folder}: {len(left)} tensors have no place in {family.architecture}: {_some(left)}."
        )


def _check_shapes(arch: Architecture, tensors: dict[str, Tensor], folder: Path) -> None:
    heads = arch.num_attention_heads + 2 * arch.num_query_groups
    hidden, ffn = arch.hidden_size, arch.ffn_hidden_size
    shapes = {
        "norm": (hidden,),
        "word_embeddings": (arch.vocab_size, hidden),
        "output_layer": (arch.vocab_size, hidden),
        "linear_qkv": (heads * arch.kv_channels, hidden),
        "linear_proj": (hidden, arch.num_attention_heads * arch.kv_channels),
        "linear_fc1": (2 * ffn, hidden),
        "linear_fc2": (hidden, ffn),
    }
    for name, tensor in tensors.items():
        expected = next(shape for part, shape in shapes.items() if part in name)
        if tuple(tensor.shape) != expected:
            raise _mismatch(folder, name, f"{tuple(tensor.shape)} instead of {expected}")


def _mismatch(folder: Path, what: object, shapes: object) -> ValueError:
    return ValueError(
        f"{folder}: {what}: shape {shapes}; the tensors and config.json do not belong together."
    )


def _some(names: list[str], most: int = 10) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
