"""Whether a set of tensors is exactly the model that a config.json describes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from megatron_mod.conversion.families.base import Family
from megatron_mod.conversion.hf_reader import TensorReader
from megatron_mod.model.architecture import Architecture


def check_hf_names(family: Family, arch: Architecture, names: set[str], folder: Path) -> None:
    """Require every Hugging Face tensor once.

    Raises:
        ValueError: tensors that are missing, or have no place; they are listed.
    """
    wanted = {name for row in family.table(arch) for name in row.hf}
    left = {name for name in names - wanted if not family.ignored(arch, name)}
    refuse_difference(
        wanted - names, left, what="tensors", whose=family.architecture, folder=folder
    )


def check_megatron_names(
    family: Family, arch: Architecture, names: Iterable[str], folder: Path
) -> None:
    """Require every Megatron parameter once.

    Raises:
        ValueError: parameters that are missing, or have no place; they are listed.
    """
    wanted, names = {row.megatron for row in family.table(arch)}, set(names)
    refuse_difference(
        wanted - names,
        names - wanted,
        what="parameters",
        whose=f"the {family.model_type} table",
        folder=folder,
    )


EMBEDDING, OUTPUT = "model.embed_tokens.weight", "lm_head.weight"
_ROWS = 8192  # compared at a time


def check_tied(reader: TensorReader, *, tied: bool, part: int = 0, parts: int = 1) -> None:
    """Refuse an output layer in the files of a model whose config.json ties it to the embedding.

    Transformers 4.57 drops it, and 5 uses it unless it equals the embedding.

    Args:
        tied: whether config.json does.
        part, parts: compare this part of so many.

    Raises:
        ValueError: there is one, and it is another tensor.
    """
    if not tied or not {EMBEDDING, OUTPUT} <= reader.names():
        return
    shapes = [tuple(reader.like(name).shape) for name in (EMBEDDING, OUTPUT)]
    starts = range(part * _ROWS, shapes[0][0] if shapes[0] else 0, parts * _ROWS)
    if shapes[0] != shapes[1] or not all(_same_rows(reader, start) for start in starts):
        raise ValueError(
            f"{reader.file(OUTPUT)}: {OUTPUT} is not {EMBEDDING}, but config.json has "
            "tie_word_embeddings = true; set that to false if the model has an output layer of its "
            f"own, or take {OUTPUT} out of the file."
        )


def _same_rows(reader: TensorReader, start: int) -> bool:
    first, second = (reader.rows(name, start, start + _ROWS) for name in (EMBEDDING, OUTPUT))
    return torch.equal(first.float(), second.float())


def megatron_shapes(
    family: Family, arch: Architecture, hf: Mapping[str, Tensor], folder: Path
) -> dict[str, tuple[int, ...]]:
    """The shape of every Megatron parameter, from the shapes of the Hugging Face tensors.

    Raises:
        ValueError: a tensor that does not have the shape config.json gives it, or tensors of one
            parameter that differ in dtype.
    """
    shapes = {}
    for row in family.table(arch):
        parts = {name: hf[name] for name in row.hf}
        if len({part.dtype for part in parts.values()}) > 1:
            dtypes = {name: str(part.dtype) for name, part in parts.items()}
            raise ValueError(
                f"{folder}: {dtypes}: Megatron keeps these in one parameter, so they must have one "
                "dtype; give --dtype."
            )
        shape = expected_shape(arch, row.megatron)
        sizes = dict.fromkeys(row.hf, 0)
        for run in row.runs(shape[0]):
            sizes[run.name] += run.stop - run.start
        for name, part in parts.items():
            wanted = (sizes[name], *shape[1:])
            if tuple(part.shape) != wanted:
                raise ValueError(
                    f"{folder}: {name}: shape {tuple(part.shape)} instead of {wanted}; the tensors "
                    "and config.json do not belong together."
                )
        shapes[row.megatron] = shape
    return shapes


def expected_shape(arch: Architecture, megatron: str) -> tuple[int, ...]:
    """The shape a Megatron parameter must have, vocabulary unpadded."""
    qkv = (arch.num_attention_heads + 2 * arch.num_query_groups) * arch.kv_channels
    hidden, ffn = arch.hidden_size, arch.ffn_hidden_size
    heads, groups = arch.num_attention_heads, arch.num_query_groups
    if not arch.qk_norm_across_heads:
        heads = groups = 1
    shapes = {  # the first part that is in the name counts
        "q_layernorm": (heads * arch.kv_channels,),
        "k_layernorm": (groups * arch.kv_channels,),
        "norm": (hidden,),
        "mlp.router": (arch.mixture.num_experts if arch.mixture else 0, hidden),
        "word_embeddings": (arch.vocab_size, hidden),
        "output_layer": (arch.vocab_size, hidden),
        "linear_qkv.weight": (qkv, hidden),
        "linear_qkv.bias": (qkv,),
        "linear_proj": (hidden, arch.num_attention_heads * arch.kv_channels),
        "linear_fc1": (2 * ffn, hidden),
        "linear_fc2": (hidden, ffn),
    }
    return next(shape for part, shape in shapes.items() if part in megatron)


def refuse_difference(
    missing: set[str], left: set[str], *, what: str, whose: str, folder: Path
) -> None:
    """Refuse a folder that lacks some names, or has others.

    Raises:
        ValueError: naming them, and ``whose`` the wanted ones are.
    """
    if missing:
        raise ValueError(f"{folder}: {len(missing)} {what} are missing: {_some(missing)}.")
    if left:
        raise ValueError(f"{folder}: {len(left)} {what} have no place in {whose}: {_some(left)}.")


def _some(names: set[str], most: int = 10) -> str:
    listed = ", ".join(sorted(names)[:most])
    return listed + (f" and {len(names) - most} more" if len(names) > most else "")
