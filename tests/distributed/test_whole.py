"""Training all parameters: gradients against plain torch, at every topology."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from megatron_mod.checkpoint.distributed import load_tensors
from megatron_mod.conversion import mappings
from megatron_mod.conversion.source import open_base
from megatron_mod.routing.config import NO_ROUTERS
from tests.distributed import cases, resume_cases, whole_cases
from tests.distributed.test_distributed_optimizer import DISTRIBUTED as DISTRIBUTED_RUN
from tests.distributed.test_distributed_optimizer import job
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
from tests.helpers.runs import DEFAULT, Trainer, metrics, saved

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
    wanted = expected_of(case, asked)
    return wanted["task_loss"], by_key(case, asked.routing, wanted)


def by_key(case, routing, wanted: dict) -> dict[str, torch.Tensor]:
    """Gradients by the keys of a checkpoint."""
    base, named = open_base(case[1]), dict(wanted["base"])
    for name, part in base.family.fused(base.arch).items():
        if part.name in named:  # Transformers 5 has a layer's experts in one
            whole = named[part.name]
            rows = whole if part.expert is None else whole[part.expert]
            named[name] = rows[part.start : part.stop]

    def read(name: str, start: int, stop: int) -> torch.Tensor:
        return named[name][start:stop]

    found = {}
    for row in base.family.table(base.arch):
        rows = sum(len(named[name]) for name in row.hf)
        found[row.megatron] = mappings.to_megatron(row, read, rows, 0, rows)
    for (layer, name), gradient in wanted["gradients"].items():
        if layer in routing.layers:
            found[f"decoder.layers.{layer}.{name}"] = gradient
    return found


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
                ours, theirs, _ = next(found)
                assert ours == pytest.approx(loss, rel=EXACT), what
                check_gradients(theirs, gradients, what)


def check_gradients(theirs: dict, exact: dict, what: object) -> None:
    assert theirs.keys() == exact.keys(), what
    for key, wanted in exact.items():
        gradient = theirs[key][: len(wanted)]  # the rest pads the vocabulary
        assert not theirs[key][len(wanted) :].any(), (what, key)
        difference, size = (gradient - wanted).abs().max(), wanted.abs().max()
        assert size > 0, (what, key)
        assert difference <= EXACT * size + 1e-7, (what, key, difference, size)


def test_one_rank(models, tmp_path):
    check(models[2:], TRAININGS, 1, [{}], tmp_path / "every")
    check(models[:2], TRAININGS[::2], 1, [{}], tmp_path / "others")


def test_what_is_computed_again(models, tmp_path):
    recomputing = [{"recompute": recompute} for recompute in ("selective", "full")]
    check(models[2:], TRAININGS[1:3], 1, recomputing, tmp_path)


def test_two_ranks(models, tmp_path):
    topologies = [
        {**TENSOR, "recompute": "full"},
        PIPELINE,
        {"pipeline": 2, "virtual_pipeline": 2},
        {"context": 2},
        DISTRIBUTED,
    ]
    check(models[2:], TRAININGS[2:3], 2, topologies, tmp_path / "tied")
    check(models[1:2], TRAININGS[1:2], 2, [TENSOR, PIPELINE], tmp_path / "untied")


@pytest.fixture(scope="module")
def trainer(tmp_path_factory, single_process):
    made = Trainer(tmp_path_factory.mktemp("trainer"), tie_word_embeddings=True)
    made.write_distinct()
    return made


SETTINGS = {
    **DEFAULT, "router__init": "zeros", "train__trainable": "all", "optimizer__lr": 0.001,
    "optimizer__weight_decay": 0.1, "checkpoint__keep": 0, "train__steps": 4,
}  # fmt: skip


@pytest.mark.slow
def test_a_run_goes_on_at_another_topology(trainer, tmp_path):
    """From the same start to the same end, to rounding, wherever it goes on; in bfloat16 with fp32
    main parameters to the bit where it was."""
    narrow = {**SETTINGS, "model__dtype": "bfloat16", **DISTRIBUTED_RUN}
    alone, tensor, in_bfloat16 = (tmp_path / name for name in ("alone", "tensor", "bfloat16"))
    trainer.train(alone, **SETTINGS)
    jobs = [
        job(
            trainer,
            tensor,
            {**SETTINGS, "parallel__sequence_parallel": "true", **DISTRIBUTED_RUN},
            tensor=2,
        ),
        job(trainer, tmp_path / "stages", SETTINGS, after=tensor, pipeline=2),
        job(trainer, in_bfloat16, narrow, pipeline=2),
        job(trainer, tmp_path / "again", narrow, after=in_bfloat16, pipeline=2),
    ]
    run_ranks(resume_cases.trainings, jobs, world=2, folder=tmp_path / "ranks", seconds=500)
    final = load_tensors(alone / "step_00000004" / "state")
    counts = set()
    for run in (alone, tensor, in_bfloat16):
        summary = json.loads((run / "summary.json").read_text())
        counts.add(summary["train"]["trainable_parameters"])
    assert len(counts) == 1, "padding of the vocabulary counts nothing"
    for name in ("tensor", "stages"):
        for line, wanted in zip(metrics(tmp_path / name), metrics(alone), strict=True):
            for key in ("loss", "task_loss", "grad_norm", "capacity"):
                assert line[key] == pytest.approx(wanted[key], rel=1e-3), (name, key)
        found = load_tensors(tmp_path / name / "step_00000004" / "state")
        for key in (key for key in final if not key.startswith(("random", "optimizer"))):
            size = len(final[key])  # without what pads the vocabulary
            torch.testing.assert_close(
                found[key][:size], final[key], rtol=1e-2, atol=2e-4, msg=f"{name} {key}"
            )
    assert metrics(tmp_path / "again") == metrics(in_bfloat16)
    assert saved(tmp_path / "again") == saved(in_bfloat16)
