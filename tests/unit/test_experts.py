"""Routers on experts: the rule, what it counts, what training holds, and what is refused."""

from __future__ import annotations

import json
from statistics import fmean

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from megatron_mod.config import cli
from megatron_mod.config.stand_ins import StandInRequest
from megatron_mod.conversion.routers import write_published
from megatron_mod.evaluation.work import Work
from megatron_mod.model.cost import workload
from megatron_mod.routing.config import RoutingConfig
from megatron_mod.routing.decision import Decisions
from megatron_mod.routing.expert_router import ExpertRouter, weighed
from tests.helpers import experts
from tests.helpers.runs import EXPERTS, Trainer, metrics


@pytest.fixture(scope="module")
def trainer(tmp_path_factory, single_process):
    kind, changes = experts.FAMILIES["qwen3_moe"]
    made = Trainer(tmp_path_factory.mktemp(kind), kind=kind, **changes)
    made.write_distinct()
    return made


def train(trainer, run, **changes) -> tuple[list[float], list[float]]:
    """Mean capacity of each step, and of each layer in the end on all samples."""
    settings = {
        **EXPERTS, "train__steps": 10, "checkpoint__interval": 0, "data__validation": trainer.text,
        "train__validation_interval": 100, **changes,
    }  # fmt: skip
    trainer.train(run, **settings)
    lines = metrics(run)
    steps = [fmean(line["capacity"]) for line in lines if "capacity" in line]
    return steps, lines[-1]["validation_capacity"]


@pytest.mark.parametrize(
    ("scope", "lr"),
    [
        pytest.param("model", 1e-5, marks=pytest.mark.slow),
        pytest.param("model", 1e-1, marks=pytest.mark.slow),
        pytest.param("layer", 1e-3, marks=pytest.mark.slow),
        ("layer", 1e-1),
    ],
)
def test_the_capacity_that_is_asked_for_is_reached_at_any_learning_rate(
    trainer, tmp_path, scope, lr
):
    steps, found = train(
        trainer, tmp_path / "run", optimizer__lr=lr, router__scope=scope,
        router__renormalize=str(scope == "layer").lower(),
    )  # fmt: skip
    assert min(steps) > 0.1
    assert fmean(found) == pytest.approx(0.5, abs=0.05)
    if scope == "layer":
        assert found == pytest.approx([0.5, 0.5], abs=0.05)
        targets = [1 - 0.5 * min(number / 5, 1.0) for number in range(10)]
        assert steps == pytest.approx(targets, abs=0.12)


def test_a_budget_of_work_is_met(trainer, tmp_path):
    run = tmp_path / "run"
    train(trainer, run, router__work=0.85, router__capacity=None, optimizer__lr=1e-2)
    assert metrics(run)[-1]["validation_work"] == pytest.approx(0.85, abs=0.02)


def test_steps_that_skip_every_pair_go_on(trainer, tmp_path):
    """The published way, with a border above all scores: nothing is dispatched."""
    settings = {
        **EXPERTS, "router__bias": "false", "router__init": "zeros", "router__threshold": 0.6,
        "router__capacity_loss_weight": 0.5, "router__training_compute": "sparse",
        "router__capacity_warmup_fraction": 0.0, "train__steps": 3,
    }  # fmt: skip
    steps, found = train(trainer, tmp_path / "run", **settings)
    assert steps == [0.0] * 3
    assert found == [0.0, 0.0]


def test_each_experts_pairs_are_counted_and_noted():
    torch.manual_seed(3)
    router = ExpertRouter(8, 4, 2, bias=True)
    router.weight.data.normal_()
    inputs = torch.randn(5, 3, 8)
    valid = torch.zeros(5, 3, 4, dtype=torch.bool).scatter(
        -1, torch.rand(5, 3, 4).topk(2).indices, True
    )
    valid[-1] = False  # padding
    logits = router(inputs)
    mask = ((logits >= 0) & valid).float()
    sizes = torch.ones(3, 5, 3, dtype=torch.float64)
    router.note(Decisions(logits, mask, valid), sizes)
    assert router.by_expert.tolist() == [each.sum((0, 1)).tolist() for each in (mask, valid)]
    assert router.sizes.tolist() == [[float(each.sum())] * 3 for each in (mask, valid)]
    router.note_inputs(inputs.flatten(0, 1), valid.flatten(0, 1), sizes.flatten(1))
    scores = router.scores()
    assert sorted(scores[scores.isfinite()].tolist()) == sorted(logits[valid].tolist())
    assert scores.isnan().sum() == 6
    assert router.noted_sizes()[:, 0].sum() == valid.sum()


def test_what_is_left_gets_the_weight_of_all():
    weights = torch.tensor([[0.5, 0.3, 0.0], [0.5, 0.3, 0.0], [0.2, 0.0, 0.6]])
    mask = torch.tensor([[1.0, 0.0, 1.0], [0.0, 0.0, 0.0], [1.0, 1.0, 1.0]], requires_grad=True)
    dropped = weighed(weights, mask, renormalize=False)
    assert dropped.tolist() == (weights * mask).tolist()
    found = weighed(weights, mask, renormalize=True)
    assert torch.allclose(found.sum(-1), torch.tensor([0.8, 0.0, 0.8]))
    assert found[2].tolist() == weights[2].tolist()  # to the bit where nothing is skipped
    found.square().sum().backward()
    assert mask.grad.isfinite().all()


@pytest.mark.parametrize("renormalize", [False, True])
@pytest.mark.parametrize("keeps", ["all", "some", "none", "ties"])
def test_counted_work_is_that_of_the_pairs_that_are_kept(single_process, renormalize, keeps):
    """And untrained routers, whose scores are ties at the border, are the dense model."""
    from megatron_mod.model.architecture import Architecture, Mixture
    from megatron_mod.model.builder import build_model, transformer_config
    from megatron_mod.model.layout import StepContext, TokenLayout

    arch = Architecture(
        num_layers=1, hidden_size=32, ffn_hidden_size=48, num_attention_heads=4, num_query_groups=4,
        kv_channels=8, vocab_size=16, max_sequence_length=64, layernorm_epsilon=1e-5,
        rotary_base=10000.0, tied_embeddings=True, mixture=Mixture(6, 2, 48),
    )  # fmt: skip
    threshold = {"all": 1e-9, "none": 1 - 1e-9}.get(keeps, 0.5)
    routing = RoutingConfig(
        "expert_token", (0,), (0.5,), threshold=threshold, renormalize=renormalize
    )
    torch.manual_seed(4)
    model = build_model(arch, transformer_config(arch, dtype=torch.float32), routing)[0].eval()
    for parameter in model.parameters():
        parameter.data.normal_(0.0, 0.3)
    layer, rotary = model.decoder.layers[0], model.rotary_pos_emb(16)
    if keeps == "ties":
        layer.router.weight.data.zero_()
    grid = torch.randn(16, 1, 32)
    layout = TokenLayout.of_prompts(grid, context_rank=0, context_ranks=1)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        output, _ = layer(grid, rotary_pos_emb=rotary, packed_seq_params=layout)
    (place,) = routing.places
    made = layout.decisions[place]
    kept = made.mask[made.valid].bool()
    assert len(kept) == 16 * 2
    least, most = {"some": (1, 31), "none": (0, 0)}.get(keeps, (32, 32))
    assert least <= int(kept.sum()) <= most
    layout.step = StepContext(dense=True)
    with sdpa_kernel(SDPBackend.MATH):
        dense, _ = layer(grid, rotary_pos_emb=rotary, packed_seq_params=layout)
    assert torch.equal(output, dense) == (least == 32)
    head = 2 * 32 * 16
    pairs = 4 * 32 * (16 * 16 - 16 * 17 // 2)  # computed and masked, which is not counted
    counted = Work(arch, routing).prefill(16, {place: kept}) - head
    assert counter.get_total_flops() == counted + pairs
    load = workload(arch, routing, [16])
    share = float(kept.float().mean())
    assert load.work(share) * load.dense == pytest.approx(counted + head)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["--router.stand_in=linear"], "router.stand_in = linear.*nothing stands in"),
        (["--router.work=[0.5, 0.9]"], "router.work = .*serve one budget"),
        (["--router.selection=top_k"], "router.selection = top_k.*expert_token"),
        (["--router.selection=random"], "router.selection = random.*expert_token"),
        (["--router.stand_in_rank=4"], "router.stand_in_rank = 4: nothing stands in"),
        (["--train.trainable=routers+stand_ins"], "there are no stand-ins to train"),
        (
            ["--router.granularity=mlp_token", "--router.renormalize=true"],
            "router.renormalize = true.*mlp_token.*set router.granularity to expert_token",
        ),
    ],
)
def test_settings_that_experts_do_not_have_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        cli.parse(
            [
                "--model.checkpoint=base", "--data.train=x.jsonl", "--train.steps=1",
                "--checkpoint.save=run", "--router.granularity=expert_token", *settings,
            ]
        )  # fmt: skip


@pytest.mark.parametrize(
    ("name", "value"), [("keys_values", "selected"), ("pooling", "all"), ("stand_in_rank", 4)]
)
def test_so_are_they_where_they_come_from_elsewhere(name, value):
    with pytest.raises(ValueError, match="expert_token|experts' routers"):
        RoutingConfig("expert_token", (1,), (0.5,), **{name: value})


def test_the_published_format_has_none(tmp_path):
    routing = RoutingConfig("expert_token", (1,), (0.5,))
    added = {1: {"router.weight": torch.zeros(4, 8)}}
    with pytest.raises(ValueError, match="--routers-only: router.granularity = expert_token"):
        write_published(tmp_path, routing, added, {"num_hidden_layers": 2})


def test_a_model_without_experts_is_refused(tmp_path, single_process):
    plain = Trainer(tmp_path)
    with pytest.raises(ValueError, match="router.granularity = expert_token: .*one MLP each"):
        plain.train(tmp_path / "run", **EXPERTS)


def test_nothing_is_fitted_for_experts(tmp_path):
    file = tmp_path / "text.txt"
    file.write_text("text")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mixtral"}))
    with pytest.raises(ValueError, match="--granularity expert_token: nothing stands in"):
        StandInRequest(
            load=str(tmp_path), data=str(file), save=str(tmp_path / "new"),
            granularity="expert_token",
        )  # fmt: skip
