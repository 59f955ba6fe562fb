"""A mixture of experts on one rank: what it computes, and which degrees it refuses."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from megatron_mod.config.ranks import OPTIONS, check_ranks
from megatron_mod.conversion.families import family_of
from megatron_mod.conversion.hf_reader import read_config
from megatron_mod.model.architecture import Architecture, Mixture, check_parallel
from megatron_mod.model.builder import transformer_config
from megatron_mod.model.cost import forward_costs
from megatron_mod.model.mixture import MixtureOfExperts
from tests.helpers import tiny

EXPERTS, TOP_K, HIDDEN, TOKENS = 6, 3, 16, 20
DENSE = Architecture(
    num_layers=2, hidden_size=HIDDEN, ffn_hidden_size=24, num_attention_heads=2,
    num_query_groups=2, kv_channels=8, vocab_size=32, max_sequence_length=64,
    layernorm_epsilon=1e-5, rotary_base=1e4, tied_embeddings=False,
)  # fmt: skip
ARCH = replace(DENSE, mixture=Mixture(EXPERTS, TOP_K, 24))


@pytest.fixture
def mixture(single_process) -> MixtureOfExperts:
    """With random weights, frozen."""
    found = MixtureOfExperts(transformer_config(ARCH, dtype=torch.float32))
    generator = torch.Generator().manual_seed(1)
    for parameter in found.parameters():
        torch.nn.init.normal_(parameter, std=0.5, generator=generator)
    return found.requires_grad_(False)


def tokens() -> torch.Tensor:
    return torch.randn(TOKENS // 2, 2, HIDDEN, generator=torch.Generator().manual_seed(2))


def test_it_computes_the_chosen_experts_and_no_others(mixture):
    read = tokens()
    with FlopCounterMode(display=False) as counter:
        output, bias = mixture(read)
    assert bias is None
    assert counter.get_total_flops() == 2 * TOKENS * ARCH.mlp_weights
    weights = (read @ mixture.router.weight.t()).softmax(-1)
    top, chosen = weights.topk(TOP_K, -1)
    wanted = torch.zeros_like(read)
    for place in range(TOP_K):
        share = top[..., place] / top.sum(-1)
        for expert, mlp in enumerate(mixture.experts.local_experts):
            gate, up = (read @ mlp.linear_fc1.weight.t()).chunk(2, -1)
            made = (torch.nn.functional.silu(gate) * up) @ mlp.linear_fc2.weight.t()
            wanted += made * (share * (chosen[..., place] == expert))[..., None]
    torch.testing.assert_close(output, wanted, rtol=1e-5, atol=1e-5)


def test_pairs_that_are_not_chosen_are_not_computed(mixture):
    seen = {}

    def odd(weights: torch.Tensor, chosen: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        keep = torch.arange(EXPERTS) % 2 == 1
        seen["pairs"] = int((chosen & keep).sum())
        return weights, chosen & keep

    with FlopCounterMode(display=False) as counter:
        mixture(tokens(), pairs=odd)
    assert 0 < seen["pairs"] < TOKENS * TOP_K
    gate, experts = TOKENS * ARCH.gate_weights, seen["pairs"] * ARCH.expert_weights
    assert counter.get_total_flops() == 2 * (gate + experts)


def test_no_tokens_go_through_it_and_back(mixture):
    nothing = torch.zeros(0, 1, HIDDEN, requires_grad=True)
    output, _ = mixture(nothing, pairs=lambda weights, chosen: (weights, chosen))
    assert output.shape == (0, 1, HIDDEN)
    output.sum().backward()
    assert nothing.grad is not None


@pytest.mark.parametrize("name", tiny.MIXTURES)
def test_parameters_are_those_of_hugging_face(tmp_path, name):
    from transformers import AutoModelForCausalLM

    kind, changes = tiny.MIXTURES[name]
    hf = tiny.save_model(tmp_path, kind, **changes)
    config = read_config(hf)
    arch = family_of(config).architecture_of(config)
    model = AutoModelForCausalLM.from_pretrained(hf)
    assert arch.num_parameters == sum(parameter.numel() for parameter in model.parameters())


def test_operations_are_of_the_gate_and_the_experts_of_a_token():
    dense, mixture = (forward_costs(arch, length=8).layers[0] for arch in (DENSE, ARCH))
    one, gate = 3 * HIDDEN * 24, HIDDEN * EXPERTS
    assert mixture - dense == 2 * 8 * (gate + (TOP_K - 1) * one)


def test_degrees_that_do_not_fit_are_refused():
    sizes = {"tensor": 1, "pipeline": 1}
    check_parallel(ARCH, **sizes, expert=3)
    with pytest.raises(ValueError, match=r"--expert 4: does not divide .* 6 experts; use one of"):
        check_parallel(ARCH, **sizes, expert=4, names=OPTIONS)
    name = r"parallel.expert_model_parallel_size = 2"
    with pytest.raises(ValueError, match=f"{name}: .* no experts to share; leave it 1"):
        check_parallel(DENSE, **sizes, expert=2)
    across = replace(ARCH, qk_norm_across_heads=True)
    with pytest.raises(ValueError, match=r"--tensor 2: .* norm of queries and keys .* --expert"):
        check_parallel(across, tensor=2, pipeline=1, names=OPTIONS)


def test_experts_are_shared_by_data_and_context_parallel_ranks():
    check_ranks({"tensor": 2, "context": 2}, world_size=8, expert=4)
    with pytest.raises(ValueError, match=r"size = 4: .* of 8 ranks these are 2; use one of \[1, 2"):
        check_ranks({"tensor": 2, "pipeline": 2}, world_size=8, expert=4)
