"""Logits, loss and gradients of local layers and of Transformer Engine's beside the formula.

The formula computes in float64 on the weights as they are, which bfloat16 holds exactly. How far
the local layers are from it in a dtype is what rounding does; Transformer Engine's may not be
further off than some times that.
"""

from __future__ import annotations

import copy
from typing import NamedTuple

import pytest
import torch
from transformers import AutoModelForCausalLM

from megatron_mod.config.lora import TARGETS, LoraSettings
from megatron_mod.conversion.routers import Added
from megatron_mod.routing.scheme import OF_ANY_MODEL
from tests.distributed import cases
from tests.distributed.test_granularities import expected_of, make_case
from tests.gpu.parted import parted
from tests.gpu.where import ALL, layers_of, long_on_cpu
from tests.helpers.training_formula import adapt

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("single_process")]

EXACT, ROUNDING = 1e-4, 1e-6  # relative, of float32: of long sums, and of what is one number
TIMES = 3  # as far from the formula as the local layers in the same dtype
HIDDEN = 256
SHAPE = {
    "hidden_size": HIDDEN, "intermediate_size": 512, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 64, "vocab_size": 131, "initializer_range": 0.07,
    "dtype": torch.bfloat16,
}  # fmt: skip
FAMILIES = {"llama": {}, "mistral": {"sliding_window": 5}, "qwen2": {}, "qwen3": {}}
SCHEMES = [(name, None) for name in OF_ANY_MODEL]
SCHEMES += [(name, "selected") for name in ("attn_token", "block_token", "attn_token+mlp_token")]
LORA = LoraSettings(8, 2.0, 0.0, tuple(TARGETS), (0, 1, 3))
PROJECTIONS = {
    "q_proj": (256, 256), "k_proj": (256, 128), "v_proj": (256, 128), "o_proj": (256, 256),
    "gate_proj": (256, 512), "up_proj": (256, 512), "down_proj": (512, 256),
}  # fmt: skip
MORE = {"bias": True, "stand_in_rank": 3}
BF16, FP32 = torch.bfloat16, torch.float32
VARIANTS = {
    ("local", BF16): {"dtype": BF16},
    ("transformer_engine", BF16): {"dtype": BF16, "implementation": "transformer_engine"},
    ("local", FP32): {},
    # Transformer Engine multiplies float32 as TF32 whatever torch is told.
    ("local", "tf32"): {"precision": "high"},
    ("transformer_engine", FP32): {"implementation": "transformer_engine"},
}
SCALE = {BF16: ("local", BF16), FP32: ("local", "tf32")}


def trainings_of(family: str) -> list[cases.Asked]:
    """Every scheme of a Llama, dense and sparse, and some with biases and stand-ins; a few of the
    other families."""
    asked = []
    for granularity, keys_values in SCHEMES:
        for compute in ("dense", "sparse"):
            routing = {"granularity": granularity, "keys_values": keys_values}
            asked.append((cases.routing_config(**routing, training_compute=compute), "task"))
    added = [
        (cases.routing_config(granularity="attn_token", **MORE), "both"),
        (
            cases.routing_config(
                granularity="mlp_sequence", training_compute="sparse", **MORE
            ),
            "distill",
        ),
        (cases.routing_config(granularity="block_token", keys_values="selected", **MORE), "both"),
    ]  # fmt: skip
    if family == "llama":
        some = [*asked, *added] if ALL else [asked[i] for i in (2, 5)] + added[2:]
        return [*(cases.Asked(*one) for one in some), adapted(cases.Asked(*added[2]))]
    return [cases.Asked(*one) for one in (asked[3], asked[16], asked[19], added[0])]


def adapted(asked: cases.Asked) -> cases.Asked:
    """With adapters on every projection of routed layers and of dense ones."""
    generator, shapes = torch.Generator().manual_seed(31), LORA.shapes(PROJECTIONS)
    adapters = {
        layer: {k: torch.randn(v, generator=generator) / v[1] ** 0.5 for k, v in shapes.items()}
        for layer in LORA.layers
    }
    return asked._replace(lora=LORA, adapters=adapters)


def parted_for(hf, samples: list, asked: cases.Asked, seed: int) -> Added:
    """``parted``, of the model with its adapters."""
    if asked.adapters is not None:
        hf = copy.deepcopy(hf)
        own = {k: {n: t.double() for n, t in its.items()} for k, its in asked.adapters.items()}
        adapt(hf, own, LORA.scale)
    return parted(hf, samples, asked.routing, seed)


class Case(NamedTuple):
    files: tuple  # of make_case
    trainings: list[cases.Asked]
    expected: list[dict]
    found: dict  # (variant, packed) -> training -> what was measured


@pytest.fixture(scope="module")
def case_of(tmp_path_factory, single_process):
    """Of a family, its trainings and what the formula says of them; each made once."""
    made: dict[str, Case] = {}

    def get(family: str) -> Case:
        if family not in made:
            shape = {**SHAPE, **FAMILIES[family]}
            files = make_case(tmp_path_factory.mktemp(family), family, shape)
            hf = AutoModelForCausalLM.from_pretrained(files[0], dtype=torch.float64)
            trainings = [
                asked._replace(added=parted_for(hf, files[2], asked, seed))
                for seed, asked in enumerate(trainings_of(family))
            ]
            expected = [expected_of(files, one, dtype=torch.float64) for one in trainings]
            made[family] = Case(files, trainings, expected, {})
        return made[family]

    return get


def measured(case: Case, variant: tuple, *, packed: bool) -> list[dict]:
    """What the trainings of a case give, in order."""
    if (variant, packed) not in case.found:
        _, base, samples, added = case.files
        topology = {**VARIANTS[variant], "packed": packed, "logits": not packed}
        with layers_of(variant[0]):
            found = cases.gradients(base, samples, added, [topology], case.trainings)
        case.found[variant, packed] = list(found.values())
    return case.found[variant, packed]


def distances(found: dict, wanted: dict) -> dict[str, float]:
    """Relative ones of everything that was measured, of tensors by their norms: a router's bias is
    one of its numbers."""
    pairs: dict[str, list[tuple]] = {}
    for (layer, name), exact in wanted["gradients"].items():
        of = f"layer {layer}, {'router' if 'router' in name else name}"
        pairs.setdefault(of, []).append((found["gradients"][layer, name], exact))
    if found["logits"]:
        pairs["logits"] = list(zip(found["logits"], wanted["logits"], strict=True))
    apart = {}
    for name, both in pairs.items():
        ours, exact = (
            torch.cat([t.double().flatten() for t in s]) for s in zip(*both, strict=True)
        )
        apart[name] = float((ours - exact).norm() / exact.norm())
    for key, of in (("loss", "loss"), ("step_task_loss", "task_loss"), ("task_loss", "task_loss")):
        apart[key] = abs(found[key] / wanted[of] - 1)
    return apart


def check(case: Case, variant: tuple, *, packed: bool) -> None:
    found = measured(case, variant, packed=packed)
    if variant == ("local", FP32):
        scales = None
    else:
        scales = measured(case, SCALE[variant[1]], packed=packed)
    losses = ("loss", "step_task_loss", "task_loss")
    off = [distances(*pair) for pair in zip(found, case.expected, strict=True)]
    if scales is not None:
        known = [distances(*pair) for pair in zip(scales, case.expected, strict=True)]
        # One number's rounding may happen to cancel; that of many numbers does not.
        of_losses = max(one[name] for one in known for name in losses)
    for number, (asked, wanted) in enumerate(zip(case.trainings, case.expected, strict=True)):
        what = (variant, packed, asked.routing, asked.loss)
        assert 0 < min(wanted["capacity"]) <= max(wanted["capacity"]) < 1, what
        for name in ("capacity", "evaluated_capacity"):
            assert found[number][name] == pytest.approx(wanted["capacity"]), what
        assert found[number]["frozen_changed"] == 0
        for name, distance in off[number].items():
            most = EXACT
            if scales is not None:
                most = TIMES * max(of_losses if name in losses else known[number][name], ROUNDING)
            assert distance <= most, (what, name, distance, most)


@pytest.mark.parametrize("packed", [False, True], ids=["rows", "packed"])
def test_local_layers_in_float32_are_the_formula(case_of, packed):
    check(case_of("llama"), ("local", FP32), packed=packed)


def test_local_layers_in_bfloat16_are_as_near_as_rounding_lets_them(case_of):
    case = case_of("llama")
    pairs = zip(measured(case, ("local", BF16), packed=False), case.expected, strict=True)
    for found, wanted in pairs:
        assert found["capacity"] == pytest.approx(wanted["capacity"])
        # Some dozens of roundings to 8 bits of mantissa follow one another.
        assert max(distances(found, wanted).values()) <= 32 * torch.finfo(BF16).eps


@pytest.mark.parametrize("packed", [False, True], ids=["rows", "packed"])
@pytest.mark.parametrize("dtype", [BF16, FP32], ids=["bf16", "fp32"])
@long_on_cpu
def test_transformer_engine_is_as_near_as_local_layers(case_of, dtype, packed):
    check(case_of("llama"), ("transformer_engine", dtype), packed=packed)


@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "llama"])
@pytest.mark.parametrize("implementation", ["local", "transformer_engine"])
@pytest.mark.parametrize("dtype", [BF16, FP32], ids=["bf16", "fp32"])
@long_on_cpu
def test_windows_biases_and_head_norms(case_of, family, implementation, dtype):
    for packed in (False, True):
        check(case_of(family), (implementation, dtype), packed=packed)
