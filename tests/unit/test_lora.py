"""Adapters: what settings say of them, what they add, how they train, and what is kept of them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from megatron_mod.checkpoint.distributed import load_tensors
from megatron_mod.config import cli
from megatron_mod.config.lora import (
    TARGETS,
    LoraSettings,
    require_projections,
    resolve_targets,
)
from megatron_mod.config.shapes import SHAPES
from megatron_mod.conversion.families import family_of
from megatron_mod.routing.config import NO_ROUTERS, RoutingConfig
from megatron_mod.training.optimizer import own_rates
from tests.helpers.formula import SCHEMES, targets_of
from tests.helpers.runs import DEFAULT, Trainer, metrics, saved

ALL = LoraSettings(2, 4.0, 0.0, tuple(TARGETS), (0, 1, 2))
# No routers, and nothing said of any.
DENSE = {
    **dict.fromkeys((*DEFAULT, "router__layers__deepest")), "router__layers": "[]",
    "train__trainable": "lora", "lora__rank": 4,
}  # fmt: skip
WITH = {
    **DEFAULT, "router__init": "zeros", "train__trainable": "routers+stand_ins+lora",
    "lora__rank": 4, "lora__lr": 0.02, "lora__dropout": 0.2, "lora__layers": "[1,3]",
    "router__stand_in_lr": 0.005, "checkpoint__interval": 4,
}  # fmt: skip
ALONE = {
    **dict.fromkeys((*DEFAULT, "router__layers__deepest")), "train__trainable": "lora",
    "lora__rank": 2, "lora__targets": "[linear_qkv,down_proj]",
}  # fmt: skip


def parse(*arguments: str):
    needed = ("--model.hf_path=m", "--data.train=d", "--train.steps=1", "--checkpoint.save=c")
    return cli.parse([*needed, *arguments])


def test_targets_are_named_as_hugging_face_or_megatron_does():
    assert resolve_targets("all-linear") == tuple(TARGETS)
    assert resolve_targets(["v_proj", "q_proj"]) == ("q_proj", "v_proj")
    assert resolve_targets("linear_qkv") == ("q_proj", "k_proj", "v_proj")
    wanted = ("o_proj", "gate_proj", "up_proj", "down_proj")
    assert resolve_targets(["linear_fc2", "linear_fc1", "o_proj"]) == wanted
    for names in (["q_proj", "linear_qkv"], ["query"], []):
        with pytest.raises(ValueError, match=r"^lora.targets"):
            resolve_targets(names)


def test_what_is_unset_follows():
    lora = parse("--lora.rank=8", "--train.trainable=routers+lora").lora
    every = LoraSettings(8, 16.0, 0.0, tuple(TARGETS), (0, 1, 2))
    assert lora.resolve(num_layers=3, projections=TARGETS) == every
    assert LoraSettings.from_dict(json.loads(json.dumps(every.to_dict()))) == every
    some = ("--lora.layers.deepest=1", "--lora.alpha=3", "--lora.dropout=0.5")
    lora = parse("--lora.rank=8", "--train.trainable=lora", "--router.layers=[]", *some).lora
    assert lora.resolve(num_layers=3, projections=TARGETS) == LoraSettings(
        8, 3.0, 0.5, tuple(TARGETS), (1,)
    )
    assert parse().lora.resolve(num_layers=3, projections=TARGETS) is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--lora.alpha=3", "lora.alpha = 3.0: would be ignored, because lora.rank is unset"),
        ("--lora.lr=3", "lora.lr = 3.0: would be ignored"),
        ("--lora.dropout=0", "lora.dropout = 0.0: would be ignored"),
        ("--lora.rank=3", "lora.rank = 3: would be ignored, because train.trainable = routers"),
        ("--lora.rank=0 --train.trainable=lora", "lora.rank = 0: must be at least 1"),
        ("--lora.rank=1 --lora.dropout=1", "lora.dropout = 1.0: must be 0 to below 1"),
        ("--train.trainable=routers+lora", "no adapters to train; set lora.rank"),
        ("--router.layers=[]", "router.layers = []: train.trainable = routers trains routers"),
        (
            "--router.layers=[] --train.trainable=lora --lora.rank=1 --model.routers=x",
            "model.routers = x: would be ignored",
        ),
        (
            "--router.layers=[] --train.trainable=lora --lora.rank=1 --router.capacity=0.6",
            "router.capacity = 0.6: would be ignored, because router.layers = [] has no routers",
        ),
        (
            "--router.layers=[] --train.trainable=lora --lora.rank=1 --train.loss=distill",
            "train.loss = distill: without routers",
        ),
    ],
)
def test_what_would_be_ignored_is_refused(arguments, message):
    with pytest.raises(ValueError) as caught:
        parse(*arguments.split())
    assert message in str(caught.value)


@pytest.fixture(scope="module")
def trainer(tmp_path_factory, single_process):
    made = Trainer(tmp_path_factory.mktemp("trainer"))
    made.write_distinct()
    return made


@pytest.fixture
def build(trainer):
    """A model with adapters away from zero."""

    def call(routing: RoutingConfig, lora: LoraSettings = ALL, **options: object):
        from megatron_mod.conversion.lora import put_adapters
        from megatron_mod.conversion.restore import load_model
        from megatron_mod.conversion.source import open_base
        from megatron_mod.model.trainable import LORA, ROUTERS
        from megatron_mod.parallel.topology import ONE_RANK

        base, generator = open_base(trainer.base), torch.Generator().manual_seed(7)
        options = {"implementation": "local", "trained": (ROUTERS, LORA), **options}
        model = load_model(base, routing, ONE_RANK, lora=lora, **options)
        shapes = lora.shapes(base.arch.projections)
        put_adapters(
            model,
            {
                layer: {k: 0.3 * torch.randn(v, generator=generator) for k, v in shapes.items()}
                for layer in lora.layers
            },
        )
        for router in model.routers().values():
            router.weight.data.normal_(0, 2, generator=generator)
        return model

    return call


def logits(model, ids: torch.Tensor) -> torch.Tensor:
    return model.last(ids, torch.arange(ids.shape[1]).expand_as(ids), None)


@pytest.mark.parametrize("compute", ["evaluation", "sparse"])
@pytest.mark.parametrize("name", SCHEMES)
def test_every_target_takes_part(build, name, compute):
    routing = RoutingConfig(
        layers=(1,),
        capacity=(0.5,) * len(targets_of(SCHEMES[name]["granularity"])),
        training_compute="sparse",
        **SCHEMES[name],
    )
    model = build(routing).train(compute == "sparse")
    ids = torch.randint(3, 100, (4, 12), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        before, own = logits(model, ids), model.adapters()[1]
        for router in model.routers().values():
            assert 0 < router.kept < router.valid
        for target in TARGETS:
            for key in "ab":
                own.of(target)[key].data.add_(0.1)
                assert (logits(model, ids) - before).abs().max() > 1e-3, (target, key)
                own.of(target)[key].data.sub_(0.1)
        torch.testing.assert_close(logits(model, ids), before)


@pytest.mark.parametrize("granularity", ["attn_token", "mlp_token", "block_token"])
def test_no_tokens_are_no_trouble(build, granularity):
    """Every unit is skipped: the layer's adapters add nothing to them, and hear nothing."""
    routing = RoutingConfig(
        granularity, (1,), (0.5,), threshold=1.0, training_compute="sparse", keys_values=None
    )
    model = build(routing)
    ids = torch.randint(3, 100, (2, 9))
    logits(model, ids).sum().backward()
    assert all(router.kept == 0 for router in model.routers().values())
    skipped = ("q_proj", "down_proj")[granularity == "mlp_token"]
    grad = model.adapters()[1].of(skipped)["b"].grad
    assert grad is None or not grad.any()
    assert model.adapters()[2].of(skipped)["b"].grad.any()


@pytest.mark.parametrize("recompute", ["selective", "full"])
@pytest.mark.parametrize("targets", [tuple(TARGETS), ("gate_proj", "down_proj")], ids=len)
def test_computing_again_repeats_dropout(build, recompute, targets):
    """The first layer's adapters have no gradient below them, which Megatron's own checkpoint
    would need."""
    from megatron_mod.model.lora import seed_dropout

    lora = LoraSettings(2, 4.0, 0.4, targets, (0, 1, 3))
    routing = RoutingConfig("attn_token", (1, 2), (0.5, 0.5), keys_values="all")
    ids = torch.randint(3, 100, (2, 9), generator=torch.Generator().manual_seed(1))
    found = []
    for kind in ("none", recompute):
        model = build(routing, lora, recompute=kind)
        seed_dropout(lora, seed=5, groups=model.groups)
        first, second = (logits(model, ids) for _ in range(2))
        assert not torch.equal(first, second)
        (first.square().sum() + second.sum()).backward()
        parameters = {k: p for k, p in model.named_parameters() if p.requires_grad}
        found.append({name: parameter.grad for name, parameter in parameters.items()})
        model.eval()
        with torch.no_grad():
            assert torch.equal(logits(model, ids), logits(model, ids))
    assert found[0].keys() == found[1].keys()
    for name, grad in found[0].items():
        assert grad.any(), name
        torch.testing.assert_close(found[1][name], grad, rtol=1e-4, atol=1e-5)
    seed_dropout(None, seed=5, groups=model.groups)


def tensors(run: Path, step: int = 6) -> dict:
    return load_tensors(run / f"step_{step:08d}" / "state")


@pytest.fixture(scope="module")
def both(trainer, tmp_path_factory):
    """A run that has trained routers, stand-ins and adapters with dropout."""
    run = tmp_path_factory.mktemp("both") / "run"
    summary = trainer.train(run, **WITH)
    return run, summary["train"]


def test_adapters_train_with_routers_and_nothing_else_is_kept(trainer, both):
    run, summary = both
    found, names = tensors(run), [f"{target}.{key}" for target in TARGETS for key in "ab"]
    own = {k for k in found if k.startswith("decoder.")}
    adapters = {f"decoder.layers.{layer}.lora.{name}" for layer in (1, 3) for name in names}
    assert {key for key in own if ".lora." in key} == adapters
    assert {key.split(".")[3] for key in own - adapters} == {"router", "stand_in"}
    assert summary["trainable_parameters"] == sum(found[key].numel() for key in own)
    assert summary["frozen_parameters_changed"] == 0
    assert summary["loss_last"] < summary["loss_first"]
    kept = {f"optimizer.state.{m}.{k}" for m in ("exp_avg", "exp_avg_sq") for k in own}
    assert {key for key in found if key.startswith("optimizer.")} == kept
    assert all(found[key].any() for key in adapters)
    manifest = json.loads((run / "step_00000006" / "megatron_mod.json").read_text())
    assert LoraSettings.from_dict(manifest["lora"]) == LoraSettings(
        4, 8.0, 0.2, tuple(TARGETS), (1, 3)
    )
    for line in metrics(run):
        assert line["lora_learning_rate"] == pytest.approx(0.4 * line["learning_rate"])
        assert line["stand_in_learning_rate"] == pytest.approx(0.1 * line["learning_rate"])


def test_each_part_has_its_own_rate(trainer, tmp_path):
    """A step of Adam's moves nothing much farther than the learning rate."""
    settings = {
        **WITH, "optimizer__lr": 1e-2, "optimizer__average_fraction": 0, "lora__lr": 3e-3,
        "router__stand_in_lr": 1e-3, "router__capacity_warmup_fraction": 0,
    }  # fmt: skip
    states = []
    for steps in (0, 3):
        trainer.train(tmp_path / str(steps), **settings, train__steps=steps)
        states.append(tensors(tmp_path / str(steps), steps))
    for name, rate in (("router.weight", 1e-2), ("stand_in.up.weight", 1e-3), ("lora", 3e-3)):
        moved = max(
            float((after - states[0][key]).abs().max())
            for key, after in states[1].items()
            if key.startswith("decoder") and f".{name}" in key
        )
        assert 0.3 * rate < moved < 3.3 * rate, name


@pytest.mark.parametrize(
    ("trainable", "changes", "rates"),
    [
        ("routers+stand_ins+lora", ("--lora.rank=2",), {"lora": 1e-3, "stand_in": 1e-3}),
        ("routers+stand_ins", ("--router.stand_in_lr=0.003",), {"stand_in": 3e-3}),
        ("routers+lora", ("--lora.rank=2", "--lora.lr=0.01"), {}),  # that of the routers
        ("lora", ("--lora.rank=2", "--router.layers=[]"), {}),
        ("lora", ("--lora.rank=2", "--router.layers=[]", "--lora.lr=0.1"), {"lora": 0.1}),
        ("routers", (), {}),
        ("all", (), {}),
    ],
)
def test_beside_routers_the_others_go_slower(trainable, changes, rates):
    config = parse(f"--train.trainable={trainable}", "--optimizer.lr=0.01", *changes)
    assert own_rates(config) == pytest.approx(rates)


def test_going_on_is_the_same_to_the_last_bit(trainer, both, tmp_path):
    run, _ = both
    again = tmp_path / "again"
    shutil.copytree(run, again)
    shutil.rmtree(again / "step_00000006")
    trainer.train(again, **WITH)
    assert metrics(again) == metrics(run)
    assert saved(again) == saved(run)


def test_another_rank_is_refused_on_going_on(trainer, both):
    run, _ = both
    with pytest.raises(ValueError, match=r"lora.rank = 3: the run in .* was started with 4"):
        trainer.train(run, **{**WITH, "lora__rank": 3})


def test_a_run_is_restored_with_its_adapters(trainer, both):
    from megatron_mod.conversion.lora import read_step_adapters
    from megatron_mod.conversion.restore import restore_model
    from megatron_mod.conversion.source import open_source
    from megatron_mod.parallel.topology import ONE_RANK

    run, _ = both
    source, found = open_source(run), tensors(run)
    settings, adapters = read_step_adapters(source.step)
    model, _ = restore_model(source, ONE_RANK)
    assert settings == source.lora
    for layer, own in model.adapters().items():
        for name, parameter in own.named_parameters():
            mean = found[f"average.decoder.layers.{layer}.lora.{name}"]
            assert torch.equal(parameter, mean)
            assert torch.equal(adapters[layer][name], mean)


def test_adapters_of_a_dense_model(trainer, tmp_path, capsys):
    from megatron_mod.conversion.source import open_source
    from megatron_mod.report.run import read_run

    run = tmp_path / "run"
    validation = {"data__validation_split": 0.3, "train__validation_interval": 3}
    summary = trainer.train(run, **DENSE, **validation)
    said = capsys.readouterr().out
    assert "training lora (8704 parameters, float32; 15 % of the model's 57824)" in said
    assert summary["train"]["loss_last"] < summary["train"]["loss_first"]
    lines = [line for line in metrics(run) if "capacity" in line]
    assert all(line["capacity"] == [] and line["capacity_mean"] == 1.0 for line in lines)
    assert lines[-1]["penalty"] == 0.0
    assert {key.split(".")[3] for key in tensors(run) if key.startswith("decoder.")} == {"lora"}
    source = open_source(run)
    assert source.routing is None
    assert source.lora.rank == 4
    assert read_run(run).routing is None
    trainer.train(run, **DENSE, **validation)  # finished


def test_routers_that_stay_as_they_are_decide(trainer, both, tmp_path, capsys):
    """With thresholds of their own: one layer is left out for good, and one always kept."""
    run, _ = both
    given = tmp_path / "given"
    calibrated(run, given, threshold=[0.0, 1.0])
    after = tmp_path / "after"
    trainer.train(after, model__routers=given, **ALONE)
    said = capsys.readouterr().out
    assert f"warning: the routers in {given} were trained with adapters" in said
    assert "training lora (" in said
    assert "routers as they are, attn_token on layers [1, 2]" in said
    for line in metrics(after):
        assert line["capacity"] == [1.0, 0.0]
        assert line["penalty"] == 0.0
    manifest = json.loads((after / "step_00000006" / "megatron_mod.json").read_text())
    assert manifest["routing"]["threshold"] == [0.0, 1.0]
    theirs, ours = tensors(run), tensors(after)
    routers = [key for key in ours if key.startswith("decoder.") and ".lora." not in key]
    assert len(routers) == 2 * 5
    assert all(torch.equal(ours[key], theirs[f"average.{key}"]) for key in routers)
    assert not any("optimizer" in key and ".lora." not in key for key in ours)
    shutil.rmtree(given)  # what a run goes on with is in it
    trainer.train(after, train__steps=8, **ALONE)


def calibrated(run: Path, to: Path, *, threshold: list[float]) -> None:
    """The newest step of a run with other thresholds, as calibration leaves it."""
    from megatron_mod.checkpoint.manifest import MANIFEST, manifest_text, resolve_step

    shutil.copytree(resolve_step(run), to)
    manifest = json.loads((to / MANIFEST).read_text())
    manifest["routing"]["threshold"] = threshold
    (to / MANIFEST).write_text(manifest_text(manifest))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "there are no routers to stay as they are"),
        ({"router__layers": "[1]"}, r"router.layers = \[1\]: the routers in .* have \(1, 2\)"),
        ({"router__stand_in": "none"}, "router.stand_in = none: the routers in .* have 16"),
        ({"router__granularity": "mlp_token"}, "router.granularity = mlp_token: the routers in"),
        ({"router__threshold": 0.3}, "router.threshold = 0.3: the routers in .* have 0.5"),
    ],
)
def test_settings_of_routers_that_stay_are_theirs(trainer, both, tmp_path, settings, message):
    given = {"model__routers": both[0]} if settings else {}
    with pytest.raises(ValueError, match=message):
        trainer.train(tmp_path / "run", **{**ALONE, **given, **settings})
    if settings:
        same = {"router__granularity": "attn_token", "router__layers__deepest": 2}
        trainer.train(tmp_path / "run", **{**ALONE, **given, **same, "train__steps": 0})


def test_the_frozen_prefix_ends_at_the_first_adapters(trainer, tmp_path, capsys):
    settings = {
        **WITH, "router__layers__deepest": 1, "train__steps": 2, "lora__dropout": 0,
        "lora__targets": "[q_proj,down_proj]",
    }  # fmt: skip
    losses = []
    for name, prefix in (("recompute", {}), ("cache", {"train__prefix_cache": tmp_path / "kept"})):
        prefix = {"train__frozen_prefix": name, **prefix}
        trainer.train(tmp_path / name, **settings, **prefix)
        losses.append([line["loss"] for line in metrics(tmp_path / name)])
    said = capsys.readouterr().out
    assert "what enters layer 1, the first with adapters, is read from the prefix cache" in said
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    every = {"lora__layers": "all", "train__frozen_prefix": "cache"}
    with pytest.raises(ValueError, match=r"layer 0 has adapters \(lora.layers\)"):
        trainer.train(tmp_path / "none", **{**settings, **every})


def test_no_routers_are_known_as_such():
    assert NO_ROUTERS.places == ()
    assert RoutingConfig.from_dict(json.loads(json.dumps(NO_ROUTERS.to_dict()))) == NO_ROUTERS


def test_experts_have_no_adapters():
    base, mixture = (
        family_of(SHAPES[name]).architecture_of(SHAPES[name]) for name in ("tiny", "olmoe-1b-7b")
    )
    require_projections(tuple(TARGETS), list(base.projections))
    require_projections(("q_proj", "o_proj"), list(mixture.projections))
    with pytest.raises(ValueError, match=r"^lora.targets: gate_proj, up_proj, down_proj: are proj"):
        require_projections(tuple(TARGETS), list(mixture.projections))
    attention = ("q_proj", "k_proj", "v_proj", "o_proj")
    for names in ([], ["--lora.targets=all-linear"]):
        lora = parse("--lora.rank=8", "--train.trainable=routers+lora", *names).lora
        resolved = lora.resolve(num_layers=16, projections=list(mixture.projections))
        assert resolved.targets == attention
