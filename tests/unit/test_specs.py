"""Routed layers in somebody else's Megatron model."""

from __future__ import annotations

import pytest
import torch

from megatron_mod.routing.config import RoutingConfig
from megatron_mod.routing.masks import TokenRole
from megatron_mod.routing.scheme import Place

ROUTING = RoutingConfig("block_token", (1,), (0.5,))


@pytest.fixture
def own_model(single_process):
    """A plain ``GPTModel`` built as a user's script would, and its settings to vary."""
    from megatron.core.models.gpt import GPTModel
    from megatron.core.transformer import TransformerConfig

    from megatron_mod.model.specs import get_routed_layer_specs

    def build(routing: RoutingConfig = ROUTING, **changes: object) -> GPTModel:
        settings = {
            "num_layers": 3, "hidden_size": 32, "num_attention_heads": 4, "ffn_hidden_size": 64,
            "normalization": "RMSNorm", "gated_linear_unit": True, "add_bias_linear": False,
            "hidden_dropout": 0.0, "attention_dropout": 0.0, "use_cpu_initialization": True,
        }  # fmt: skip
        config = TransformerConfig(**{**settings, **changes})
        torch.manual_seed(2)
        return GPTModel(
            config=config,
            transformer_layer_spec=get_routed_layer_specs(config, routing),
            vocab_size=64,
            max_sequence_length=32,
            position_embedding_type="rope",
        )

    return build


def test_it_trains_with_and_without_a_layout(own_model):
    from megatron_mod.model.layout import TokenLayout

    model = own_model()
    router = model.decoder.layers[1].router
    router.weight.data.normal_(0, 2)
    ids = torch.randint(64, (2, 12))
    positions = torch.arange(12).expand(2, 12).contiguous()
    layout = TokenLayout(
        roles=torch.full((2, 12), int(TokenRole.PROMPT), dtype=torch.uint8),
        position_ids=positions,
        documents=((12,), (12,)),
    )
    losses, slopes = [], []
    for given in (None, layout):
        router.weight.grad = None
        loss = model(ids, positions, None, labels=ids, packed_seq_params=given)
        loss.mean().backward()
        losses.append(loss.detach())
        slopes.append(router.weight.grad)
    assert 0 < router.kept < router.valid
    assert torch.equal(losses[0], losses[1])
    assert slopes[0].abs().max() > 0
    assert torch.equal(slopes[0], slopes[1])
    assert model.embedding.word_embeddings.weight.grad.abs().max() > 0  # nothing is frozen here


def test_what_a_step_asks_travels_with_the_layout(own_model):
    from megatron_mod.model.layout import StepContext, TokenLayout

    model = own_model()
    router = model.decoder.layers[1].router
    router.weight.data.normal_(0, 2)
    ids, positions = torch.randint(64, (2, 12)), torch.arange(12).expand(2, 12)
    slopes = []
    for layer in (None, 1, 2):
        penalty = {Place(layer, "block"): torch.tensor(0.3)}
        layout = TokenLayout(
            roles=torch.full((2, 12), int(TokenRole.PROMPT), dtype=torch.uint8),
            position_ids=positions,
            documents=((12,), (12,)),
            step=StepContext(penalty_per_unit=penalty),
        )
        router.weight.grad = None
        router.reset()
        model(ids, positions, None, labels=ids, packed_seq_params=layout).mean().backward()
        slopes.append(router.weight.grad)
        (made,) = layout.decisions.values()
        assert made.mask.sum() == router.kept
        assert made.logits.shape == made.valid.shape == (12, 2)
    assert torch.equal(slopes[0], slopes[2])  # another layer's
    chance = torch.sigmoid(made.logits.detach())
    with torch.no_grad():
        hidden = seen_by(model, ids, positions)
    expected = 0.3 * torch.einsum("sb,sbh->h", chance * (1 - chance), hidden)
    torch.testing.assert_close((slopes[1] - slopes[0])[0], expected, rtol=1e-3, atol=1e-5)


def seen_by(model, ids, positions) -> torch.Tensor:
    """What the router of layer 1 reads, ``[S, B, H]``."""
    seen = []
    handle = model.decoder.layers[1].router.register_forward_pre_hook(
        lambda _, inputs: seen.append(inputs[0].detach())
    )
    model(ids, positions, None, labels=ids)
    handle.remove()
    return seen[0]


def test_what_would_be_ignored_is_refused(own_model):
    from megatron_mod.model.layout import TokenLayout

    with pytest.raises(ValueError, match="hidden_dropout = 0.1"):
        own_model(hidden_dropout=0.1)
    with pytest.raises(ValueError, match="cuda_graph_impl = 'transformer_engine'"):
        own_model(cuda_graph_impl="transformer_engine")
    with pytest.raises(ValueError, match="names layer 3, but num_layers is 3; use 0 to 2"):
        own_model(RoutingConfig("attn_token", (1, 3), (0.5, 0.5)))
    with pytest.raises(ValueError, match="normalization = 'LayerNorm'"):
        own_model(normalization="LayerNorm")
    ids, positions = torch.zeros(1, 4, dtype=torch.int64), torch.arange(4)[None]
    mask = torch.ones(1, 1, 4, 4, dtype=torch.bool).triu(1)
    with pytest.raises(ValueError, match="attention_mask=None"):
        own_model()(ids, positions, mask, labels=ids)
    with pytest.raises(ValueError, match="context_parallel_size to 1"):
        TokenLayout(
            roles=ids.to(torch.uint8), position_ids=ids, documents=((2, 2),), context_ranks=2
        )


@pytest.mark.parametrize("granularity", ["mlp_token", "block_token", "mlp_sequence"])
@pytest.mark.parametrize("training", [True, False])
def test_an_mlp_is_entered_with_no_tokens_too(own_model, granularity, training):
    """Experts exchange tokens in it: ranks that keep some would wait for those that keep none."""
    routing = RoutingConfig(granularity, (1,), (0.5,), threshold=1.0, training_compute="sparse")
    model = own_model(routing).train(training)
    rows = []
    model.decoder.layers[1].mlp.register_forward_hook(lambda _, inputs, __: rows.append(inputs[0]))
    ids = torch.randint(64, (2, 12))
    loss = model(ids, torch.arange(12).expand(2, 12), None, labels=ids)
    assert [tuple(row.shape) for row in rows] == [(0, 1, 32)]
    loss.mean().backward()


class Adapted(torch.nn.Module):
    """A projection with something added to what it makes of its input."""

    def __init__(self, linear: torch.nn.Module, weight: torch.Tensor) -> None:
        super().__init__()
        self.linear, self.weight = linear, weight

    def forward(self, hidden: torch.Tensor) -> tuple[torch.Tensor, None]:
        output, bias = self.linear(hidden)
        return output + hidden @ self.weight.t(), bias


def in_its_place(attention, weight):
    attention.linear_qkv = Adapted(attention.linear_qkv, weight)


def by_a_hook(attention, weight):
    attention.linear_qkv.register_forward_hook(
        lambda _, inputs, made: (made[0] + inputs[0] @ weight.t(), made[1])
    )


def by_another_forward(attention, weight):
    linear = attention.linear_qkv
    own = linear.forward
    linear.forward = lambda hidden: (own(hidden)[0] + hidden @ weight.t(), None)


@pytest.mark.parametrize("adapt", [in_its_place, by_a_hook, by_another_forward])
@pytest.mark.parametrize("part", [slice(0, 2), slice(2, 3), slice(3, 4)], ids=["q", "k", "v"])
@pytest.mark.parametrize("training", [True, False])
def test_what_is_put_on_the_projection_takes_part(own_model, adapt, part, training):
    """Queries of chosen tokens and keys of all are projected apart; an adapter is for both."""
    routing = RoutingConfig(
        "attn_token", (1,), (0.5,), keys_values="all", training_compute="sparse"
    )
    ids = torch.randint(64, (2, 12), generator=torch.Generator().manual_seed(3))
    generator = torch.Generator().manual_seed(4)
    weight = torch.zeros(2, 4, 8, 32)  # query groups; their two queries, key and value; channels
    weight[:, part] = torch.randn(weight[:, part].shape, generator=generator)
    weight = weight.flatten(0, 2)

    def logits(change) -> torch.Tensor:
        model = own_model(routing, num_query_groups=2, add_qkv_bias=True).train(training)
        layer = model.decoder.layers[1]
        layer.router.weight.data.normal_(0, 2, generator=torch.Generator().manual_seed(5))
        change(layer.self_attention)
        with torch.no_grad():
            made = model(ids, torch.arange(12).expand(2, 12), None)
        assert 0 < layer.router.kept < layer.router.valid
        return made

    plain = logits(lambda attention: None)
    merged = logits(lambda attention: attention.linear_qkv.weight.data.add_(weight))
    adapted = logits(lambda attention: adapt(attention, weight))
    torch.testing.assert_close(adapted, merged)
    assert (adapted - plain).abs().max() > 1e-3


def test_hooks_before_the_projection_see_queries_and_keys(own_model):
    """Megatron's own wait there for parameters that are still on their way."""
    routing = RoutingConfig("attn_token", (1,), (0.5,), keys_values="all")
    model, seen = own_model(routing).eval(), []
    layer = model.decoder.layers[1]
    layer.router.weight.data.normal_(0, 2, generator=torch.Generator().manual_seed(5))
    layer.self_attention.linear_qkv.register_forward_pre_hook(
        lambda _, inputs: seen.append(inputs[0].shape[:2].numel())
    )
    model(torch.randint(64, (2, 12)), torch.arange(12).expand(2, 12), None)
    assert seen == [int(layer.router.kept), 24]
