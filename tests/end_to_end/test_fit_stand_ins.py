"""Stand-ins solved by the tool: at every layout of ranks, and what starts from its folder."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from megatron_mod.checkpoint.manifest import read_manifest, resolve_step
from megatron_mod.config.options import parse_options
from megatron_mod.config.stand_ins import StandInRequest
from megatron_mod.conversion.convert import megatron_to_hf
from megatron_mod.conversion.routers import read_routers, read_step
from megatron_mod.conversion.source import open_base, open_source
from megatron_mod.parallel.topology import ONE_RANK
from megatron_mod.routing.config import RoutingConfig
from tests.helpers.ranks import meet, run_ranks
from tests.helpers.runs import Trainer

pytestmark = pytest.mark.usefixtures("single_process")
LAYERS = ("--layers", "{deepest: 2}")
ROUTED = {
    "router__granularity": "attn_token", "router__bias": "true", "router__init": "importance",
    "router__stand_in": "linear", "router__pooling": None, "router__capacity_loss_weight": "auto",
}  # fmt: skip
TOPOLOGIES = [{"tensor": 2}, {"pipeline": 2}, {}]  # the rest: data


def fit(load: Path, data: Path, save: Path, *options: str, ranks=ONE_RANK) -> Path:
    """What the command does once ranks have met."""
    from megatron_mod.calibration.stand_ins import make_stand_ins

    arguments = ["--load", str(load), "--data", str(data), "--save", str(save), *options]
    make_stand_ins(parse_options(StandInRequest, arguments), ranks)
    return save


def fit_on_ranks(base: Path, data: Path, folder: Path) -> None:
    for number, topology in enumerate(TOPOLOGIES):
        options = [f"--{name}={degree}" for name, degree in topology.items()]
        fit(base, data, folder / str(number), *LAYERS, *options, ranks=meet(**topology))


def added(step: Path) -> dict[int, dict[str, torch.Tensor]]:
    step = resolve_step(step)
    return read_step(step, RoutingConfig.from_dict(read_manifest(step)["routing"]))


def maps(step: Path) -> dict[int, torch.Tensor]:
    """``[H, H + 1]`` of each layer: ``B A`` and ``b``, whatever the signs of the two factors."""
    return {
        layer: torch.cat(
            (
                own["stand_in.up.weight"] @ own["stand_in.down.weight"],
                own["stand_in.up.bias"][:, None],
            ),
            1,
        )
        for layer, own in added(step).items()
    }


def assert_same(found: Path, expected: Path) -> None:
    found, expected = maps(found), maps(expected)
    assert found.keys() == expected.keys()
    for layer, wanted in expected.items():
        assert wanted.abs().max() > 0.01
        torch.testing.assert_close(found[layer], wanted, rtol=1e-4, atol=1e-5)


@pytest.fixture(scope="module")
def trainer(tmp_path_factory, single_process):
    return Trainer(tmp_path_factory.mktemp("trainer"))


@pytest.fixture(scope="module")
def fitted(trainer):
    return fit(trainer.base, trainer.text, trainer.folder / "fitted", *LAYERS)


def test_every_layout_of_ranks_finds_the_same(trainer, fitted, tmp_path):
    run_ranks(fit_on_ranks, trainer.base, trainer.text, tmp_path, world=2, folder=tmp_path / "job")
    for number, _ in enumerate(TOPOLOGIES):
        assert_same(tmp_path / str(number), fitted)


def test_a_hugging_face_folder_serves_as_well_as_its_conversion(trainer, fitted, tmp_path):
    assert_same(fit(trainer.hf, trainer.text, tmp_path / "fit", *LAYERS), fitted)
    assert open_source(tmp_path / "fit").base.kind == "huggingface"


def test_a_checkpoint_of_megatron_lm_needs_its_hugging_face_folder(trainer, fitted, tmp_path):
    theirs = tmp_path / "iter_0000001"
    shutil.copytree(trainer.base / "state", theirs)
    with pytest.raises(ValueError, match="set --hf-path to a Hugging Face folder"):
        fit(theirs, trainer.text, tmp_path / "fit", *LAYERS)
    beside = ("--hf-path", str(trainer.hf))
    assert_same(fit(theirs, trainer.text, tmp_path / "fit", *LAYERS, *beside), fitted)
    assert open_source(tmp_path / "fit").base.huggingface == trainer.hf


def test_the_map_is_the_ridge_regression_of_the_attention(trainer, tmp_path):
    hidden = open_base(trainer.base).arch.hidden_size
    whole = fit(trainer.base, trainer.text, tmp_path / "fit", *LAYERS, f"--rank={hidden}")
    expected = numpy_solution(trainer, layers=(1, 2))
    for layer, found in maps(whole).items():
        assert found.shape == (hidden, hidden + 1)
        np.testing.assert_allclose(found.numpy(), expected[layer], rtol=1e-3, atol=1e-4)


def numpy_solution(trainer: Trainer, *, layers: tuple[int, ...]) -> dict[int, np.ndarray]:
    """``Y ~ W X + b`` of Transformers' model, tokens weighed by what the stream's norm does."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from megatron_mod.data.dataset import load_samples
    from megatron_mod.training.stand_ins import RIDGE

    model = AutoModelForCausalLM.from_pretrained(trainer.hf, dtype=torch.float64).eval()
    tokenizer = AutoTokenizer.from_pretrained(trainer.hf)
    seen: dict[int, list] = {layer: [] for layer in layers}

    def watch(layer: int):
        def hook(module, inputs, kwargs, output):
            stream = inputs[0] if inputs else kwargs["hidden_states"]
            read = module.input_layernorm(stream)
            seen[layer].append([stream[0], read[0], attention[layer][0]])

        return hook

    attention: dict[int, torch.Tensor] = {}
    for layer in layers:
        block = model.model.layers[layer]
        block.self_attn.register_forward_hook(
            lambda module, inputs, output, layer=layer: attention.update({layer: output[0]})
        )
        block.register_forward_hook(watch(layer), with_kwargs=True)
    with torch.no_grad():
        for sample in load_samples(trainer.text, tokenizer, max_length=128):
            model(torch.tensor([sample.ids]))
    found = {}
    for layer, parts in seen.items():
        stream, x, y = (torch.cat(each).numpy() for each in zip(*parts, strict=True))
        weight = 1 / np.mean(stream**2, axis=1, keepdims=True)
        weight = weight / weight.sum()
        mean_x, mean_y = (weight * x).sum(0), (weight * y).sum(0)
        x, y = x - mean_x, y - mean_y
        xx, yx = x.T @ (weight * x), y.T @ (weight * x)
        w = yx @ np.linalg.inv(xx + RIDGE * np.trace(xx) / len(xx) * np.eye(len(xx)))
        found[layer] = np.concatenate((w, (mean_y - w @ mean_x)[:, None]), axis=1)
    return found


def test_a_training_keeps_them_and_measures_what_its_layers_are_worth(
    trainer, fitted, tmp_path, capsys
):
    settings = {**ROUTED, "train__steps": 0, "model__routers": fitted}
    trainer.train(tmp_path / "run", **settings)
    said = capsys.readouterr().out
    assert "fitted on" not in said
    assert "cost of leaving a layer out" in said
    before, after = added(fitted), added(tmp_path / "run")
    for layer, own in after.items():
        assert not own["router.weight"].any()
        for name in ("stand_in.up.weight", "stand_in.down.weight", "stand_in.up.bias"):
            assert torch.equal(own[name], before[layer][name])
    biases = [float(own["router.bias"]) for own in after.values()]
    assert min(biases) > 0
    assert len(set(biases)) == 2


def test_a_training_from_trained_routers_measures_nothing(trainer, fitted, tmp_path, capsys):
    trainer.train(tmp_path / "one", **ROUTED, model__routers=fitted, train__steps=2)
    capsys.readouterr()
    trainer.train(tmp_path / "two", **ROUTED, model__routers=tmp_path / "one", train__steps=0)
    assert "cost of leaving" not in capsys.readouterr().out
    one, two = added(tmp_path / "one"), added(tmp_path / "two")
    for layer, own in two.items():
        assert own["router.weight"].any()
        assert all(torch.equal(tensor, one[layer][name]) for name, tensor in own.items())


def test_a_training_on_the_same_samples_solves_the_same(trainer, fitted, tmp_path, capsys):
    trainer.train(tmp_path / "run", **ROUTED, train__steps=0)
    assert "fitted on" in capsys.readouterr().out
    assert_same(tmp_path / "run", fitted)


def test_a_training_with_other_settings_says_so(trainer, fitted, tmp_path):
    settings = {**ROUTED, "train__steps": 0, "model__routers": fitted}
    with pytest.raises(ValueError, match="router.stand_in_rank to 16"):
        trainer.train(tmp_path / "run", **{**settings, "router__stand_in": "none"})
    with pytest.raises(ValueError, match=r"router.granularity = mlp_token: .* have attn_token"):
        trainer.train(tmp_path / "run", **{**settings, "router__granularity": "mlp_token"})


def test_both_ways_to_an_export(trainer, fitted, tmp_path):
    megatron_to_hf(trainer.base, tmp_path / "one", routers_path=fitted)
    megatron_to_hf(fitted, tmp_path / "two")
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    assert all(torch.equal(tensor, two[name]) for name, tensor in one.items())
    for layer, own in added(fitted).items():
        for name, tensor in own.items():
            assert torch.equal(one[f"model.layers.{layer}.{name}"], tensor)


@pytest.mark.parametrize(
    ("granularity", "text"), [("mlp_token", False), ("block_token", False), ("attn_token", True)]
)
def test_as_many_samples_as_are_needed(trainer, tmp_path, granularity, text):
    data = tmp_path / "text.txt" if text else trainer.text
    if text:
        data.write_text("How many tokens are in this text? " * 9)
    fitted = fit(
        trainer.base, data, tmp_path / "fit", *LAYERS, "--tokens=100", "--max-length=40",
        "--granularity", granularity, "--rank=3",
    )  # fmt: skip
    manifest = read_manifest(fitted)
    assert 100 <= manifest["stand_ins"]["tokens"] < 140
    assert all(0 < share < 1 for share in manifest["stand_ins"]["explained"].values())
    routing, found = read_routers(fitted, open_base(trainer.base).arch)
    assert (routing.granularity, routing.stand_in_rank) == (granularity, 3)
    assert all(own["stand_in.down.weight"].shape == (3, 32) for own in found.values())


def test_few_tokens_are_told_and_too_few_refused(trainer, tmp_path, capsys):
    fit(trainer.base, trainer.text, tmp_path / "few", *LAYERS, "--tokens=60")
    assert "are few for a hidden size of 32" in capsys.readouterr().out
    short = tmp_path / "short.txt"
    short.write_text("Too short.")
    with pytest.raises(ValueError, match=r"short.txt: 10 tokens of it .* hidden size of 32"):
        fit(trainer.base, short, tmp_path / "none", *LAYERS)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], r"^--layers.deepest = 16: this model has 4 layers"),
        (["--layers", "[1, 9]"], r"^--layers: \[9\] out of range"),
        ([*LAYERS, "--rank", "33"], r"^--rank = 33: must be at most .* 32"),
        ([*LAYERS, "--max-length", "999"], r"^--max-length 999: the model reads at most 128"),
        ([*LAYERS, "--hf-path", "."], r"^--hf-path = \.: would be ignored"),
    ],
)
def test_what_does_not_fit_leaves_nothing(trainer, tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        fit(trainer.base, trainer.text, tmp_path / "fit", *options)
    assert not list(tmp_path.iterdir())


def test_a_run_is_no_base(fitted, trainer, tmp_path):
    with pytest.raises(ValueError, match="is a training run; .* give its base"):
        fit(fitted, trainer.text, tmp_path / "fit", *LAYERS)
