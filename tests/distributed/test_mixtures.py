"""Mixtures of experts: logits at every topology against Hugging Face, and the granularities that
route whole layers, or whole mixtures, against the formula."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from megatron_mod.checkpoint.manifest import read_manifest
from megatron_mod.evaluation.megatron_backend import MegatronBackend
from megatron_mod.evaluation.rows import Row
from tests.distributed import cases, resume_cases
from tests.distributed import test_top_k as top_k
from tests.distributed.test_granularities import (
    EVERY,
    SPARSE,
    check,
    make_case,
    scheme,
)
from tests.distributed.test_parity import LOGITS, ZEROS
from tests.helpers import tiny
from tests.helpers.ranks import meet, run_ranks
from tests.helpers.runs import DEFAULT, Trainer, metrics
from tests.helpers.thinned import number_asked, one_in, some

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


@pytest.mark.parametrize(
    ("world", "topologies", "every"),
    [
        (1, [{}], 1),
        *one_in(2, 2, TWO, id="two_ranks"),
        pytest.param(4, FOUR, 1, id="four_ranks", marks=pytest.mark.slow),
    ],
)
def test_logits_equal_hugging_face(models, world, topologies, every, tmp_path):
    shared = [pair for name in ("mixtral", "qwen3_moe") for pair in models[name]]
    whole = [each for each in topologies if "tensor" not in each]  # OLMoE's norm is of all heads
    for number, (pairs, own) in enumerate([(shared, topologies), (models["olmoe"], whole)]):
        found = run_ranks(
            cases.logit_differences, pairs, own, 128, ZEROS, every, world=world,
            folder=tmp_path / str(number),
        )  # fmt: skip
        for per_rank in found:
            assert len(per_rank) == number_asked(len(own), len(pairs), every)
            assert max(per_rank.values()) <= LOGITS, per_rank


@pytest.fixture(
    scope="module", params=[pytest.param("mixtral", marks=pytest.mark.slow), "qwen3_moe"]
)
def case(request, tmp_path_factory, single_process):
    return make_case(tmp_path_factory.mktemp(request.param), *tiny.MIXTURES[request.param])


def recomputed(topology: dict) -> list[dict]:
    return [{**topology, "recompute": how} for how in ("full", "selective")]


@pytest.mark.parametrize(
    ("trainings", "world", "topologies", "every"),
    [
        *one_in(2, [*EVERY, *SPARSE, *SKIPS_ALL], 1, [{}, {"packed": True}], id="one_rank"),
        # Eight rows by threes on two ranks: one runs padding.
        *some(
            3, [*EVERY, *SPARSE, *SKIPS_ALL, EXACT], 2, [{"expert": 2, "rows": 3}], 1, id="experts"
        ),
        *one_in(
            3,
            [EVERY[3], SPARSE[-1], SKIPS_ALL[1]],
            2,
            [
                *recomputed({"expert": 2}),
                {"tensor": 2},
                SEQUENCE_PARALLEL,
                {"pipeline": 2},
                {"context": 2, "expert": 2},
                {"expert": 2, "use_distributed_optimizer": True},
            ],
            id="two_ranks",
        ),
        *one_in(
            2,
            [SPARSE[-2], SKIPS_ALL[0]],
            4,
            [
                {"expert": 2, "pipeline": 2, "rows": 1},
                {"expert": 2, "pipeline": 2, "virtual_pipeline": 2, "rows": 1},
                {"expert": 2, **SEQUENCE_PARALLEL},
                {"expert": 2, "tensor": 2},
                {"expert": 4, "rows": 1},
            ],
            id="four_ranks",
        ),
    ],
)
def test_loss_and_gradients_equal_the_formula(case, trainings, world, topologies, every, tmp_path):
    check(case, trainings, world, topologies, tmp_path, every)


def read(base: Path, topologies: list[dict], rows: list[Row], prompts: list[list[int]]) -> list:
    """Scores of rows and continuations of prompts in each topology, one text at a time, with
    routers that skip."""
    from megatron_mod.data.tokenizer import load_tokenizer

    tokenizer, found = load_tokenizer(base / "huggingface", vocab_size=tiny.VOCAB), []
    for topology in topologies:
        model = cases.build(base, meet(**topology), routing=EVERY[3])
        for place, router in sorted(model.routers().items()):
            generator = torch.Generator().manual_seed(place.layer)
            router.weight.data.copy_(torch.randn(router.weight.shape, generator=generator))
        backend = MegatronBackend(model, tokenizer)
        scores = [score.log_probability for score in backend.score(rows)]
        texts = backend.generate(prompts, until=["q"], max_new_tokens=7)
        found.append((scores, texts, list(backend.capacity().values())))
    return found


def test_ranks_with_nothing_left_to_read_wait_for_the_others(tmp_path, single_process):
    """Three texts and two ranks, or four; continuations of different lengths."""
    trainer = Trainer(tmp_path / "model", kind="mixtral", **tiny.MIXTURES["mixtral"][1])
    generator = torch.Generator().manual_seed(1)
    ids = [torch.randint(3, tiny.VOCAB, (n,), generator=generator).tolist() for n in (5, 17, 9)]
    rows = [Row.continuation(text[:3], text[3:]) for text in ids]
    ((scores, texts, capacity),) = read(trainer.base, [{}], rows, ids)
    assert min(capacity) > 0
    assert max(capacity) < 1
    shares = {2: [{"expert": 2}], 4: [{"expert": 4}, {"expert": 2, "pipeline": 2}]}
    for world, topologies in shares.items():
        for per_rank in run_ranks(
            read, trainer.base, topologies, rows, ids, world=world, folder=tmp_path / str(world)
        ):
            for found in per_rank:
                assert found[0] == pytest.approx(scores, rel=1e-5)
                assert found[1] == texts
                assert found[2] == capacity


@pytest.mark.slow
def test_a_run_goes_on_at_another_degree(tmp_path, single_process):
    """With all that a training does before its first step, and with what it computes once."""
    trainer = Trainer(tmp_path / "model", kind="mixtral", **tiny.MIXTURES["mixtral"][1])
    trainer.write_distinct()
    experts, jobs = {"parallel__expert_model_parallel_size": 2}, []

    def job(name: str, *, before: str | None = None, **changes: object) -> None:
        settings = {**DEFAULT, "router__granularity": "mlp_token", **changes}
        arguments = trainer.arguments(
            tmp_path / name, **settings, train__global_batch_size=6, train__micro_batch_size=1
        )
        degrees = {"expert": changes.get("parallel__expert_model_parallel_size", 1)}
        jobs.append((before and tmp_path / before, degrees, arguments))

    job("experts", **experts)
    job("experts-cached", **experts, train__frozen_prefix="cache")
    job("data", before="experts")
    job("experts-again", before="data", **experts)
    run_ranks(resume_cases.trainings, jobs, world=2, folder=tmp_path / "ranks", seconds=600)
    wanted = metrics(tmp_path / "experts")
    assert len({line["loss"] for line in wanted}) == 6
    for name in ("experts-cached", "data", "experts-again"):
        for line, expected in zip(metrics(tmp_path / name), wanted, strict=True):
            for key in ("loss", "task_loss", "grad_norm", "capacity"):
                assert line[key] == pytest.approx(expected[key], rel=1e-3), (name, key)
    topology = read_manifest(next((tmp_path / "experts-again").glob("step_*6")))["topology"]
    assert topology["expert_model_parallel_size"] == 2


def test_adapters_on_attention_equal_pefts(tmp_path, single_process):
    """Below and above mixtures whose experts other ranks hold."""
    pytest.importorskip("peft", reason="needs the 'test' extra")
    from tests.distributed import test_adapters as adapters

    attention = ["q_proj", "k_proj", "v_proj", "o_proj"]
    hf, base, adapter, samples = adapters.made(
        tmp_path, *tiny.MIXTURES["mixtral"], target_modules=attention
    )
    asked = adapters.question(base, adapter, samples, expert=2)
    for found in run_ranks(cases.gradients, *asked, world=2, folder=tmp_path / "ranks"):
        adapters.check(found, hf, adapter, samples)


def test_exact_selections_equal_the_formula(tmp_path, single_process):
    """Where some documents keep nothing, too."""
    case = top_k.with_predictors(make_case(tmp_path, *tiny.MIXTURES["mixtral"]))
    trainings = [top_k.EVERY[3], top_k.EVERY[4], top_k.ENDS[0], top_k.ENDS[2]]
    top_k.check(case, trainings, 2, [{"expert": 2}], tmp_path / "ranks")
