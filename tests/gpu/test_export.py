"""The export on the device: every attention, both dtypes, beside the formula; what cannot be right
is refused."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from transformers import AutoModelForCausalLM

from megatron_mod.parallel import device
from megatron_mod.routing.config import ROUTER, RoutingConfig
from megatron_mod.routing.scheme import Scheme
from tests.distributed.test_granularities import make_case
from tests.gpu.parted import parted
from tests.gpu.test_equality import SCHEMES, SHAPE, TIMES
from tests.gpu.where import long_on_cpu, only_cuda
from tests.helpers import training_formula
from tests.helpers.exported import load, pad
from tests.helpers.routed import save_export

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("single_process")]

EXACT = 1e-4  # relative, float32
NEW = 6
ROUTED = (1, 2)
has_flash = importlib.util.find_spec("flash_attn") is not None
flash = pytest.param(
    "flash_attention_2",
    marks=[only_cuda, pytest.mark.skipif(not has_flash, reason="flash_attn is not installed")],
)


class Exported:
    """A Llama in bfloat16, and exports of it whose decisions no rounding changes."""

    def __init__(self, folder) -> None:
        self.folder = folder
        self.hf, _, self.samples, _ = make_case(folder / "case", "llama", SHAPE)
        self.dense = AutoModelForCausalLM.from_pretrained(self.hf, dtype=torch.float64)
        self.ids, self.mask = pad([sample.ids for sample in self.samples], "right")
        self.made: dict = {}

    def __call__(self, granularity: str, keys_values: str | None, *, more: bool):
        """A folder, and the formula's logits of the samples, one after the other."""
        key = granularity, keys_values, more
        if key not in self.made:
            settings = {"keys_values": keys_values} if keys_values else {}
            if more:
                settings.update(bias=True, stand_in_rank=3)
            routers = len(ROUTED) * len(Scheme.parse(granularity).targets)
            routing = RoutingConfig(granularity, ROUTED, (0.5,) * routers, **settings)
            added = parted(self.dense, self.samples, routing, len(self.made))
            names = {
                place: f"{routing.name_of(ROUTER, place.target)}.weight" for place in routing.places
            }
            weights = {place: added[place.layer][name] for place, name in names.items()}
            rest = {
                layer: {n: t for n, t in own.items() if n not in names.values()}
                for layer, own in added.items()
            }
            name = "_".join(map(str, key))
            export = save_export(
                self.folder / name, self.hf, weights, rest, granularity=granularity, **settings
            )
            scheme = training_formula.Scheme(
                granularity, ROUTED, keys_values=routing.keys_values, pooling="all"
            )
            double = {k: {n: t.double() for n, t in own.items()} for k, own in added.items()}
            with torch.no_grad():
                logits = torch.cat([
                    training_formula.forward(self.dense, s.ids, len(s.ids), double, scheme)[0]
                    for s in self.samples
                ])  # fmt: skip
            self.made[key] = export, logits
        return self.made[key]

    @torch.no_grad()
    def distance(self, export, wanted, **settings) -> float:
        """Relative, of the logits of the padded samples."""
        model = load(export, **settings).to(device.device())
        ids, mask = (t.to(device.device()) for t in (self.ids, self.mask))
        logits = model(ids, attention_mask=mask).logits.cpu()
        found = logits[self.mask.bool()].double()
        return float((found - wanted).norm() / wanted.norm())


@pytest.fixture(scope="module")
def exported(tmp_path_factory, single_process):
    return Exported(tmp_path_factory.mktemp("exported"))


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize(("granularity", "keys_values"), SCHEMES)
@long_on_cpu
def test_in_float32_it_is_the_formula(exported, granularity, keys_values, attention):
    for more in (False, True):
        export, wanted = exported(granularity, keys_values, more=more)
        assert exported.distance(export, wanted, attn_implementation=attention) <= EXACT


@pytest.mark.parametrize("attention", ["sdpa", flash])
@pytest.mark.parametrize(("granularity", "keys_values"), SCHEMES)
@long_on_cpu
def test_in_bfloat16_every_attention_is_as_near_as_the_eager_one(
    exported, granularity, keys_values, attention
):
    bf16 = {"dtype": torch.bfloat16}
    for more in (False, True):
        export, wanted = exported(granularity, keys_values, more=more)
        scale = exported.distance(export, wanted, attn_implementation="eager", **bf16)
        found = exported.distance(export, wanted, attn_implementation=attention, **bf16)
        assert found <= TIMES * scale


@pytest.mark.parametrize("more", [False, True], ids=["plain", "stand_ins"])
@pytest.mark.parametrize(("granularity", "keys_values"), SCHEMES)
@long_on_cpu
def test_generation_is_the_cpus(exported, granularity, keys_values, more):
    export, _ = exported(granularity, keys_values, more=more)
    ids, mask = pad([sample.ids for sample in exported.samples], "left")
    settings = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None}
    model = load(export)
    wanted = model.generate(ids, attention_mask=mask, **settings)
    report = model.routing_report()
    model = load(export).to(device.device())
    ids, mask = (t.to(device.device()) for t in (ids, mask))
    assert torch.equal(model.generate(ids, attention_mask=mask, **settings).cpu(), wanted)
    assert model.routing_report() == report
    beams = model.generate(ids, attention_mask=mask, num_beams=3, **settings)
    assert beams.shape == wanted.shape


@only_cuda
@pytest.mark.parametrize(("granularity", "keys_values"), SCHEMES)
def test_cuda_graphs_are_refused_and_the_model_still_works(exported, granularity, keys_values):
    export, wanted = exported(granularity, keys_values, more=False)
    model = load(export).to(device.device())
    ids = exported.ids[:1].to(device.device())
    with torch.no_grad():
        before = model(ids).logits
        with (
            pytest.raises(ValueError, match="CUDA graph"),
            torch.cuda.graph(torch.cuda.CUDAGraph()),
        ):
            model(ids)
        assert torch.equal(model(ids).logits, before)
    assert wanted.isfinite().all()


def test_torch_compile_is_refused(exported):
    export, _ = exported("attn_token", None, more=False)
    model = load(export).to(device.device())
    with torch.no_grad(), pytest.raises((RuntimeError, ValueError), match="torch.compile"):
        torch.compile(model, backend="eager")(exported.ids.to(device.device()))
