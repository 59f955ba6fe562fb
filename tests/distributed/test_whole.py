"""Training all parameters: gradients against plain torch, at every topology."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from megatron_mod.conversion import mappings
from megatron_mod.conversion.source import open_base
from megatron_mod.routing.config import NO_ROUTERS
from tests.distributed import cases, whole_cases
from tests.distributed.test_granularities import (
    DISTRIBUTED,
    EVERY,
    EXACT,
    PIPELINE,
    RANK,
    SPARSE,
    TENSOR,
    expected_of,
    make_case,
)
from tests.helpers import tiny
from tests.helpers.ranks import run_ranks

MODELS = {
    "llama": ("llama", tiny.LLAMAS["odd_vocabulary"]),  # tied
    "qwen2": ("qwen2", {"num_key_value_heads": 2, "vocab_size": 131}),
    "qwen3": (
        "qwen3",
        {"num_key_value_heads": 2, "head_dim": 16, "vocab_size": 131, "tie_word_embeddings": True},
    ),
}


@pytest.fixture(scope="module")
def models(tmp_path_factory, single_process) -> list[tuple]:
    return [make_case(tmp_path_factory.mktemp(name), *MODELS[name]) for name in MODELS]


def whole(routing, **changes: object) -> cases.Asked:
    return cases.Asked(replace(routing, **changes), trained=whole_cases.WHOLE)


ADDED = {"bias": True, "stand_in_rank": RANK}
TRAININGS = [
    whole(NO_ROUTERS),
    whole(EVERY[1], **ADDED),  # attn_token
    whole(SPARSE[-2], **ADDED),  # block_token, selected keys
    whole(SPARSE[7]),  # attn_token+mlp_token
]
assert [each.routing.granularity for each in TRAININGS[1:]] == [
    "attn_token",
    "block_token",
    "attn_token+mlp_token",
]


def expected(case, asked: cases.Asked) -> tuple[float, dict[str, torch.Tensor]]:
    """Task loss, and gradients by the keys of a checkpoint."""
    base, wanted = open_base(case[1]), expected_of(case, asked)

    def read(name: str, start: int, stop: int) -> torch.Tensor:
        return wanted["base"][name][start:stop]

    found = {}
    for row in base.family.table(base.arch):
        rows = sum(len(wanted["base"][name]) for name in row.hf)
        found[row.megatron] = mappings.to_megatron(row, read, rows, 0, rows)
    for (layer, name), gradient in wanted["gradients"].items():
        if layer in asked.routing.layers:
            found[f"decoder.layers.{layer}.{name}"] = gradient
    return wanted["task_loss"], found


def check(models: list[tuple], trainings, world: int, topologies: list[dict], folder) -> None:
    wanted = [[expected(case, asked) for asked in trainings] for case in models]
    given = [(base, samples, added) for _, base, samples, added in models]
    found, *_ = run_ranks(
        whole_cases.gradients, given, topologies, trainings, folder / "gradients",
        world=world, folder=folder,
    )  # fmt: skip
    found = iter(found)
    for case, of_case in zip(models, wanted, strict=True):
        for topology in topologies:
            for asked, (loss, gradients) in zip(trainings, of_case, strict=True):
                what = (case[0].parent.name, topology, asked.routing.granularity)
                ours, theirs = next(found)
                assert ours == pytest.approx(loss, rel=EXACT), what
                assert theirs.keys() == gradients.keys(), what
                for key, exact in gradients.items():
                    gradient = theirs[key][: len(exact)]  # the rest pads the vocabulary
                    assert not theirs[key][len(exact) :].any(), (what, key)
                    difference, size = (gradient - exact).abs().max(), exact.abs().max()
                    assert size > 0, (what, key)
                    assert difference <= EXACT * size + 1e-7, (what, key)


def test_one_rank(models, tmp_path):
    check(models, TRAININGS, 1, [{}], tmp_path)


def test_what_is_computed_again(models, tmp_path):
    recomputing = [{"recompute": recompute} for recompute in ("selective", "full")]
    check(models[2:], TRAININGS, 1, recomputing, tmp_path)


def test_two_ranks(models, tmp_path):
    topologies = [
        {**TENSOR, "recompute": "full"},
        PIPELINE,
        {"pipeline": 2, "virtual_pipeline": 2},
        {"context": 2},
        DISTRIBUTED,
    ]
    check(models[1:], TRAININGS[1:3], 2, topologies, tmp_path)
