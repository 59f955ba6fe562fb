"""Times of an export's prefill and decode beside its original's and the ideal, as a table."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from megatron_mod.benchmark.inference_speed import Pair, machine
from megatron_mod.config.shapes import SHAPES
from megatron_mod.conversion.hf_reader import read_config
from megatron_mod.parallel import device

PHASES = ("prefill", "decode")


def measure(
    *,
    dense: str | None,
    routed: str | None,
    shapes: str | None,
    granularity: str | None,
    keys_values: str | None,
    capacity: float | None,
    batches: Sequence[int],
    contexts: Sequence[int],
    repetitions: int,
    new_tokens: int,
    dtype: str | None,
) -> dict:
    """Print a table of all batches and contexts; the machine and the rows.

    Args:
        dense, routed: folders of a model and of an export of it.
        shapes, granularity, keys_values: random weights in their place.
        capacity: share of the prompts' units to keep (``None``: as the thresholds have it).
        dtype: ``None``: ``bfloat16`` on a GPU, else ``float32``.

    Raises:
        ValueError: contexts the model has no room for, or folders that do not belong together.
    """
    shape = SHAPES[shapes] if shapes else read_config(dense)
    room, longest = shape["max_position_embeddings"], max(contexts)
    if longest + new_tokens > room:
        raise ValueError(
            f"--contexts {longest}: with --new-tokens {new_tokens} it must fit into the model's "
            f"{room} positions; use at most {room - new_tokens}."
        )
    dtype = dtype or ("bfloat16" if device.HAS_GPU else "float32")
    of = {"dtype": getattr(torch, dtype)}
    if shapes:
        pair = Pair.of_shape(shapes, granularity, keys_values=keys_values, **of)
    else:
        pair = Pair.of_folders(dense, routed, **of)
    where, rows = machine(pair, dtype), []
    print(", ".join(f"{k} {v}" for k, v in where.items() if v is not None))
    print(header(), flush=True)
    for batch in batches:
        for context in contexts:
            row = pair.measure(
                batch,
                context,
                repetitions=repetitions,
                new_tokens=new_tokens,
                capacity=capacity,
            )
            rows.append(row)
            print(line(row), flush=True)
    return {"machine": where, "rows": rows}


def header() -> str:
    titles = ["batch", "context"]
    for phase in PHASES:
        titles += [f"{phase}: kept", "dense ms", "routed ms", "speed-up", "ideal", "share"]
        titles += ["of saving"]
    return f"| {' | '.join(titles)} |\n|{' --- |' * len(titles)}"


def line(row: dict) -> str:
    cells = [str(row["batch"]), str(row["context"])]
    for phase in PHASES:
        found = {"capacity": row["capacity"], **row[phase]}
        saving = found["saving_share"]
        cells += [
            f"{found['capacity']:.2f}",
            f"{1e3 * found['dense_s']:.1f}",
            f"{1e3 * found['routed_s']:.1f}",
            f"{found['speedup']:.2f}",
            f"{found['ideal']:.2f}",
            f"{100 * found['share']:.0f} %",
            "-" if saving is None else f"{100 * saving:.0f} %",
        ]
    return f"| {' | '.join(cells)} |"
