"""Where a pipeline is cut, beside all other cuts, and costs beside what torch counts."""

from __future__ import annotations

import random
import re
from dataclasses import replace
from itertools import combinations, pairwise

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from megatron_mod.config.lora import LoraSettings
from megatron_mod.evaluation.work import Work
from megatron_mod.model.architecture import Architecture
from megatron_mod.model.cost import Costs, forward_costs, training_costs
from megatron_mod.model.pipeline import cheapest_layout, even_layout, megatron_layout, step_cost
from megatron_mod.routing.config import NO_ROUTERS, RoutingConfig
from megatron_mod.routing.scheme import OF_ANY_MODEL, Scheme

ARCH = Architecture(
    num_layers=5, hidden_size=32, ffn_hidden_size=48, num_attention_heads=4, num_query_groups=2,
    kv_channels=8, vocab_size=64, max_sequence_length=64, layernorm_epsilon=1e-5,
    rotary_base=10000.0, tied_embeddings=True,
)  # fmt: skip
LENGTH = 16


def all_layouts(num_layers: int, stages: int, *, in_first: int = 1):
    """Every layout whose stages have a layer, but the last one, which may have none."""
    for ends in combinations(range(1, num_layers + 1), stages - 1):
        borders = (0, *ends, num_layers)
        layout = tuple(b - a for a, b in pairwise(borders))
        if layout[0] >= in_first:
            yield layout


@pytest.mark.parametrize("seed", range(60))
def test_the_cheapest_layout_is_the_cheapest_of_all(seed):
    choose = random.Random(seed)
    num_layers = choose.randint(1, 9)
    stages = choose.randint(1, min(5, num_layers))
    in_first = choose.choice([0, 1, choose.randint(1, num_layers - stages + 1)])
    costs = Costs(
        tuple(choose.choice([0, 1, 2, 3, choose.randint(0, 20)]) for _ in range(num_layers)),
        head=choose.choice([0, 1, 7, 60]),
    )

    def badness(layout):
        of_stages = costs.of(layout)
        return max(of_stages), sum(cost**2 for cost in of_stages)

    found = cheapest_layout(costs, stages, in_first=in_first)
    layouts = list(all_layouts(num_layers, stages, in_first=in_first))
    assert found in layouts
    assert badness(found) == min(map(badness, layouts))


def test_costs_of_stages_are_those_of_their_layers():
    assert Costs((1, 2, 3, 4), head=10).of((2, 1, 1)) == [3, 3, 14]
    assert Costs((1, 2, 3, 4), head=10).of((3, 1, 0)) == [6, 4, 10]


def test_an_even_layout_gives_what_is_left_over_to_the_first():
    assert even_layout(30, 2) == (15, 15)
    assert even_layout(30, 4) == (8, 8, 7, 7)


def test_a_step_fills_the_pipeline_and_then_waits_for_the_slowest_stage():
    costs = Costs((1, 1, 1, 1), head=2)
    assert step_cost(costs, (2, 2), ranks=2, micro_batches=1) == 6
    assert step_cost(costs, (2, 2), ranks=2, micro_batches=5) == 6 + 4 * 4
    # Of equal chunks ranks run micro_batches * 2 and wait for one of each earlier rank.
    assert step_cost(Costs((1,) * 4, 0), (1,) * 4, ranks=2, micro_batches=6) == 6 * 2 + 1


def test_megatron_reads_the_layout_as_it_is_meant():
    from megatron.core.transformer.enums import LayerType
    from megatron.core.transformer.pipeline_parallel_layer_layout import (
        PipelineParallelLayerLayout,
    )

    layout = PipelineParallelLayerLayout(megatron_layout((2, 1, 2, 0)), 2)
    layout.validate_layer_layout(num_layers=5, mtp_num_layers=None)
    held = [[chunk.count(LayerType.decoder) for chunk in rank] for rank in layout.layout]
    assert held == [[2, 2], [1, 0]]


@pytest.mark.parametrize("window", [None, 5])
def test_a_forward_pass_costs_what_its_work_is_elsewhere(window):
    arch = replace(ARCH, window_size=window)
    costs = forward_costs(arch, length=LENGTH)
    assert costs.head == 2 * 32 * 64 * LENGTH
    assert sum(costs.layers) + costs.head // LENGTH == Work(arch).prefill(LENGTH, {})


def test_what_is_not_run_costs_nothing_and_is_on_the_first_stage():
    routing = RoutingConfig("block_token", (3, 4), (0.5, 0.5))
    every = training_costs(ARCH, routing, [LENGTH], labels=9)
    rest = training_costs(ARCH, routing, [LENGTH], labels=9, num_free_layers=3)
    assert rest.layers == (0, 0, 0, *every.layers[3:])
    assert rest.head == every.head
    for stages, layout in ((2, (4, 1)), (3, (4, 1, 0))):
        assert cheapest_layout(replace(rest, head=1), stages, in_first=3) == layout
    assert cheapest_layout(replace(rest, head=10**9), 2, in_first=3) == (5, 0)


def test_a_distillation_runs_the_dense_model_too():
    routing = RoutingConfig("block_token", (2, 3), (0.5, 0.5), stand_in_rank=4)
    alone = training_costs(ARCH, routing, [LENGTH, 7], labels=12)
    both = training_costs(ARCH, routing, [LENGTH, 7], labels=12, dense_passes=1)
    dense = [
        one + other
        for one, other in zip(
            forward_costs(ARCH, length=LENGTH).layers,
            forward_costs(ARCH, length=7).layers,
            strict=True,
        )
    ]
    assert [b - a for a, b in zip(alone.layers, both.layers, strict=True)] == dense
    assert both.head - alone.head == 2 * 32 * 64 * 12


@pytest.fixture(scope="module")
def trainer(tmp_path_factory, single_process):
    from tests.helpers.runs import Trainer

    return Trainer(tmp_path_factory.mktemp("trainer"), num_hidden_layers=6)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({}, r"pipeline stages: 4 \+ 2 layers, .* step: 0\.\d\d of an even cut's \(3 \+ 3 "),
        ({"pipeline_layout": "even"}, r"pipeline stages: 3 \+ 3 layers, .* step: 1\.00 of"),
        ({"pipeline_layout": "[2,4]"}, r"pipeline stages: 2 \+ 4 layers, .* step: 1\.\d\d of"),
    ],
)
def test_a_training_is_cut_and_says_so(trainer, monkeypatch, tmp_path, settings, said):
    from megatron_mod.config import cli
    from megatron_mod.training.plan import description, prepare

    monkeypatch.setenv("WORLD_SIZE", "2")  # as torchrun says it; ranks do not meet here
    settings = {f"parallel__{name}": value for name, value in settings.items()}
    settings = {"parallel__pipeline_model_parallel_size": 2, **settings}
    config = cli.parse(trainer.arguments(tmp_path / "run", **settings))
    plan = prepare(config)
    assert re.search(said, description(config, plan, parameters=1))
    assert plan.cut.layout == plan.topology.pipeline_layout


@pytest.mark.parametrize(
    ("packs", "world", "settings"),
    [
        (True, 1, {}),
        (False, 1, {"data__max_length": 32}),
        (True, 1, {"data__max_length": 32, "data__packing": "true"}),
        (False, 1, {"data__packing": "false"}),
        (False, 2, {}),  # of four documents there are too few rows for two ranks
        (True, 2, {"train__global_batch_size": 64}),
        (False, 2, {"parallel__pipeline_model_parallel_size": 2}),
        (False, 2, {"parallel__context_parallel_size": 2, "train__global_batch_size": 64}),
    ],
)
def test_rows_are_packed_where_it_pays(trainer, monkeypatch, tmp_path, packs, world, settings):
    from megatron_mod.config import cli
    from megatron_mod.training.plan import description, prepare

    monkeypatch.setenv("WORLD_SIZE", str(world))
    settings = {"data__max_length": 128, **settings}  # of some forty tokens is a document
    config = cli.parse(trainer.arguments(tmp_path / "run", **settings))
    plan = prepare(config)
    assert plan.packing == packs
    assert ("several in a row" in description(config, plan, parameters=1)) == packs


def test_what_is_not_run_is_on_the_first_stage_where_it_can_be(trainer, tmp_path):
    from megatron_mod.config import cli
    from megatron_mod.parallel.topology import Topology
    from megatron_mod.training.pipeline import cut
    from megatron_mod.training.plan import prepare

    config = cli.parse(trainer.arguments(tmp_path / "run"))
    plan = prepare(config)
    given = (config, plan.base.arch, plan.routing)
    two = Topology(tensor=1, pipeline=2, data=1)
    assert cut(*given, Topology(tensor=1, pipeline=1, data=1), plan.train) is None
    found = cut(*given, two, plan.train, num_free_layers=4)
    assert found.costs.layers[:4] == (0, 0, 0, 0)
    assert found.layout[0] >= 4
    assert cut(*given, two, plan.train, asked=(3, 3), num_free_layers=4).layout == (3, 3)
    three, four = (replace(two, pipeline=stages) for stages in (3, 4))
    assert cut(*given, three, plan.train, num_free_layers=4).layout in ((4, 1, 1), (5, 1, 0))
    assert sum(cut(*given, four, plan.train, num_free_layers=4).layout) == 6


@pytest.mark.parametrize("granularity", OF_ANY_MODEL)
@pytest.mark.parametrize("layers", [(0, 2), (2, 3), (4,)], ids=str)
def test_training_costs_what_torch_counts(single_process, granularity, layers):
    """But for pairs of tokens that do not see each other, which torch computes and hides, and the
    router, whose product has more than one form."""
    targets = len(Scheme.parse(granularity).targets)
    routing = RoutingConfig(granularity, layers, (0.5,) * len(layers) * targets)
    counted = count(routing)
    costs = training_costs(ARCH, routing, [LENGTH], labels=0)
    unseen = LENGTH * LENGTH - LENGTH * (LENGTH + 1) // 2
    scores = 4 * 32 * unseen * (ARCH.num_layers + 2 * (ARCH.num_layers - 1 - layers[0]))
    router = 3 * 2 * LENGTH * 32 * len(routing.places)
    assert counted - router <= sum(costs.layers) + scores <= counted + router


ATTENTION, MLP = ("q_proj", "k_proj", "v_proj", "o_proj"), ("gate_proj", "up_proj", "down_proj")


@pytest.mark.parametrize(
    ("granularity", "targets", "layers", "trained", "lowest", "recompute"),
    [  # lowest: layers that attention's backward pass goes through
        ("attn_token", ATTENTION + MLP, (0, 1, 2, 3, 4), "routers+lora", 5, "none"),
        ("mlp_token", ("o_proj", "up_proj"), (1, 3), "routers+lora", 3, "none"),
        ("mlp_token", ("o_proj", "up_proj"), (1, 3), "routers+lora", 3, "selective"),
        ("block_token", ("down_proj",), (1, 2), "routers+lora", 3, "none"),
        ("block_token", ATTENTION, (3,), "lora", 2, "full"),
        ("attn_token", MLP, (2,), "routers+lora", 2, "none"),
        ("attn_token", MLP, (2,), "routers+lora", 2, "selective"),
        (None, ("gate_proj",), (2, 4), "lora", 2, "none"),
        (None, ATTENTION + MLP, (1, 2), "lora", 4, "full"),
    ],
)
def test_adapters_cost_what_torch_counts(
    single_process, granularity, targets, layers, trained, lowest, recompute
):
    routing = RoutingConfig(granularity, (2, 3), (0.5, 0.5)) if granularity else NO_ROUTERS
    lora, parts = LoraSettings(3, 6.0, 0.0, targets, layers), trained.split("+")
    counted = count(routing, recompute, lora=lora, trained=parts)
    costs = training_costs(
        ARCH, routing, [LENGTH], labels=0, lora=lora, parts=parts, recompute=recompute
    )
    unseen = LENGTH * LENGTH - LENGTH * (LENGTH + 1) // 2
    first = min(layers + (routing.layers if "routers" in parts else ()))
    if recompute == "selective" and first not in routing.layers:
        lowest = ARCH.num_layers - first  # Megatron's checkpoint of an MLP asks for more
    again = ARCH.num_layers - first if recompute == "full" else 0
    scores = 4 * 32 * unseen * (ARCH.num_layers + 2 * lowest + again)
    router = 3 * 2 * LENGTH * 32 * len(routing.layers)
    last = 2 * LENGTH * 3 * 32 * len(layers) if again else 0  # which torch leaves out
    assert counted - router <= sum(costs.layers) + scores <= counted + router + last


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
@pytest.mark.parametrize("granularity", [None, "attn_token", "block_token"])
def test_a_whole_model_costs_what_torch_counts(single_process, granularity, recompute):
    added = {"stand_in_rank": 5, "bias": True}
    routing = RoutingConfig(granularity, (1, 3), (0.5, 0.5), **added) if granularity else NO_ROUTERS
    parts = ("base", "routers", "stand_ins")
    counted = count(routing, recompute, trained=parts)
    costs = training_costs(ARCH, routing, [LENGTH], labels=0, parts=parts, recompute=recompute)
    unseen = LENGTH * LENGTH - LENGTH * (LENGTH + 1) // 2
    scores = 4 * 32 * unseen * ARCH.num_layers * (4 if recompute == "full" else 3)
    router = 3 * 2 * LENGTH * 32 * len(routing.layers)
    assert counted - router <= sum(costs.layers) + scores <= counted + router


@pytest.mark.parametrize("parts", [("routers",), ("base", "routers")])
def test_a_head_costs_what_torch_counts(single_process, parts):
    from megatron_mod.model.builder import build_model, transformer_config
    from megatron_mod.model.head import CHUNK, add_up
    from megatron_mod.training.losses import cross_entropy

    routing, labels = RoutingConfig("attn_token", (1,), (0.5,)), CHUNK + 7
    config = transformer_config(ARCH, dtype=torch.float32)
    model = build_model(ARCH, config, routing, trained=parts).last
    targets = torch.arange(labels) % ARCH.vocab_size

    def measure(logits: torch.Tensor, rows: slice) -> tuple[torch.Tensor, torch.Tensor]:
        return (found := cross_entropy(logits, targets[rows])), found

    states = torch.randn(labels, 32, requires_grad=True)
    with FlopCounterMode(display=False) as seen:
        add_up(model, states, measure)[0].backward()
    costs = training_costs(ARCH, routing, [LENGTH], labels=labels, parts=parts)
    assert seen.get_total_flops() == costs.head


@pytest.mark.parametrize("granularity", ["attn_token+mlp_token", "mlp_token", "block_sequence"])
def test_so_does_computing_again(single_process, granularity):
    """Of each kind what ``train.recompute`` adds, scores by the pairs that torch computes."""
    routers = 2 * len(Scheme.parse(granularity).targets)
    routing = RoutingConfig(granularity, (1, 3), (0.5,) * routers)
    costs = {
        kind: training_costs(ARCH, routing, [LENGTH], labels=0, recompute=kind).layers
        for kind in ("none", "selective", "full")
    }
    seen = LENGTH * (LENGTH + 1) // 2
    unseen = 4 * 32 * (LENGTH * LENGTH - seen)
    more = count(routing, "selective") - count(routing)
    assert more == sum(costs["selective"]) - sum(costs["none"])
    more = count(routing, "full") - count(routing)
    assert more == sum(costs["full"]) - sum(costs["none"]) + unseen * (ARCH.num_layers - 1)


@pytest.mark.parametrize("granularity", OF_ANY_MODEL)
def test_sparse_training_costs_what_is_kept(single_process, granularity):
    """All that a fully skipped layer computes is what its scheme does not cover."""
    routers = len(Scheme.parse(granularity).targets)
    skipped = RoutingConfig(
        granularity, (1,), (0.0,) * routers, threshold=1 - 1e-9, training_compute="sparse"
    )
    costs = training_costs(ARCH, skipped, [LENGTH], labels=0)
    kept = training_costs(ARCH, replace(skipped, capacity=(1.0,) * routers), [LENGTH], labels=0)
    dense = training_costs(ARCH, replace(skipped, training_compute="dense"), [LENGTH], labels=0)
    assert kept == dense
    router = 3 * 2 * LENGTH * 32 * routers
    unseen = LENGTH * LENGTH - LENGTH * (LENGTH + 1) // 2
    runs_attention = not skipped.scheme.covers_attention
    scores = 4 * 32 * unseen * (ARCH.num_layers - 1 + runs_attention + 2 * 3)
    # Its keys and values are offered only to tokens that are kept, and there are none.
    keys = 2 * LENGTH * ARCH.key_weights * (skipped.keys_values == "all")
    assert abs(sum(costs.layers) - keys + scores - count(skipped)) <= router


def count(routing: RoutingConfig, recompute: str = "none", **added: object) -> int:
    """Operations of the layers, forward and backward, that torch counts for one document.
    ``added``: more of ``build_model``."""
    from megatron_mod.data.batch import collate
    from megatron_mod.data.chat import Sample
    from megatron_mod.model.builder import build_model, transformer_config
    from megatron_mod.model.layout import TokenLayout

    torch.manual_seed(3)
    config = transformer_config(ARCH, dtype=torch.float32, recompute=recompute)
    model = build_model(ARCH, config, routing, **added)
    for parameter in model.parameters():
        parameter.data.normal_(0.0, 0.2)
    sample = Sample(list(range(LENGTH)), [True] * LENGTH, "made:0")
    batch = collate([[sample]], multiple=1)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as seen:
        layout = TokenLayout.of(batch)
        hidden = model.last(
            batch.input_ids, batch.position_ids, None, packed_seq_params=layout, with_head=False
        )
        (hidden * torch.randn_like(hidden)).sum().backward()
    return seen.get_total_flops()
