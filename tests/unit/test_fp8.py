"""Products in FP8: what they cannot go with is refused, and what they take is estimated. What they
compute needs a GPU: tests/gpu/test_fp8.py."""

from __future__ import annotations

import dataclasses
import sys

import pytest
import torch

from megatron_mod.conversion.convert import hf_to_megatron
from megatron_mod.conversion.restore import load_model
from megatron_mod.conversion.source import open_source
from megatron_mod.estimate import here, memory
from megatron_mod.estimate.gpus import KINDS
from megatron_mod.estimate.resolve import kind_of
from megatron_mod.evaluation.parity import megatron_logits, prompt_batch
from megatron_mod.model import fp8
from megatron_mod.model.architecture import Mixture, check_fp8
from megatron_mod.model.builder import transformer_config
from megatron_mod.model.projection import Part, PartColumnParallelLinear, project
from megatron_mod.parallel.topology import ONE_RANK
from megatron_mod.routing.config import RoutingConfig
from tests.helpers import tiny
from tests.helpers.engine_on_cpu import engine_error, engine_on_cpu
from tests.helpers.estimated import ARCH, config_of, place


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"model__dtype": "float32"}, "model.dtype = float32: asks for more bits; set model.dtype"),
        ({"model__transformer_impl": "local"}, "only Transformer Engine multiplies in FP8"),
        ({"train__recompute": "full"}, "what is computed again would not be in FP8"),
        ({"train__trainable": "all"}, "products by weights that train are not in FP8 here"),
    ],
)
def test_settings_that_cannot_be(settings, said):
    options = {"model__dtype": "bfloat16", "model__fp8": "hybrid", **settings}
    with pytest.raises(ValueError, match=f"model.fp8 = hybrid and .*{said}"):
        config_of(**options)


def test_a_device_that_cannot():
    if torch.cuda.is_available():
        pytest.skip("this one may")
    with pytest.raises(ValueError, match="model.fp8 = e4m3: only Transformer Engine's layers mul"):
        fp8.require_device("e4m3", "local")


def test_shapes_that_cannot_be():
    check_fp8(ARCH, "hybrid", tensor=1)
    check_fp8(dataclasses.replace(ARCH, hidden_size=90), None, tensor=1)
    with pytest.raises(
        ValueError, match=r"hidden_size = 90, and FP8 products need multiples of 16"
    ):
        check_fp8(dataclasses.replace(ARCH, hidden_size=90), "hybrid", tensor=1)
    with pytest.raises(ValueError, match=r"key channels / tensor ranks = 24"):
        place(world_size=2, model__fp8="hybrid", parallel__tensor_model_parallel_size=2)
    mixture = dataclasses.replace(ARCH, mixture=Mixture(4, 2, 256))
    with pytest.raises(ValueError, match="is a mixture of experts"):
        check_fp8(mixture, "hybrid", tensor=1)


def test_megatron_is_told():
    config = transformer_config(ARCH, dtype=torch.bfloat16, fp8="hybrid")
    assert (config.fp8, config.fp8_recipe) == ("hybrid", "tensorwise")
    assert transformer_config(ARCH, dtype=torch.bfloat16).fp8 is None


def test_a_part_of_a_padded_linear(single_process):
    """It is computed alone, as without padding; with a forward of somebody else's it is not."""
    config = transformer_config(ARCH, dtype=torch.float32)
    group = torch.distributed.group.WORLD
    linear = PartColumnParallelLinear(
        96, 192, config=config, init_method=torch.nn.init.normal_, bias=False, tp_group=group
    )
    torch.nn.init.normal_(linear.weight)
    hidden, part, calls = torch.randn(3, 1, 96), Part(2, 0, 48), []
    wanted = part.of_outputs(linear(hidden)[0])

    def padded(*args, **kwargs):
        calls.append(kwargs)
        return type(linear).forward(linear, *args, **kwargs)

    linear.forward = padded
    torch.testing.assert_close(project(linear, hidden, part), wanted)
    linear.padded_forward = padded
    torch.testing.assert_close(project(linear, hidden, part), wanted)
    assert calls == [{}, {"part": part}]


def test_what_is_estimated(monkeypatch):
    plain, in_fp8 = (place(model__dtype="bfloat16", model__fp8=value) for value in (None, "hybrid"))
    h100 = KINDS["h100"]
    held = [memory.of_rank(each, 0, h100).lasting["weights in FP8"] for each in (plain, in_fp8)]
    layer = 96 * (96 + 2 * 48 + 96) + 3 * 96 * 256
    # Layers 1 and 2 are routed: backward goes through the last three.
    assert held == [0, layer * (1 + 2 + 2 + 2)]
    assert h100.rate("bfloat16", "hybrid") == 2 * h100.rate("bfloat16")
    assert kind_of("h100", per_node=1)(in_fp8) is h100
    for name in ("a100-80", "cpu"):
        monkeypatch.setattr("megatron_mod.estimate.here.cpu", None)  # nothing is measured first
        with pytest.raises(ValueError, match=f"{name} does not multiply in FP8; .* h100, h200, l4"):
            kind_of(name, per_node=1)(in_fp8)


@pytest.mark.parametrize(("name", "capability"), [("A100", (8, 0)), ("H100", (9, 0))])
def test_this_machines_gpu_is_asked(monkeypatch, name, capability):
    monkeypatch.setattr(here.device, "describe", lambda: f"NVIDIA {name} 80GB")
    monkeypatch.setattr(here.device, "memory", lambda: 80 * 2**30)
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda: capability)
    plain, in_fp8 = (place(model__dtype="bfloat16", model__fp8=value) for value in (None, "hybrid"))
    assert name in here.gpu(plain).name
    if capability >= (8, 9):
        assert here.gpu(in_fp8) == here.gpu(plain)
        return
    with pytest.raises(ValueError, match="model.fp8 = hybrid: NVIDIA A100 80GB does not multiply"):
        here.gpu(in_fp8)


@pytest.mark.parametrize("granularity", ["attn_token", "block_token"])
def test_any_number_of_tokens_is_padded(tmp_path, single_process, monkeypatch, granularity):
    """Transformer Engine's part is torch's here, products exact: what is padded changes nothing."""
    if error := engine_error():
        pytest.skip(error)
    from transformer_engine.pytorch.fp8 import FP8GlobalStateManager

    engine = sys.modules[FP8GlobalStateManager.__module__]
    monkeypatch.setattr(engine, "check_fp8_support", lambda: (True, ""))
    folder, seen = tmp_path / "base", []
    hf_to_megatron(
        tiny.save_tokenizer(tiny.save_llama(tmp_path / "hf", num_hidden_layers=2)), folder
    )
    batch = prompt_batch([[5, 6, 7, 8, 9, 10, 11], [13, 14, 15]])
    routing = RoutingConfig(granularity, (1,), (0.5,), training_compute="sparse")
    found = []
    with engine_on_cpu(tokens=seen):
        for products in (None, "hybrid"):
            model = load_model(
                open_source(folder).base,
                routing,
                ONE_RANK,
                implementation="transformer_engine",
                dtype=torch.bfloat16,
                fp8=products,
            )
            for chunk in model:
                generator = torch.Generator().manual_seed(3)
                chunk.decoder.layers[1].router.weight.data.normal_(generator=generator)
            seen.clear()
            found.append(megatron_logits(model, [batch])[0])
    assert torch.equal(*found)
    assert seen
    assert all(is_fp8 and tokens % 16 == 0 for tokens, is_fp8 in seen)
