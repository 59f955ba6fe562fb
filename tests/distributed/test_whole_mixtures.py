"""Training all parameters of mixtures of experts: gradients against plain torch, load-balancing
loss included, at every topology; Mixture-of-Depths-and-Experts, staged and integrated."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from megatron_mod.config.schema import ALL_PARTS
from megatron_mod.routing.config import NO_ROUTERS, RoutingConfig
from tests.distributed import cases, whole_cases
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


@pytest.fixture(scope="module", params=list(experts.FAMILIES))
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

    def __init__(self, monkeypatch: pytest.MonkeyPatch, samples: Sequence, *, weight: float):
        self.samples, self.weight = samples, weight
        self.asked: list[tuple] = []  # block, tokens, no-ops, in the order of documents and layers
        original = experts.gate

        def gate(block, read, noops=None):
            self.asked.append((block, read, noops))
            return original(block, read, noops)

        monkeypatch.setattr(experts, "gate", gate)

    def loss(self, *, data: int, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The mean of all gates' over their tokens, and the sum that a step minimises."""
        places = {tuple(sample.ids): number for number, sample in enumerate(self.samples)}
        order = {block: [] for block, *_ in self.asked}
        for block, read, noops in self.asked:
            logits = experts.gate_logits(block, read, noops)
            top_k = experts._of(block, "top_k")
            chosen = logits.topk(top_k).indices
            assigned = torch.zeros_like(logits).scatter(-1, chosen, 1.0)
            order[block].append((logits.softmax(-1), assigned, top_k))
        total, tokens = 0.0, 0
        for of_documents in order.values():
            of_documents = of_documents[-len(self.samples) :]
            for micro_batch in cases.micro_batches(self.samples, data=data, rows=rows):
                own = [of_documents[places[tuple(sample.ids)]] for sample in micro_batch]
                probabilities, assigned = (torch.cat([each[k] for each in own]) for k in (0, 1))
                count, width = probabilities.shape
                share = assigned.sum(0) / (count * own[0][2])
                total = total + count * width * (share * probabilities.mean(0)).sum()
                tokens += count
        all_tokens = sum(len(sample.ids) for sample in self.samples)
        return total / tokens, self.weight * total / all_tokens


def expected(case, routing: RoutingConfig, *, weight=WEIGHT, data: int = 1, rows: int = 2):
    with pytest.MonkeyPatch.context() as patch:
        gates, balance = Gates(patch, case[2], weight=weight), []

        def beside() -> torch.Tensor:
            mean, added = gates.loss(data=data, rows=rows)
            balance.extend((float(mean.detach()), float(added.detach())))
            return added

        if routing.is_exact:
            wanted = of_exact(case, routing, beside)
        else:
            wanted = expected_of(case, cases.Asked(routing, trained=ALL_PARTS), beside=beside)
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
        folder / "gradients", world=world, folder=folder,
    )  # fmt: skip
    found = iter(found)
    for topology in topologies:
        degrees = [topology.get(name, 1) for name in ("tensor", "pipeline", "context")]
        data = world // (degrees[0] * degrees[1] * degrees[2])
        for routing in routings:
            wanted = expected(case, routing, data=data, **how)
            loss, gradients, balance = next(found)
            what = (topology, routing.granularity, routing.num_noop_experts)
            assert loss == pytest.approx(wanted.task_loss, rel=EXACT), what
            assert balance == pytest.approx(wanted.balance, rel=EXACT), what
            check_gradients(gradients, wanted.gradients, what)


def test_one_rank(any_case, tmp_path):
    check(any_case, ROUTINGS, 1, [{}], tmp_path)


def test_what_is_computed_again(case, tmp_path):
    recomputing = [{"recompute": recompute} for recompute in ("selective", "full")]
    check(case, [NO_ROUTERS, *ROUTINGS[2:]], 1, recomputing, tmp_path)


def test_two_ranks(case, tmp_path):
    topologies = [
        {}, EXPERT, {**EXPERT, **DISTRIBUTED}, TENSOR, {"tensor": 2}, PIPELINE,
        {"context": 2, **EXPERT},
    ]  # fmt: skip
    check(case, [NO_ROUTERS, *ROUTINGS[2:]], 2, topologies, tmp_path)


def test_without_the_loss(single_process, tmp_path):
    case = make(tmp_path, "qwen3_moe", weight=0.0)
    check(case, [NO_ROUTERS, INTEGRATED], 1, [{}], tmp_path / "ranks", weight=0.0)
