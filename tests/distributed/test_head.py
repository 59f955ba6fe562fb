"""Losses of chunks of labelled tokens are those of whole logits, which never exist."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.distributed import cases, head_cases
from tests.distributed.test_granularities import TENSOR, make_case
from tests.helpers import tiny
from tests.helpers.ranks import meet, run_ranks

ROUTING = cases.routing_config(granularity="attn_token")
VOCAB = 131  # no other size in the model, and odd: padded for two ranks
EXACT = 1e-6  # relative, fp32


@pytest.fixture(scope="module")
def case(tmp_path_factory, single_process):
    changes = tiny.LLAMAS["odd_vocabulary"]
    assert changes["vocab_size"] == VOCAB
    return make_case(tmp_path_factory.mktemp("llama"), "llama", changes)


def assert_equal(found: dict) -> None:
    assert found.keys() == {"task", "distill", "both"}
    for name, (chunks, whole) in found.items():
        for ours, theirs in zip(chunks[:2], whole[:2], strict=True):
            assert float(ours) == pytest.approx(float(theirs), rel=EXACT), name
        assert chunks[2].keys() == whole[2].keys()
        for layer, theirs in whole[2].items():
            assert theirs.abs().max() > 0
            difference = (chunks[2][layer] - theirs).abs().max()
            assert difference <= EXACT * theirs.abs().max(), (name, layer)


def test_losses_and_gradients_are_those_of_whole_logits(case, monkeypatch):
    monkeypatch.setattr("megatron_mod.model.head.CHUNK", head_cases.CHUNK)
    assert_equal(head_cases.in_chunks_and_whole(*case[1:], ROUTING, {}))


def test_so_they_are_where_ranks_share_vocabulary_and_tokens(case, tmp_path):
    for found in run_ranks(
        head_cases.in_chunks_and_whole, *case[1:], ROUTING, TENSOR, world=2, folder=tmp_path
    ):
        assert_equal(found)


class Largest(TorchDispatchMode):
    """Watches how many tokens' distributions over the vocabulary any operation gives at once."""

    def __init__(self, model) -> None:
        super().__init__()
        self.weight, self.tokens = model.last.head_weight.data_ptr(), 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, list | tuple) else [result]:
            if not isinstance(tensor, torch.Tensor) or tensor.shape[-1:] != (VOCAB,):
                continue
            if tensor.data_ptr() != self.weight:  # which a product may take transposed
                self.tokens = max(self.tokens, tensor.numel() // VOCAB)
        return result


@pytest.mark.parametrize("loss", ["task", "both"])
def test_whole_logits_never_exist(case, loss, monkeypatch):
    from megatron_mod.routing.capacity import CapacityController
    from megatron_mod.training.importance import leave_one_out
    from megatron_mod.training.optimizer import wrap_ddp
    from megatron_mod.training.plan import LOSSES
    from megatron_mod.training.step import run_schedule

    monkeypatch.setattr("megatron_mod.model.head.CHUNK", head_cases.CHUNK)
    _, base, samples, _ = case
    ranks = meet()
    model = cases.build(base, ranks, routing=ROUTING)
    chunks = wrap_ddp(model, use_distributed_optimizer=False)
    batch = cases._loader(samples, ranks, False).step(0)
    with Largest(model) as seen:
        for controller in (CapacityController(ROUTING), None):  # training and validation
            run_schedule(chunks, model, batch, ROUTING, controller=controller, loss=LOSSES[loss]())
        leave_one_out(model, [batch], ROUTING.places)
    assert seen.tokens == head_cases.CHUNK


def test_nor_where_texts_are_scored(case, monkeypatch):
    from transformers import AutoTokenizer

    from megatron_mod.evaluation.megatron_backend import MegatronBackend
    from megatron_mod.evaluation.rows import Row

    rows = [Row.continuation([5], list(range(6, 30))), Row.continuation(list(range(30)), [7, 8])]
    monkeypatch.setattr("megatron_mod.evaluation.megatron_backend.CHUNK", head_cases.CHUNK)
    model = cases.build(case[1], meet())
    tokenizer = AutoTokenizer.from_pretrained(tiny.save_tokenizer(case[1] / "tokenizer"))
    with Largest(model) as seen:
        MegatronBackend(model, tokenizer, batch_size=2).score(rows)
    assert seen.tokens == head_cases.CHUNK


@pytest.mark.parametrize("of_states", [True, False])
def test_a_head_that_trains_gets_its_gradient_from_every_chunk(case, of_states, monkeypatch):
    from megatron_mod.model.head import add_up
    from megatron_mod.training.losses import cross_entropy

    monkeypatch.setattr("megatron_mod.model.head.CHUNK", 2)
    model = cases.build(case[1], meet()).last
    weight, labels = model.head_weight.requires_grad_(), torch.tensor([5, 130, 7, 0, 9])
    states = torch.randn(5, 32, requires_grad=of_states)
    logits = states @ weight[: model.unpadded_vocab_size].t()
    expected = torch.nn.functional.cross_entropy(logits, labels, reduction="sum") / 5
    wanted = torch.autograd.grad(expected, [weight, states][: 1 + of_states])

    def measure(logits: torch.Tensor, rows: slice) -> tuple[torch.Tensor, torch.Tensor]:
        return (found := cross_entropy(logits, labels[rows])), found

    loss = add_up(model, states, measure)[0] / 5
    torch.testing.assert_close(loss, expected)
    gradients = torch.autograd.grad(loss, [weight, states][: 1 + of_states])
    for found, exact in zip(gradients, wanted, strict=True):
        torch.testing.assert_close(found, exact)
