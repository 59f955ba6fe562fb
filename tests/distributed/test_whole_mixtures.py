"""Training all parameters of mixtures of experts: gradients against plain torch, load-balancing
loss included, at every topology; Mixture-of-Depths-and-Experts, staged and integrated."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from megatron_mod.checkpoint.distributed import load_tensors
from megatron_mod.config.recipes import PUBLISHED
from megatron_mod.config.schema import ALL_PARTS
from megatron_mod.routing.config import NO_ROUTERS, RoutingConfig
from tests.distributed import cases, resume_cases, whole_cases
from tests.distributed.test_distributed_optimizer import DISTRIBUTED as DISTRIBUTED_RUN
from tests.distributed.test_distributed_optimizer import job
from tests.distributed.test_granularities import (
    DISTRIBUTED,
    EXACT,
    PIPELINE,
    TENSOR,
    copied,
    expected_of,
    make_case,
)
from tests.distributed.test_top_k import scheme, with_predictors
from tests.distributed.test_whole import by_key, check_gradients
from tests.helpers import exact_formula, experts
from tests.helpers.ranks import run_ranks
from tests.helpers.runs import DEFAULT, Trainer, metrics, saved
from tests.helpers.runs import EXACT as EXACT_RUN

WEIGHT = 0.3  # of the load-balancing loss
NOOPS = 2
STAGED = scheme("block_token")
INTEGRATED = cases.routing_config(
    granularity="expert_token", capacity=(0.8, 0.8), capacity_loss_weight="auto",
    training_compute="sparse", num_noop_experts=NOOPS,
)  # fmt: skip
ROUTINGS = [NO_ROUTERS, cases.routing_config(granularity="mlp_token"), STAGED, INTEGRATED]
EXPERT = {"expert": 2}


def make(root: Path, family: str, *, weight: float = WEIGHT, **changes: object) -> tuple:
    kind, own = experts.FAMILIES[family]
    case = make_case(root, kind, {**own, "router_aux_loss_coef": weight, **changes})
    with_predictors(case)
    generator = torch.Generator().manual_seed(13)
    for added in case[3].values():
        added["noop_gate.weight"] = 0.2 * torch.randn(NOOPS, 32, generator=generator)
    return case


@pytest.fixture(
    scope="module",
    params=[
        name if name == "qwen3_moe" else pytest.param(name, marks=pytest.mark.slow)
        for name in experts.FAMILIES
    ],
)
def any_case(request, tmp_path_factory, single_process):
    return make(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture(scope="module")
def case(tmp_path_factory, single_process):
    return make(tmp_path_factory.mktemp("mixtral"), "mixtral")


class Expected(NamedTuple):
    """``balance``: mean of the load-balancing losses, and what they add to the loss."""

    task_loss: float
    gradients: dict[str, torch.Tensor]
    balance: tuple[float, float]


class Gates:
    """Sees what gates are asked, document by document, and makes Megatron's loss of it."""

    def __init__(self, patch: pytest.MonkeyPatch, samples: Sequence, *, weight: float) -> None:
        self.samples, self.weight = samples, weight
        self.asked: dict[torch.nn.Module, list[tuple]] = {}  # tokens, no-ops; by the mixture
        gate = experts.gate

        def watched(block, read, noops=None):
            self.asked.setdefault(block, []).append((read, noops))
            return gate(block, read, noops)

        patch.setattr(experts, "gate", watched)

    def loss(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The mean of all micro-batches' and gates', weighted by tokens; and what it adds to the
        loss, of each gate the sum over micro-batches of their shares of the step's tokens."""
        number = {tuple(sample.ids): index for index, sample in enumerate(self.samples)}
        total, seen = torch.zeros(()), 0
        for block, documents in self.asked.items():
            times, rest = divmod(len(documents), len(self.samples))
            assert not rest
            documents = documents[::times]
            for micro_batch in cases.micro_batches(self.samples):
                own = [documents[number[tuple(sample.ids)]] for sample in micro_batch]
                logits = torch.cat([experts.gate_logits(block, *each) for each in own])
                tokens, width = logits.shape
                top_k = experts.top_k(block)
                pairs = torch.zeros(width).index_add(
                    0, logits.topk(top_k).indices.flatten(), torch.ones(tokens * top_k)
                )
                fraction = pairs / (tokens * top_k)
                loss = width * (fraction * logits.softmax(-1).mean(0)).sum()
                total, seen = total + tokens * loss, seen + tokens
        all_tokens = sum(len(sample.ids) for sample in self.samples)
        return total / seen, self.weight * total / all_tokens


def expected(case, routing: RoutingConfig, *, weight: float = WEIGHT) -> Expected:
    with pytest.MonkeyPatch.context() as patch:
        gates, balance = Gates(patch, case[2], weight=weight), []

        def beside() -> torch.Tensor:
            mean, added = gates.loss()
            balance.extend((float(mean.detach()), float(added.detach())))
            return added

        if routing.is_exact:
            wanted = of_exact(case, routing, beside)
        else:
            wanted = expected_of(case, cases.Asked(routing, trained=ALL_PARTS), beside=beside)
    if not weight:
        balance = [0.0, 0.0]  # not asked for
    return Expected(wanted["task_loss"], by_key(case, routing, wanted), tuple(balance))


def of_exact(case, routing: RoutingConfig, beside) -> dict:
    from transformers import AutoModelForCausalLM

    hf, _, samples, tensors = case
    model = AutoModelForCausalLM.from_pretrained(hf, attn_implementation="eager")
    added = copied(cases.only(tensors, routing), torch.float32)
    found = exact_formula.batch_loss(
        model, samples, added, granularity=routing.granularity,
        capacity=dict(zip(routing.layers, routing.capacity, strict=True)),
    )  # fmt: skip
    assert found.margin > 1e-4, "a decision too close to another to compare"
    (found.task_loss + sum(found.causal_loss) + beside()).backward()
    return {
        "task_loss": float(found.task_loss.detach()),
        "gradients": {(k, n): t.grad for k, own in added.items() for n, t in own.items()},
        "base": {name: parameter.grad for name, parameter in model.named_parameters()},
    }


def check(case, routings, world: int, topologies: list[dict], folder, **how: object) -> None:
    _, base, samples, added = case
    trainings = [cases.Asked(routing, trained=whole_cases.WHOLE) for routing in routings]
    found, *_ = run_ranks(
        whole_cases.gradients, [(base, samples, added)], topologies, trainings,
        folder / "gradients", world=world, folder=folder, seconds=900,
    )  # fmt: skip
    wanted = [expected(case, routing, **how) for routing in routings]
    asked = [(topology, n) for topology in topologies for n in range(len(routings))]
    for (topology, n), (loss, gradients, balance) in zip(asked, found, strict=True):
        what = (topology, routings[n].granularity, routings[n].num_noop_experts)
        assert loss == pytest.approx(wanted[n].task_loss, rel=EXACT), what
        assert balance == pytest.approx(wanted[n].balance, rel=EXACT), what
        check_gradients(gradients, wanted[n].gradients, what)


def test_one_rank(any_case, tmp_path):
    check(any_case, ROUTINGS, 1, [{}], tmp_path)


def test_what_is_computed_again(case, tmp_path):
    recomputing = [{"recompute": recompute} for recompute in ("selective", "full")]
    check(case, [NO_ROUTERS, *ROUTINGS[2:]], 1, recomputing, tmp_path)


@pytest.mark.parametrize(
    "topologies",
    [
        [TENSOR, {**EXPERT, **DISTRIBUTED}],
        pytest.param([{"tensor": 2}, PIPELINE], marks=pytest.mark.slow),
    ],
    ids=["quick", "rest"],
)
def test_two_ranks(case, topologies, tmp_path):
    check(case, ROUTINGS[2:], 2, topologies, tmp_path)


@pytest.mark.parametrize(
    "topologies",
    [
        [EXPERT, {"context": 2, **EXPERT}],
        pytest.param([{}, TENSOR], marks=pytest.mark.slow),
    ],
    ids=["quick", "rest"],
)
def test_two_ranks_without_routers(case, topologies, tmp_path):
    check(case, [NO_ROUTERS], 2, topologies, tmp_path)


def test_without_the_loss(single_process, tmp_path):
    case = make(tmp_path, "qwen3_moe", weight=0.0)
    check(case, [NO_ROUTERS, INTEGRATED], 1, [{}], tmp_path / "ranks", weight=0.0)


SETTINGS = {
    **DEFAULT, "router__init": None, "train__trainable": "all", "optimizer__lr": 0.001,
    "optimizer__weight_decay": 0.1, "checkpoint__keep": 0, "train__steps": 4,
    "router__layers__deepest": None, "router__layers": "[1, 2]",
}  # fmt: skip
FREE = dict.fromkeys([*DEFAULT, *(f"router__{name.removeprefix('router.')}" for name in PUBLISHED)])
RUNS = {
    "staged": {**SETTINGS, **EXACT_RUN},
    "integrated": {
        **SETTINGS, **FREE, "router__granularity": "expert_token",
        "router__num_noop_experts": NOOPS, "router__capacity": None,
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def trainer(tmp_path_factory, single_process):
    made = Trainer(
        tmp_path_factory.mktemp("trainer"), kind="qwen3_moe",
        **{**experts.FAMILIES["qwen3_moe"][1], "router_aux_loss_coef": WEIGHT},
    )  # fmt: skip
    made.write_distinct()
    return made


@pytest.mark.slow
def test_a_run_goes_on_to_the_bit_and_at_another_degree(trainer, tmp_path):
    """With experts shared by ranks and the optimizer's state too; steps hold whole experts."""
    jobs = []
    for name, settings in RUNS.items():
        shared = {**settings, **DISTRIBUTED_RUN}
        whole = tmp_path / f"{name} whole"
        jobs += [
            job(trainer, whole, shared, expert=2),
            job(trainer, tmp_path / f"{name} again", shared, after=whole, expert=2),
            job(trainer, tmp_path / f"{name} stages", settings, after=whole, pipeline=2),
        ]
    run_ranks(resume_cases.trainings, jobs, world=2, folder=tmp_path / "ranks", seconds=900)
    for name, settings in RUNS.items():
        whole, again, stages, alone = (
            tmp_path / f"{name} {how}" for how in ("whole", "again", "stages", "alone")
        )
        assert metrics(again) == metrics(whole)
        assert saved(again) == saved(whole)
        trainer.train(alone, **settings)
        for run in (whole, stages):
            for line, wanted in zip(metrics(run), metrics(alone), strict=True):
                for key in ("loss", "task_loss", "grad_norm", "load_balancing_loss", "capacity"):
                    assert line[key] == pytest.approx(wanted[key], rel=1e-3), (name, run, key)
        final, found = (load_tensors(run / "step_00000004" / "state") for run in (alone, whole))
        assert final.keys() == found.keys()
        assert any(".mlp.experts.experts.7.linear_fc2" in key for key in final)
        for key in (key for key in final if not key.startswith(("random", "optimizer"))):
            torch.testing.assert_close(found[key], final[key], rtol=1e-2, atol=2e-4, msg=key)
