"""Mixtures of experts: logits at every topology against Hugging Face, and the granularities that
route whole layers, or whole mixtures, against the formula."""

from __future__ import annotations

from dataclasses import replace

import pytest

from megatron_mod.routing.config import RoutingConfig
from tests.distributed import cases
from tests.distributed.test_granularities import (
    EVERY,
    SPARSE,
    check,
    make_case,
    scheme,
    with_added,
)
from tests.distributed.test_parity import LOGITS, ZEROS
from tests.helpers import tiny
from tests.helpers.ranks import run_ranks

SEQUENCE_PARALLEL = {"tensor": 2, "sequence_parallel": True}
TWO = [{"expert": 2}, {"tensor": 2}, SEQUENCE_PARALLEL, {"pipeline": 2}]
FOUR = [
    {"expert": 4},
    {"expert": 2, "pipeline": 2},
    {"expert": 2, "tensor": 2},
    {"expert": 2, **SEQUENCE_PARALLEL},
]
NEVER = 1 - 1e-7  # a threshold under which everything is skipped
SKIPS_ALL = [
    scheme("mlp_token", threshold=NEVER, training_compute="sparse"),
    scheme("block_sequence", threshold=NEVER, training_compute="sparse"),
]
EXACT = scheme("block_token", threshold=1e-9, training_compute="sparse")  # none skipped


@pytest.fixture(scope="module")
def models(tmp_path_factory, single_process):
    """Each family's Hugging Face folder, read as it is and converted."""
    root, pairs = tmp_path_factory.mktemp("mixtures"), {}
    for name, (kind, changes) in tiny.MIXTURES.items():
        hf = tiny.save_model(root / name, kind, **changes)
        cases.convert(hf, root / f"{name}-megatron")
        pairs[name] = [(hf, hf), (hf, root / f"{name}-megatron")]
    return pairs


@pytest.mark.parametrize(("world", "topologies"), [(1, [{}]), (2, TWO), (4, FOUR)])
def test_logits_equal_hugging_face(models, world, topologies, tmp_path):
    shared = [pair for name in ("mixtral", "qwen3_moe") for pair in models[name]]
    whole = [each for each in topologies if "tensor" not in each]  # OLMoE's norm is of all heads
    for number, (pairs, own) in enumerate([(shared, topologies), (models["olmoe"], whole)]):
        found = run_ranks(
            cases.logit_differences, pairs, own, 128, ZEROS, world=world,
            folder=tmp_path / str(number),
        )  # fmt: skip
        for per_rank in found:
            assert len(per_rank) == len(pairs) * len(own)
            assert max(per_rank.values()) <= LOGITS, per_rank


@pytest.fixture(scope="module", params=["mixtral", "qwen3_moe"])
def case(request, tmp_path_factory, single_process):
    return make_case(tmp_path_factory.mktemp(request.param), *tiny.MIXTURES[request.param])


def recomputed(topology: dict) -> list[dict]:
    return [{**topology, "recompute": how} for how in ("full", "selective")]


@pytest.mark.parametrize(
    ("trainings", "world", "topologies"),
    [
        ([*EVERY, *SPARSE, *SKIPS_ALL], 1, [{}, {"packed": True}]),
        (
            [*EVERY, *SPARSE, *SKIPS_ALL, EXACT],
            2,
            [{"expert": 2}, {"expert": 2, "rows": 1}],
        ),
        (
            [EVERY[3], SPARSE[1], SPARSE[5], SPARSE[-1], *SKIPS_ALL],
            2,
            [
                *recomputed({"expert": 2}),
                {"tensor": 2},
                SEQUENCE_PARALLEL,
                {"pipeline": 2},
                {"context": 2, "expert": 2},
                {"expert": 2, "use_distributed_optimizer": True},
            ],
        ),
        (
            [SPARSE[3], SPARSE[-2], *SKIPS_ALL],
            4,
            [
                {"expert": 2, "pipeline": 2, "rows": 1},
                {"expert": 2, "pipeline": 2, "virtual_pipeline": 2, "rows": 1},
                {"expert": 2, **SEQUENCE_PARALLEL},
                {"expert": 2, "tensor": 2},
                {"expert": 4, "rows": 1},
            ],
        ),
    ],
    ids=["one_rank", "experts", "two_ranks", "four_ranks"],
)
def test_loss_and_gradients_equal_the_formula(case, trainings, world, topologies, tmp_path):
    check(case, trainings, world, topologies, tmp_path)
