"""Biases and stand-ins of a training, through checkpoints, both converters and the export."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from megatron_mod.checkpoint.manifest import MANIFEST, manifest_text
from megatron_mod.conversion import convert
from megatron_mod.conversion.restore import restore_model
from megatron_mod.conversion.routers import read_routers, read_source, write_published, write_step
from megatron_mod.conversion.source import open_base, open_source
from megatron_mod.evaluation.huggingface import load_model
from megatron_mod.parallel.topology import Topology
from megatron_mod.routing.config import RoutingConfig
from tests.helpers.broken import edit_config, edit_tensors, put
from tests.helpers.runs import Trainer
from tests.helpers.tools import run_tool

pytestmark = pytest.mark.usefixtures("single_process")
RANK = 3
SETTINGS = {
    "router__granularity": "attn_token", "router__pooling": None, "router__bias": "true",
    "router__init": "importance", "router__stand_in": "linear", "router__stand_in_rank": RANK,
    "router__capacity_loss_weight": "auto", "train__trainable": "routers+stand_ins",
}  # fmt: skip
WEIGHTS, PARTS = "model.safetensors", ("down.weight", "up.weight", "up.bias")


@pytest.fixture(scope="module")
def trainer(tmp_path_factory, single_process):
    """With a run that trained biases and stand-ins, and its export."""
    trainer = Trainer(tmp_path_factory.mktemp("trainer"))
    trainer.train(trainer.folder / "run", **SETTINGS, train__steps=3)
    convert.megatron_to_hf(trainer.folder / "run", trainer.folder / "export")
    return trainer


@pytest.fixture(scope="module")
def added(trainer):
    """What the run has beside its base."""
    return read_source(open_source(trainer.folder / "run"))[1]


def assert_equal(one, other) -> None:
    for layer, own in one.items():
        assert set(own) == set(other[layer])
        assert all(torch.equal(tensor, other[layer][name]) for name, tensor in own.items())


def test_training_leaves_something_to_compare(added):
    names = {"router.weight", "router.bias", *(f"stand_in.{n}" for n in PARTS)}
    assert all(set(own) == names for own in added.values())
    assert all(tensor.any() for own in added.values() for tensor in own.values())


def test_every_tensor_arrives_in_the_export(trainer, added):
    tensors = load_file(trainer.folder / "export" / WEIGHTS)
    assert len(tensors) == len(load_file(trainer.hf / WEIGHTS)) + 2 * 5
    for layer, own in added.items():
        for name, tensor in own.items():
            assert torch.equal(tensors[f"model.layers.{layer}.{name}"], tensor)
    routing = json.loads((trainer.folder / "export" / "config.json").read_text())["routing"]
    assert (routing["bias"], routing["stand_in_rank"]) == (True, RANK)


def test_the_export_computes_what_the_run_does(trainer, monkeypatch, tmp_path):
    pair = ("--load", trainer.folder / "run", "--hf-path", trainer.folder / "export")
    found = tmp_path / "found.json"
    assert run_tool(monkeypatch, "compare_logits.py", *pair, "--json", found) == 0
    assert json.loads(found.read_text())[0]["max_rel"] < 2e-5


def test_both_converters_and_training_take_them_up(trainer, added, tmp_path):
    run = trainer.folder / "run"
    convert.hf_to_megatron(trainer.hf, tmp_path / "routed", routers_path=run)
    convert.megatron_to_hf(tmp_path / "routed", tmp_path / "one")
    convert.megatron_to_hf(trainer.base, tmp_path / "two", routers_path=run)
    export = (trainer.folder / "export" / WEIGHTS).read_bytes()
    for name in ("one", "two"):
        assert (tmp_path / name / WEIGHTS).read_bytes() == export
    changes = {**SETTINGS, "train__steps": 0}
    trainer.train(tmp_path / "beside", **changes, model__checkpoint=tmp_path / "routed")
    trainer.train(tmp_path / "given", **changes, model__routers=run)
    for name in ("beside", "given"):
        assert_equal(read_source(open_source(tmp_path / name))[1], added)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_stand_ins_have_the_models_dtype_and_routers_fp32(trainer, added, tmp_path, dtype):
    convert.megatron_to_hf(trainer.folder / "run", tmp_path / "export", dtype=dtype)
    tensors, dtype = load_file(tmp_path / "export" / WEIGHTS), getattr(torch, dtype)
    assert {t.dtype for n, t in tensors.items() if ".router." not in n} == {dtype}
    for layer, own in added.items():
        for name, tensor in own.items():
            found = tensors[f"model.layers.{layer}.{name}"]
            assert torch.equal(found, tensor if name.startswith("router.") else tensor.to(dtype))


def test_a_stand_in_too_large_for_the_dtype_is_named(trainer, added, tmp_path):
    large = {k: {n: t.clone() for n, t in own.items()} for k, own in added.items()}
    large[2]["stand_in.up.bias"][0] = 1e6
    step = save_step(trainer, tmp_path / "step", large)
    with pytest.raises(ValueError, match=r"--dtype float16: model.layers.2.stand_in.up.bias holds"):
        convert.megatron_to_hf(step, tmp_path / "export", dtype="float16")


def test_room_is_asked_for_them(trainer, added, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(convert, "require_room", lambda _, size, **__: asked.append(size))
    plain = {layer: {"router.weight": own["router.weight"]} for layer, own in added.items()}
    for number, (tensors, changes) in enumerate(
        ((plain, {"bias": False, "stand_in_rank": None}), (added, {}))
    ):
        step = save_step(trainer, tmp_path / f"step{number}", tensors, **changes)
        convert.megatron_to_hf(step, tmp_path / f"export{number}")
        convert.hf_to_megatron(trainer.hf, tmp_path / f"base{number}", routers_path=step)
    convert.hf_to_megatron(trainer.hf, tmp_path / "base")
    nbytes = sum(t.nbytes for own in added.values() for n, t in own.items() if n != "router.weight")
    assert asked[2] - asked[0] >= nbytes
    assert asked[3] - asked[1] >= nbytes
    assert asked[1] - asked[4] >= sum(t.nbytes for own in plain.values() for t in own.values())


# What is wrong with them


def save_step(trainer, folder, tensors, **changes):
    base = open_base(trainer.base)
    settings = {"layers": (1, 2), "capacity": (0.5, 0.5), "bias": True, "stand_in_rank": RANK}
    routing = RoutingConfig("attn_token", **{**settings, **changes})
    where = {"base": str(trainer.base.resolve()), "fingerprint": base.fingerprint()}
    write_step(folder, routing, tensors, **where)
    return folder


def without(own, name):
    return {key: tensor for key, tensor in own.items() if key != name}


WRONG = {
    "stand-in missing": (
        lambda own: without(own, "stand_in.up.weight"), "decoder.layers.2.stand_in.up.weight"
    ),
    "bias missing": (lambda own: without(own, "router.bias"), "decoder.layers.2.router.bias"),
    "too much": (
        lambda own: {**own, "stand_in.down.bias": torch.zeros(1)},
        "decoder.layers.2.stand_in.down.bias",
    ),
    "another rank": (
        lambda own: {**own, "stand_in.down.weight": torch.zeros(RANK + 1, 32)},
        r"stand_in.down.weight of layer 2 has shape \(4, 32\) instead of \(3, 32\)",
    ),
    "another width": (
        lambda own: {**own, "stand_in.up.bias": torch.zeros(16)},
        r"stand_in.up.bias of layer 2 has shape \(16,\) instead of \(32,\)",
    ),
    "two biases": (
        lambda own: {**own, "router.bias": torch.zeros(2)},
        r"router.bias of layer 2 has shape \(2,\) instead of \(1,\)",
    ),
    "NaN": (
        lambda own: {**own, "stand_in.up.weight": torch.full((32, RANK), torch.nan)},
        "decoder.layers.2.stand_in.up.weight holds NaN or infinity",
    ),
    "infinity": (
        lambda own: {**own, "router.bias": torch.tensor([torch.inf])},
        "decoder.layers.2.router.bias holds NaN or infinity",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_what_does_not_fit_is_named_wherever_it_is_read(trainer, added, tmp_path, name):
    change, message = WRONG[name]
    step = save_step(trainer, tmp_path / "step", {**added, 2: change(added[2])})
    for convert_it in (
        lambda: convert.megatron_to_hf(step, tmp_path / "out"),
        lambda: convert.megatron_to_hf(trainer.base, tmp_path / "out", routers_path=step),
        lambda: convert.hf_to_megatron(trainer.hf, tmp_path / "out", routers_path=step),
        lambda: convert.export_routers(step, tmp_path / "out"),
        lambda: trainer.train(tmp_path / "run", **SETTINGS, model__routers=step),
    ):
        with pytest.raises(ValueError, match=message):
            convert_it()
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", [name for name in WRONG if name != "too much"])
def test_a_model_is_not_restored_from_what_does_not_fit(trainer, added, tmp_path, name):
    step = save_step(trainer, tmp_path / "step", {**added, 2: WRONG[name][0](added[2])})
    faults = r"(has no {0}\.|{0} has shape .* is needed|{0} holds NaN or infinity)"
    message = faults.format(r"decoder\.layers\.2\.(stand_in|router)\.[a-z.]+")
    with pytest.raises(ValueError, match=message):
        restore_model(open_source(step), Topology(tensor=1, pipeline=1, data=1))


UP = "model.layers.2.stand_in.up.weight"
DAMAGES = {
    "missing": (lambda f: edit_tensors(f, UP), f"1 tensors are missing: {UP}"),
    "NaN": (lambda f: put(f, UP, float("nan")), f"{WEIGHTS}: {UP} holds NaN or infinity"),
    "bias missing": (
        lambda f: edit_tensors(f, "model.layers.2.router.bias"),
        "1 tensors are missing: model.layers.2.router.bias",
    ),
    "another shape": (
        lambda f: edit_tensors(f, **{UP: torch.zeros(32, 2)}),
        f"1 tensors are of another shape than its config.json describes: {UP}",
    ),
    "a bias nobody has": (
        lambda f: edit_tensors(f, **{"model.layers.2.stand_in.down.bias": torch.zeros(3)}),
        "unknown to the model its config.json describes: model.layers.2.stand_in.down.bias",
    ),
}


def copy_export(trainer, folder):
    shutil.copytree(trainer.folder / "export", folder)
    (folder / "checksums.json").unlink()
    return folder


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_export_is_one_message(trainer, tmp_path, name):
    damage, message = DAMAGES[name]
    damage(folder := copy_export(trainer, tmp_path / "export"))
    with pytest.raises(ValueError, match=message):
        load_model(folder)


@pytest.mark.parametrize(
    ("field", "value"),
    [("bias", "yes"), ("bias", 1), *(("stand_in_rank", v) for v in ("x", 0, -3, 1.5, True, [3]))],
)
def test_a_routing_entry_that_says_nonsense_is_refused(trainer, tmp_path, field, value):
    folder = copy_export(trainer, tmp_path / "export")
    routing = json.loads((folder / "config.json").read_text())["routing"]
    edit_config(folder, routing={**routing, field: value})
    with pytest.raises(ValueError, match=rf"config.json: routing.{field} = .*: must be "):
        load_model(folder)


# Of before there were any


def test_exports_and_runs_of_before_are_read(trainer, tmp_path):
    trainer.train(tmp_path / "run", train__steps=2)
    convert.megatron_to_hf(tmp_path / "run", tmp_path / "export")
    expected = load_file(tmp_path / "export" / WEIGHTS)
    (step,) = [p for p in (tmp_path / "run").iterdir() if p.name == "step_00000002"]
    manifest = json.loads((step / MANIFEST).read_text())
    config = json.loads((tmp_path / "export" / "config.json").read_text())
    for routing in (manifest["routing"], config["routing"]):
        assert routing.pop("bias") is False
        assert routing.pop("stand_in_rank") is None
    (step / MANIFEST).write_text(manifest_text(manifest))
    convert.megatron_to_hf(tmp_path / "run", tmp_path / "again")
    again = load_file(tmp_path / "again" / WEIGHTS)
    assert set(again) == set(expected)
    assert all(torch.equal(tensor, again[name]) for name, tensor in expected.items())
    (tmp_path / "export" / "checksums.json").unlink()
    (tmp_path / "export" / "config.json").write_text(json.dumps(config))
    ids = torch.arange(3, 15)[None]
    with torch.no_grad():
        old, new = (load_model(tmp_path / name)(ids).logits for name in ("export", "again"))
    assert torch.equal(old, new)


# The published format


def test_equal_biases_become_part_of_the_threshold(trainer, tmp_path):
    generator = torch.Generator().manual_seed(9)
    own = [
        {"router.weight": torch.randn(1, 32, generator=generator), "router.bias": torch.tensor([b])}
        for b in (0.75, 0.75)
    ]
    settings = {"stand_in_rank": None, "threshold": 0.4}
    step = save_step(trainer, tmp_path / "step", dict(zip((1, 2), own, strict=True)), **settings)
    convert.export_routers(step, tmp_path / "published")
    routing, found = read_routers(tmp_path / "published", open_base(trainer.base).arch)
    assert not routing.bias
    assert routing.logit_border(routing.places[0]) == pytest.approx(
        torch.logit(torch.tensor(0.4)).item() - 0.75
    )
    assert all(set(added) == {"router.weight"} for added in found.values())
    for name, routers in (("biased", step), ("plain", tmp_path / "published")):
        convert.megatron_to_hf(trainer.base, tmp_path / name, routers_path=routers)
    ids = torch.arange(3, 40)[None]
    decisions = []
    for name in ("biased", "plain"):
        model = load_model(tmp_path / name)
        with torch.no_grad():
            model(ids)
        decisions.append(torch.cat([d[0] for d in model.model.record.decisions.values()]))
    assert torch.equal(*decisions)
    assert 0 < decisions[0].float().mean() < 1


def test_what_the_published_format_cannot_say_is_refused(trainer, added, tmp_path):
    with pytest.raises(ValueError, match=r"stand-in, .* router.stand_in none, or export the whole"):
        convert.export_routers(trainer.folder / "run", tmp_path / "published")
    biased = {k: {n: own[n] for n in ("router.weight", "router.bias")} for k, own in added.items()}
    assert not torch.equal(biased[1]["router.bias"], biased[2]["router.bias"])
    step = save_step(trainer, tmp_path / "step", biased, stand_in_rank=None)
    with pytest.raises(ValueError, match=r"biases or thresholds differ.*router.bias false"):
        convert.export_routers(step, tmp_path / "published")
    assert not (tmp_path / "published").exists()


@pytest.mark.parametrize("name", ["router.bias", "stand_in.up.weight"])
def test_a_published_folder_with_more_than_the_format_has_is_refused(
    trainer, added, tmp_path, name
):
    (folder := tmp_path / "published").mkdir()
    routing = RoutingConfig("attn_token", (1, 2), (0.5, 0.5))
    config = json.loads((trainer.hf / "config.json").read_text())
    weights = {layer: {"router.weight": own["router.weight"]} for layer, own in added.items()}
    write_published(folder, routing, weights, config)
    edit_tensors(folder, **{f"model.layers.1.{name}": torch.zeros(1)})
    with pytest.raises(ValueError, match=f"model.layers.1.{name}: the published format has no"):
        convert.megatron_to_hf(trainer.base, tmp_path / "out", routers_path=folder)
