"""Decode steps as CUDA graphs are the steps that they were recorded from."""

from __future__ import annotations

import copy

import pytest
import torch

from megatron_mod.evaluation.huggingface import load_model
from megatron_mod.hf import buffers_mod, graph_mod, step_mod
from megatron_mod.hf.attention_mod import PART, attend_in_parts
from tests.gpu.test_equality import SCHEMES
from tests.gpu.test_export import Exported
from tests.gpu.where import only_cuda
from tests.helpers.exported import pad

pytestmark = [pytest.mark.gpu, only_cuda, pytest.mark.usefixtures("single_process")]

NEW = 6
FP32 = {"rtol": 1e-3, "atol": 1e-3}
EXACT = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None}


@pytest.fixture(scope="module")
def exported(tmp_path_factory, single_process):
    return Exported(tmp_path_factory.mktemp("exported"))


@pytest.mark.parametrize("more", [False, True], ids=["plain", "stand_ins"])
@pytest.mark.parametrize(("granularity", "keys_values"), SCHEMES)
def test_generation(exported, granularity, keys_values, more):
    export, _ = exported(granularity, keys_values, more=more)
    model = load_model(export, dtype=torch.float32).to("cuda").eval()
    texts = [sample.ids for sample in exported.samples]
    batches = [pad(texts, "left"), *((torch.tensor([text]), None) for text in texts[:2])]
    found = {}
    for graphed in (False, True):
        for number, (ids, mask) in enumerate(batches):
            if graphed and number == 0:
                context = model.graphed_decoding()
                context.__enter__()
            output = model.generate(
                ids.to("cuda"),
                attention_mask=None if mask is None else mask.to("cuda"),
                return_dict_in_generate=True,
                output_logits=True,
                **EXACT,
            )
            logits = torch.stack(output.logits)
            found[graphed, number] = output.sequences, logits, model.routing_report()
    assert all(held.recorded for held in model.model.graphs.buffers.values())
    context.__exit__(None, None, None)
    for number in range(len(batches)):
        (tokens, logits, report), (again, close, same) = found[False, number], found[True, number]
        assert torch.equal(again, tokens)
        torch.testing.assert_close(close, logits, **FP32)
        assert same == report


def test_thresholds_may_be_set_meanwhile(exported):
    export, _ = exported("block_token", None, more=False)
    model = load_model(export, dtype=torch.float32).to("cuda").eval()
    ids = torch.tensor([exported.samples[0].ids], device="cuda")
    wanted = {}
    for threshold in (0.0, 1.0):
        model.set_thresholds(threshold)
        wanted[threshold] = model.generate(ids, **EXACT)
    with model.graphed_decoding():
        for threshold in (1.0, 0.0, 1.0):
            model.set_thresholds(threshold)
            assert torch.equal(model.generate(ids, **EXACT), wanted[threshold])


@pytest.mark.parametrize("most", [0, buffers_mod.AHEAD], ids=["before", "behind"])
@pytest.mark.parametrize("name", ["attn_token", "block_token", "mlp_token"])
def test_decisions_before_and_behind_the_attention(exported, monkeypatch, name, most):
    export, _ = exported(name, "all" if name != "mlp_token" else None, more=True)
    model = load_model(export, dtype=torch.float32).to("cuda").eval()
    for module in (graph_mod, step_mod):  # 0: attentions are launched by themselves
        monkeypatch.setattr(module, "AHEAD", most)
    for sample in exported.samples:
        ids = torch.tensor([sample.ids], device="cuda")
        wanted = model.generate(ids, **EXACT), model.routing_report()
        with model.graphed_decoding():
            found = model.generate(ids, **EXACT), model.routing_report()
        assert torch.equal(found[0], wanted[0])
        assert found[1] == wanted[1]


@pytest.mark.parametrize("name", ["attn_sequence", "block_token"])
def test_texts_that_outgrow_their_room(exported, name):
    export, _ = exported(name, "all" if name == "block_token" else None, more=False)
    model = load_model(export, dtype=torch.float32).to("cuda").eval()
    ids = torch.tensor([exported.samples[0].ids], device="cuda")
    settings = {**EXACT, "max_new_tokens": 2 * PART}  # what there is room for, and the prompt
    wanted = model.generate(ids, **settings), model.routing_report()
    with model.graphed_decoding():
        for _ in range(2):
            found = model.generate(ids, **settings), model.routing_report()
            assert torch.equal(found[0], wanted[0])
            assert found[1] == wanted[1]


@torch.no_grad()
def test_caches_take_turns(exported):
    export, _ = exported("attn_token", "all", more=False)
    model = load_model(export, dtype=torch.float32).to("cuda").eval()
    texts = [torch.tensor([sample.ids], device="cuda") for sample in exported.samples[:2]]

    def steps() -> torch.Tensor:
        caches = [model(text, use_cache=True).past_key_values for text in texts]
        caches.append(copy.deepcopy(caches[0]))
        token = texts[0][:, :1]
        logits = [model(token, past_key_values=caches[n]).logits for n in (0, 1, 2, 1, 0, 2)]
        return torch.cat(logits)

    wanted = steps()
    with model.graphed_decoding():
        torch.testing.assert_close(steps(), wanted, **FP32)


@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_attention_in_parts(dtype, batch):
    query, keys, values = (
        torch.randn(batch, 8, n, 128, device="cuda", dtype=dtype) for n in (4, 8 * PART, 8 * PART)
    )
    bias = torch.zeros(batch, 1, 1, 8 * PART, device="cuda")
    bias[..., 7 * PART + 5 :] = -torch.inf
    scale = 128**-0.5
    found = attend_in_parts(query, keys, values, bias, scale)
    scores = query.double() @ keys.double().transpose(2, 3) * scale + bias
    wanted = scores.softmax(-1) @ values.double()
    near = 1e-3 if dtype is torch.float32 else 1e-2
    torch.testing.assert_close(found.double(), wanted, rtol=near, atol=near)


def test_hooks_may_change_what_a_layer_is_given(exported):
    export, _ = exported("attn_token", "all", more=False)
    model = load_model(export, dtype=torch.float32).to("cuda").eval()
    ids = torch.tensor([exported.samples[0].ids], device="cuda")

    def both() -> list[torch.Tensor]:
        found = [model.generate(ids, **EXACT)]
        for in_place in (False, True):

            def steer(layer, args, output, in_place=in_place):
                steering = torch.linspace(-1, 1, output.shape[-1], device="cuda")
                return output.add_(steering) if in_place else output + steering

            hook = model.model.layers[1].register_forward_hook(steer)
            found.append(model.generate(ids, **EXACT))
            hook.remove()
        return found

    wanted = both()
    with model.graphed_decoding():
        found = both()
    for ours, theirs in zip(found, wanted, strict=True):
        assert torch.equal(ours, theirs)
