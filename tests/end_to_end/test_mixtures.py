"""Mixtures of experts between Hugging Face and Megatron: not one element of one expert is lost."""

from __future__ import annotations

import shutil
import weakref
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from megatron_mod.checkpoint.distributed import load_tensors
from megatron_mod.checkpoint.manifest import STATE
from megatron_mod.conversion import convert
from megatron_mod.conversion.hf_reader import HFReader
from megatron_mod.conversion.source import open_base
from tests.distributed import cases
from tests.helpers import tiny
from tests.helpers.broken import WEIGHTS, edit_config, edit_tensors, put
from tests.helpers.fused import fuse
from tests.helpers.thinned import pairs

pytestmark = pytest.mark.usefixtures("single_process")

LAYOUTS = ("one an expert", "fused")
PARTS = ("gate", "gate projection", "up projection", "down projection")
LAYER = "model.layers.2"
OURS = "decoder.layers.2.mlp"
_OWN = {"mlp": ("gate_proj", "up_proj", "down_proj"), "block_sparse_moe": ("w1", "w3", "w2")}


def names_of(family: str, expert: int) -> tuple[str, ...]:
    """``PARTS`` of an expert, by Hugging Face's names."""
    block = "block_sparse_moe" if family == "mixtral" else "mlp"
    experts = (f"{LAYER}.{block}.experts.{expert}.{own}.weight" for own in _OWN[block])
    return (f"{LAYER}.{block}.gate.weight", *experts)


@pytest.fixture(scope="module", params=list(tiny.MIXTURES))
def family(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def models(tmp_path_factory, family, single_process) -> dict[str, Path]:
    """A folder of each layout, and what the first became in Megatron."""
    root = tmp_path_factory.mktemp(family)
    kind, changes = tiny.MIXTURES[family]
    hf = tiny.save_model(root / "hf", kind, **changes)
    convert.hf_to_megatron(hf, root / "megatron")
    return {LAYOUTS[0]: hf, LAYOUTS[1]: fuse(hf, root / "fused"), "megatron": root / "megatron"}


def state(base: Path) -> dict[str, torch.Tensor]:
    return load_tensors(base / STATE)


def changed(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> dict[str, list]:
    """Where tensors differ, by name."""
    assert before.keys() == after.keys()
    found = {name: (after[name] != tensor).nonzero().tolist() for name, tensor in before.items()}
    return {name: where for name, where in found.items() if where}


def test_both_layouts_become_one_model_in_megatron_and_back_in_the_names_of_both_releases(
    models, tmp_path
):
    hf, fused = (models[layout] for layout in LAYOUTS)
    convert.hf_to_megatron(fused, tmp_path / "megatron")
    assert not changed(state(models["megatron"]), state(tmp_path / "megatron"))
    for source in (tmp_path / "megatron", fused):
        convert.megatron_to_hf(source, tmp_path / f"back_{source.name}")
        original, back = (load_file(f / WEIGHTS) for f in (hf, tmp_path / f"back_{source.name}"))
        assert not changed(original, back)


@pytest.mark.skipif(
    int(transformers.__version__.split(".")[0]) < 5, reason="4.57 has one tensor an expert only"
)
def test_the_fused_layout_is_that_of_transformers(models, tmp_path):
    hf, fused = (models[layout] for layout in LAYOUTS)
    model = transformers.AutoModelForCausalLM.from_pretrained(hf)
    model.save_pretrained(tmp_path / "fused", save_original_format=False)
    assert not changed(load_file(fused / WEIGHTS), load_file(tmp_path / "fused" / WEIGHTS))


@pytest.mark.parametrize(("part", "layout"), pairs(2, PARTS, LAYOUTS))
def test_one_element_arrives(models, family, tmp_path, layout, part):
    """In Megatron's checkpoint where it belongs and nowhere else, in its logits, and back."""
    expert = 2
    name = names_of(family, expert)[PARTS.index(part)]
    hf = shutil.copytree(models[LAYOUTS[0]], tmp_path / "hf")
    tensors = load_file(hf / WEIGHTS)
    row, column = tensors[name].shape[0] - 2, tensors[name].shape[1] - 3
    tensors[name][row, column] += 4.0
    save_file(tensors, hf / WEIGHTS, metadata={"format": "pt"})
    source = hf if layout == LAYOUTS[0] else fuse(hf, tmp_path / "fused")
    convert.hf_to_megatron(source, tmp_path / "megatron")

    ours = {
        "gate": f"{OURS}.router.weight",
        "down projection": f"{OURS}.experts.experts.{expert}.linear_fc2.weight",
    }.get(part, f"{OURS}.experts.experts.{expert}.linear_fc1.weight")
    first = tensors[name].shape[0] if part == "up projection" else 0
    found = changed(state(models["megatron"]), state(tmp_path / "megatron"))
    assert found == {ours: [[first + row, column]]}
    convert.megatron_to_hf(tmp_path / "megatron", tmp_path / "back")
    assert not changed(tensors, load_file(tmp_path / "back" / WEIGHTS))

    pairs = [(hf, tmp_path / "megatron"), (models[LAYOUTS[0]], source)]
    same, other = (
        next(iter(cases.logit_differences([pair], [{}], 128, cases.routing_config()).values()))
        for pair in pairs
    )
    assert same <= 2e-5 < 1e-3 < other


BOTH, DOWN = f"{LAYER}.mlp.experts.gate_up_proj", f"{LAYER}.mlp.experts.down_proj"
SHARED = f"{LAYER}.mlp.shared_expert.up_proj.weight"
DAMAGES = {
    "an expert's projection missing": (
        LAYOUTS[0], lambda f, own: edit_tensors(f, own[3]),
        lambda own: f"1 tensors are missing: {own[3]}",
    ),
    "the gate missing": (
        LAYOUTS[0], lambda f, own: edit_tensors(f, own[0]),
        lambda own: f"1 tensors are missing: {own[0]}",
    ),
    "an expert too many": (
        LAYOUTS[0],
        lambda f, own: edit_tensors(f, **{own[1].replace(".3.", ".4."): torch.zeros(24, 32)}),
        lambda own: f"1 tensors have no place in {{}}: {own[1].replace('.3.', '.4.')}",
    ),
    "a shared expert": (
        LAYOUTS[0],
        lambda f, own: edit_tensors(f, **{SHARED: torch.zeros(3)}),
        lambda own: f"1 tensors have no place in {{}}: {SHARED}",
    ),
    "no number in an expert": (
        LAYOUTS[0], lambda f, own: put(f, own[2], float("nan")),
        lambda own: f"{WEIGHTS}: {own[2]} holds NaN or infinity",
    ),
    "an expert of another shape": (
        LAYOUTS[0], lambda f, own: edit_tensors(f, **{own[3]: torch.zeros(32, 23)}),
        lambda own: f"{own[3]}: shape (32, 23) instead of (32, 24)",
    ),
    "both layouts": (
        LAYOUTS[1], lambda f, own: edit_tensors(f, **{own[1]: torch.zeros(24, 32)}),
        lambda own: f"holds what {own[1]} holds too",
    ),
    "fused experts missing": (
        LAYOUTS[1], lambda f, own: edit_tensors(f, DOWN),
        lambda own: f"1 tensors are missing: {DOWN}",
    ),
    "fused experts too many": (
        LAYOUTS[1], lambda f, own: edit_tensors(f, **{BOTH: torch.zeros(5, 48, 32)}),
        lambda own: f"{BOTH}: shape (5, 48, 32) instead of (4, 48, ",
    ),
    "fused experts of a narrower model": (
        LAYOUTS[1], lambda f, own: edit_tensors(f, **{BOTH: torch.zeros(4, 48, 31)}),
        lambda own: "shape (24, 31) instead of (24, 32)",
    ),
    "no number in fused experts": (
        LAYOUTS[1], lambda f, own: put(f, DOWN, float("inf")),
        lambda own: f"{WEIGHTS}: {DOWN} holds NaN or infinity",
    ),
    "fewer experts by config.json": (
        LAYOUTS[0],
        lambda f, own: edit_config(f, "num_local_experts", num_experts=3),
        lambda own: "experts.3.",
    ),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_what_is_not_exactly_the_model_is_named(models, family, tmp_path, damage):
    layout, breaks, says = DAMAGES[damage]
    hf = shutil.copytree(models[layout], tmp_path / "hf")
    own = names_of(family, tiny.EXPERTS - 1)
    breaks(hf, own)
    with pytest.raises(ValueError) as caught:
        convert.hf_to_megatron(hf, tmp_path / "out" / "megatron")
    assert says(own).format(open_base(models["megatron"]).family.architecture) in str(caught.value)
    assert not list((tmp_path / "out").glob("*"))


def test_an_expert_in_two_files_is_named(models, family, tmp_path):
    hf = shutil.copytree(models[LAYOUTS[0]], tmp_path / "hf")
    (hf / WEIGHTS).rename(hf / "a.safetensors")
    name = names_of(family, 1)[2]
    save_file({name: load_file(hf / "a.safetensors")[name]}, hf / "b.safetensors")
    with pytest.raises(ValueError) as caught:
        convert.hf_to_megatron(hf, tmp_path / "megatron")
    assert f"b.safetensors: {name} is in a.safetensors too" in str(caught.value)


def test_a_flipped_byte_of_an_expert_is_named_by_its_file(models, tmp_path):
    """Each of Megatron's experts has files of its own."""
    base = shutil.copytree(models["megatron"], tmp_path / "base")
    name = f"{OURS}.experts.experts.1.linear_fc2.weight"
    wanted = state(base)[name].flatten().numpy().tobytes()
    (file,) = (f for f in (base / STATE).glob("*.distcp") if wanted in f.read_bytes())
    data = bytearray(file.read_bytes())
    data[data.index(wanted) + 5] ^= 1
    file.write_bytes(data)
    with pytest.raises(ValueError, match=f"{file.name}.*damaged"):
        convert.megatron_to_hf(base, tmp_path / "back")
    assert not (tmp_path / "back").exists()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_conversion_holds_a_few_tensors_and_never_a_layers_experts(
    tmp_path, layout, family, monkeypatch
):
    """Of wide experts, whose fused tensor is most of the model."""
    kind, changes = tiny.MIXTURES[family]
    wide = {n: 512 for n in ("intermediate_size", "moe_intermediate_size") if n in changes}
    hf = tiny.save_model(tmp_path / "hf", kind, **{**changes, **wide}, num_hidden_layers=1)
    if layout == LAYOUTS[1]:
        hf = fuse(hf, tmp_path / "fused")
    now, read, held = [0], [], []

    def let_go(size: int) -> None:
        now[0] -= size

    for name in ("rows", "tensor"):
        whole = getattr(HFReader, name)

        def watched(self, *args, whole=whole):
            size = (made := whole(self, *args)).nbytes
            weakref.finalize(made, let_go, size)
            now[0] += size
            read.append(size)
            held.append(now[0])
            return made

        monkeypatch.setattr(HFReader, name, watched)
    convert.hf_to_megatron(hf, tmp_path / "megatron")
    projection = 512 * 32 * 4  # bytes
    assert max(read) == projection
    assert max(held) <= 3 * projection, "one expert's two, and the next before they are let go"
