"""What a routed layer really computes, counted, and how often it waits for the device."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from megatron_mod.model.layout import StepContext, TokenLayout
from megatron_mod.routing.config import RoutingConfig
from megatron_mod.routing.scheme import OF_ANY_MODEL, Scheme

HIDDEN, FFN, HEADS, LENGTH, ROWS, RANK = 32, 48, 4, 16, 3, 5
CASES = [(name, None) for name in OF_ANY_MODEL]
CASES += [(name, "selected") for name in ("attn_token", "block_token", "attn_token+mlp_token")]


@pytest.fixture
def layer_of(single_process):
    """Makes the only layer of a model, and the rotary table it is called with."""
    from megatron_mod.model.architecture import Architecture
    from megatron_mod.model.builder import build_model, transformer_config

    def make(granularity: str, keys_values: str | None = None, **changes: object):
        arch = Architecture(
            num_layers=1, hidden_size=HIDDEN, ffn_hidden_size=FFN, num_attention_heads=HEADS,
            num_query_groups=HEADS, kv_channels=HIDDEN // HEADS, vocab_size=16,
            max_sequence_length=64, layernorm_epsilon=1e-5, rotary_base=10000.0,
            tied_embeddings=True,
        )  # fmt: skip
        changes = {"capacity": (0.5,) * len(Scheme.parse(granularity).targets), **changes}
        routing = RoutingConfig(granularity, (0,), keys_values=keys_values, **changes)
        config = transformer_config(arch, dtype=torch.float32)
        torch.manual_seed(4)
        model = build_model(arch, config, routing)[0]
        for parameter in model.parameters():
            parameter.data.normal_(0.0, 0.3)
        direction = torch.randn(1, HIDDEN, generator=torch.Generator().manual_seed(5))
        for sign, router in zip((1, -1), model.decoder.layers[0].routers.values(), strict=False):
            router.weight.data.copy_(sign * direction)
            if router.bias is not None:
                router.bias.data.fill_(0.01)
        rotary = model.rotary_pos_emb(LENGTH)
        return model.decoder.layers[0], rotary

    return make


def grid() -> torch.Tensor:
    return torch.randn(LENGTH, ROWS, HIDDEN, generator=torch.Generator().manual_seed(8))


def expected_work(
    kept: dict[str, list[int]], keys_values: str | None, *, rank: int, training: bool
) -> int:
    """Floating-point operations of a layer of whose targets the rows keep so many tokens each, and
    whose skipped tokens have stand-ins of this rank; in training kept ones have them too, as the
    gradient of a decision is by what it would change."""
    everything = LENGTH * ROWS
    attends = kept.get("attn", kept.get("block", [LENGTH] * ROWS))
    feeds = kept.get("mlp", kept.get("block", [LENGTH] * ROWS))
    chosen, rows = sum(attends), sum(n > 0 for n in attends)
    projection = 2 * HIDDEN * HIDDEN  # a token's, one of query, key, value and output
    scores = 4 * HIDDEN  # a pair of tokens', logits and weighted sum
    mlp = 3 * 2 * HIDDEN * FFN  # a token's, gated
    attention = {
        "dense": everything * 4 * projection + ROWS * LENGTH**2 * scores,
        "all": (2 * everything + 2 * chosen) * projection + rows * max(attends) * LENGTH * scores,
        "selected": chosen * 4 * projection + rows * max(attends) ** 2 * scores,
    }
    which = "dense" if list(kept) == ["mlp"] else (keys_values or "selected")
    router = len(kept) * everything * 2 * HIDDEN
    skipped = (everything if training else everything - sum(n) for n in kept.values())
    stand_in = sum(skipped) * 4 * HIDDEN * rank
    return router + attention[which] + mlp * sum(feeds) + stand_in


@pytest.mark.parametrize(("granularity", "keys_values"), CASES)
@pytest.mark.parametrize("threshold", [0.5, 1e-9, 1 - 1e-9], ids=["some", "all", "none"])
@pytest.mark.parametrize("training", [False, True], ids=["evaluation", "sparse_training"])
@pytest.mark.parametrize("rank", [None, RANK], ids=["plain", "stand_in"])
def test_counted_work_is_that_of_the_kept_units(
    layer_of, granularity, keys_values, threshold, training, rank
):
    if Scheme.parse(granularity).chooses_keys:
        keys_values = keys_values or "all"
    layer, rotary = layer_of(
        granularity, keys_values, threshold=threshold, training_compute="sparse",
        stand_in_rank=rank, bias=bool(rank),
    )  # fmt: skip
    layer.train(training)
    decided = []
    layer._choose = lambda *args, choose=layer._choose: decided.append(choose(*args)) or decided[-1]
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        layer(grid(), rotary_pos_emb=rotary)
    (choices,) = decided
    kept = {}
    for target, chosen in choices.items():
        index = getattr(chosen, "index", torch.arange(LENGTH * ROWS))
        kept[target] = rows = torch.bincount(index % ROWS, minlength=ROWS).tolist()
        some = threshold == 0.5
        assert some == (0 < sum(rows) < LENGTH * ROWS), "the case is not what it should be"
        if target != "mlp" and sum(rows) in (LENGTH * ROWS, 0):
            # Queries and keys are one projection, or nobody asks for the keys.
            keys_values = "selected"
    assert counter.get_total_flops() == expected_work(
        kept, keys_values, rank=rank or 0, training=training
    )


@pytest.mark.parametrize("granularity", ["attn_token", "mlp_token", "block_token"])
@pytest.mark.parametrize("capacity", [0.01, 0.125, 0.5, 1.0])
@pytest.mark.parametrize("causal", [False, True])
def test_an_exact_selection_computes_k_tokens_of_each_row(
    layer_of, granularity, capacity, causal, monkeypatch
):
    layer, rotary = layer_of(
        granularity, selection="top_k", causal="predictor", predictor_size=RANK,
        capacity=(capacity,), training_compute="sparse",
    )  # fmt: skip
    assert layer.routing.keys_values == ("selected" if granularity != "mlp_token" else None)
    for predictor in layer.predictors.values():
        predictor.out.bias.data.fill_(1e3 if causal else -1e3)  # lets all pass, or none
    layout = TokenLayout.of_prompts(grid(), context_rank=0, context_ranks=1)
    layout.step = StepContext(causal=causal)
    with (
        Synchronisations(monkeypatch) as counted,
        sdpa_kernel(SDPBackend.MATH),
        FlopCounterMode(display=False) as counter,
    ):
        layer(grid(), rotary_pos_emb=rotary, packed_seq_params=layout)
    assert counted.seen == (["tolist"] if causal else [])  # else k follows from the lengths
    k = LENGTH if causal else math.floor(capacity * LENGTH + 0.5)
    kept = {granularity.split("_")[0]: [k] * ROWS}
    predictor = 2 * RANK * (HIDDEN + 1) * LENGTH * ROWS
    assert counter.get_total_flops() == predictor + expected_work(
        kept, "selected", rank=0, training=False
    )


class Synchronisations(TorchDispatchMode):
    """Counts the operations that make the host wait for numbers from the device."""

    NAMES = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "unique")

    def __init__(self, monkeypatch) -> None:
        super().__init__()
        self.seen: list[str] = []
        to_list = torch.Tensor.tolist
        monkeypatch.setattr(
            torch.Tensor, "tolist", lambda tensor: self.seen.append("tolist") or to_list(tensor)
        )

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.__name__.split(".")[0]
        if name in self.NAMES:
            self.seen.append(name)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(("granularity", "keys_values"), CASES)
@pytest.mark.parametrize("compute", ["dense", "sparse"])
def test_the_host_waits_only_for_the_number_of_chosen_tokens(
    layer_of, granularity, keys_values, compute, monkeypatch
):
    layer, rotary = layer_of(
        granularity, keys_values, training_compute=compute, stand_in_rank=RANK, bias=True
    )
    hidden = grid().requires_grad_()
    with Synchronisations(monkeypatch) as counted:
        output, _ = layer(hidden, rotary_pos_emb=rotary)
        output.square().sum().backward()
        assert counted.seen == ([] if compute == "dense" else ["tolist"])
        counted.seen.clear()
        layer.eval()
        layer(grid(), rotary_pos_emb=rotary)
        assert counted.seen == ["tolist"]  # the shapes of what is computed
    for router in layer.routers.values():
        assert router.weight.grad.abs().max() > 0
