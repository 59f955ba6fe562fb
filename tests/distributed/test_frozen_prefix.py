"""A training that reads what enters the first routed layer is the one that computes it, however its
ranks are laid out."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.distributed import prefix_cases
from tests.helpers.ranks import run_ranks
from tests.helpers.runs import DEFAULT, Trainer, metrics

EXACT, LATER = 1e-5, 2e-3  # relative; after a step Adam makes much of what is near zero
ROUTED = {"router__layers": "[2,3]", "router__layers__deepest": None, "router__stand_in_rank": 4}
STEPS = {"train__steps": 2, "train__global_batch_size": 8, "checkpoint__interval": 0}
TENSOR = {"parallel__tensor_model_parallel_size": 2, "parallel__sequence_parallel": "true"}
PIPELINE = {"parallel__pipeline_model_parallel_size": 2}
VIRTUAL = {**PIPELINE, "parallel__virtual_pipeline_model_parallel_size": 2}
CONTEXT = {"parallel__context_parallel_size": 2}
# In a first step that keeps everything, nothing but a penalty gives a distillation a gradient.
PENALTY = {"router__capacity_loss_weight": 0.3, "router__capacity_warmup_fraction": 0}
KINDS = {
    "tensor": ({"tensor": 2}, {**TENSOR, "train__loss": "both"}),
    "pipeline": ({"pipeline": 2}, {**PIPELINE, **PENALTY, "train__loss": "distill"}),
    "virtual": ({"pipeline": 2, "virtual_pipeline": 2}, VIRTUAL),
    "context": ({"context": 2}, {**CONTEXT, "router__granularity": "block_sequence"}),
    "data": ({}, {"data__packing": "true", "train__trainable": "routers+stand_ins"}),
}


QUICK = ("tensor", "pipeline-tied", "data")
REST = ("pipeline", "virtual", "context", "data-tied")


@pytest.fixture(
    scope="module", params=[QUICK, pytest.param(REST, marks=pytest.mark.slow)],
    ids=["quick", "rest"],
)  # fmt: skip
def found(request, tmp_path_factory, single_process):
    """Of kinds, tied or not, the runs' folders, recomputing and cached, and each rank's gradients
    of both."""
    root = tmp_path_factory.mktemp("prefix")
    jobs, folders = [], {}
    for tied in (True, False):
        trainer = Trainer(root / f"tied-{tied}", tie_word_embeddings=tied)
        trainer.write_distinct()
        for name, (degrees, changes) in KINDS.items():
            key = f"{name}-tied" if tied else name
            if key not in request.param:
                continue
            cache = {
                "train__frozen_prefix": "cache",
                "train__prefix_cache": root / key / "states",
            }
            for how, own in (("recompute", {}), ("cache", cache)):
                folder = root / key / how
                settings = {**DEFAULT, **ROUTED, **STEPS, **changes, **own}
                jobs.append((degrees, trainer.arguments(folder, **settings)))
                folders.setdefault(key, []).append(folder)
    ranks = run_ranks(prefix_cases.gradients, jobs, world=2, folder=root / "ranks", seconds=900)
    return {
        key: (folders[key], [rank[2 * n : 2 * n + 2] for rank in ranks])
        for n, key in enumerate(folders)
    }


def test_loss_and_gradients_are_the_same(found):
    for kind, ((recompute, cache), ranks) in found.items():
        require_same(kind, recompute, cache, ranks)


def require_same(kind: str, recompute: Path, cache: Path, ranks: list[list[list[dict]]]) -> None:
    for line, wanted in zip(metrics(cache), metrics(recompute), strict=True):
        for key in ("loss", "task_loss", "grad_norm", "capacity"):
            rel = EXACT if line["step"] == 1 else LATER
            where = kind, line["step"], key
            assert line[key] == pytest.approx(wanted[key], rel=rel, abs=1e-7), where
    merged = [
        [{k: g for rank in ranks for k, g in rank[how][step].items()} for step in range(2)]
        for how in (0, 1)
    ]
    for step, (wanted, gradients) in enumerate(zip(*merged, strict=True)):
        assert gradients.keys() == wanted.keys(), kind
        assert {layer for layer, _ in wanted} == {2, 3}, kind
        for key, exact in wanted.items():
            difference = (gradients[key] - exact).abs().max()
            rel = LATER if step else EXACT
            assert difference <= rel * exact.abs().max() + 1e-8, (kind, step, key)
