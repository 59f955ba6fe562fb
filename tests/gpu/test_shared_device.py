"""Several ranks on one device: tensor, pipeline, data and context parallelism on its tensors."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.distributed import cases, resume_cases
from tests.distributed.test_granularities import (
    ADDED_DEEP,
    DEEP,
    DISTRIBUTED,
    PIPELINE,
    TENSOR,
    check,
    expected_of,
    make_case,
)
from tests.gpu import shared_cases
from tests.gpu.parted import parted
from tests.gpu.test_equality import BF16, MORE, SHAPE, distances
from tests.gpu.where import HAS_GPU, long_on_cpu
from tests.helpers import tiny
from tests.helpers.engine_on_cpu import engine_error
from tests.helpers.ranks import run_ranks
from tests.helpers.runs import Trainer, metrics

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("single_process"), long_on_cpu]

VIRTUAL = {"pipeline": 2, "virtual_pipeline": 2}
TOPOLOGIES = [TENSOR, {"tensor": 2}, PIPELINE, VIRTUAL, {}, DISTRIBUTED, {"context": 2}]


def test_local_layers_in_float32_are_the_formula(tmp_path, single_process):
    case = make_case(tmp_path, "llama", tiny.LLAMAS["odd_vocabulary"])
    recomputed = [{**TENSOR, "recompute": "full"}]
    check(case, [*DEEP, *ADDED_DEEP], 2, [*TOPOLOGIES, *recomputed], tmp_path / "ranks")


@pytest.fixture(scope="module")
def bf16_case(tmp_path_factory, single_process):
    """A bfloat16 Llama, trainings whose decisions no rounding changes, and the formula."""
    files = make_case(tmp_path_factory.mktemp("llama"), "llama", SHAPE)
    hf = AutoModelForCausalLM.from_pretrained(files[0], dtype=torch.float64)
    trainings = []
    for number, (granularity, compute) in enumerate(
        product(("attn_token", "mlp_sequence", "block_token"), ("dense", "sparse"))
    ):
        routing = cases.routing_config(granularity=granularity, training_compute=compute, **MORE)
        added = parted(hf, files[2], routing, number)
        trainings.append(cases.Asked(routing, ("both", "task")[number % 2], added=added))
    return files, trainings, [expected_of(files, one, dtype=torch.float64) for one in trainings]


@pytest.mark.parametrize("implementation", ["local", "transformer_engine"])
def test_layers_in_bfloat16_are_near_it(bf16_case, implementation, tmp_path):
    if implementation == "transformer_engine" and (error := engine_error()):
        pytest.skip(error)
    (_, base, samples, added), trainings, expected = bf16_case
    of = {"implementation": implementation, "dtype": BF16}
    topologies = [{**topology, **of} for topology in TOPOLOGIES]
    arguments = implementation, base, samples, added, topologies, trainings
    found = run_ranks(shared_cases.gradients, *arguments, world=2, folder=tmp_path, seconds=500)
    assert len(found[0]) == len(topologies) * len(trainings)
    for name in found[0]:
        wanted = expected[name[-1]]
        gradients = {k: g for rank in found for k, g in rank[name]["gradients"].items()}
        assert gradients.keys() == wanted["gradients"].keys()
        for rank in found:
            result = {**rank[name], "gradients": gradients, "logits": None}
            assert result["capacity"] == pytest.approx(wanted["capacity"]), name
            assert result["evaluated_capacity"] == pytest.approx(wanted["capacity"]), name
            assert max(distances(result, wanted).values()) <= 32 * torch.finfo(BF16).eps, name


@pytest.mark.parametrize("implementation", ["local", "transformer_engine"])
def test_context_parallel_ranks_in_float32(bf16_case, implementation, tmp_path):
    """Of which Transformer Engine has no attention."""
    if implementation == "transformer_engine" and (error := engine_error()):
        pytest.skip(error)
    (_, base, samples, added), trainings, expected = bf16_case
    topologies = [{"context": 2, "implementation": implementation}]
    arguments = implementation, base, samples, added, topologies, trainings
    for rank in run_ranks(shared_cases.gradients, *arguments, world=2, folder=tmp_path):
        for name, result in rank.items():
            # Transformer Engine multiplies as TF32, with 10 bits of mantissa.
            most = 32 * 2**-10 if HAS_GPU and implementation != "local" else 1e-4
            apart = distances({**result, "logits": None}, expected[name[-1]])
            assert max(apart.values()) <= most, name


def test_runs_are_saved_and_go_on_at_another_topology(tmp_path, single_process):
    """Each two ranks, after the one before."""
    trainer = Trainer(tmp_path / "trainer")
    kinds = {
        "tensor": {"tensor": 2},
        "pipeline": {"pipeline": 2},
        "data": {},
    }
    jobs, before = [], None
    for name, degrees in kinds.items():
        parallel = {f"parallel__{k}_model_parallel_size": size for k, size in degrees.items()}
        if name == "data":
            parallel["parallel__use_distributed_optimizer"] = "true"
        run = tmp_path / name
        settings = {"checkpoint__interval": 1, "checkpoint__keep": 0, **parallel}
        jobs.append((before, degrees, trainer.arguments(run, **settings)))
        before = run
    run_ranks(resume_cases.trainings, jobs, world=2, folder=tmp_path / "ranks", seconds=500)
    first, *others = (metrics(tmp_path / name) for name in kinds)
    for lines in others:
        for ours, theirs in zip(lines, first, strict=True):
            assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-3)
