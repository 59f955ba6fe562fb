"""PEFT's adapters on an export: what is projected for some tokens or sequences goes through them
too."""

from __future__ import annotations

import functools

import pytest
import torch

from megatron_mod.config.lora import TARGETS
from megatron_mod.conversion.peft import module_name
from tests.helpers import formula
from tests.helpers.exported import ROUTED, Exports, load, pad, positions, relative

peft = pytest.importorskip("peft", reason="needs the 'test' extra")
RANK, NEXT = 2, 9


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    return Exports(tmp_path_factory.mktemp("adapters"), plain=False)


def adapted(model):
    """The model with adapters of zeros on all projections of its routed layers."""
    config = peft.LoraConfig(
        r=RANK, lora_alpha=3, target_modules=list(TARGETS), layers_to_transform=list(ROUTED),
        task_type="CAUSAL_LM",
    )  # fmt: skip
    torch.manual_seed(8)
    return peft.get_peft_model(model, config).eval()


@torch.no_grad()
def put(target: str | None, *models) -> None:
    """Adapters of this projection alone that matter, the same in all models."""
    for model in models:
        generator = torch.Generator().manual_seed(9)
        for layer in ROUTED:
            for name in TARGETS:
                module = model.base_model.model.get_submodule(module_name(layer, name))
                a, b = module.lora_A["default"].weight, module.lora_B["default"].weight
                a.copy_(torch.randn(a.shape, generator=generator) / a.shape[1] ** 0.5)
                b.copy_(torch.randn(b.shape, generator=generator) * (name == target))


@torch.no_grad()
def of_export(case, model) -> list[torch.Tensor]:
    """Each prompt's logits, and after them those of one more token by the cache."""
    ids, mask = pad(case.prompts, "left")
    prefill = model(ids, attention_mask=mask, position_ids=positions(mask), use_cache=True)
    last = model(
        torch.full((len(mask), 1), NEXT),
        attention_mask=torch.cat([mask, mask.new_ones(len(mask), 1)], 1),
        position_ids=mask.sum(1, keepdim=True),
        past_key_values=prefill.past_key_values,
    ).logits
    rows = zip(prefill.logits, mask.bool(), last, strict=True)
    return [torch.cat([logits[valid], new]) for logits, valid, new in rows]


@torch.no_grad()
def of_formula(case, name: str, dense) -> list[torch.Tensor]:
    run = functools.partial(
        formula.forward, dense.base_model.model, routers=case.routers(name), **case.scheme(name)
    )
    found = []
    for prompt in case.prompts:
        masks = None
        if "sequence" in name:  # what the prompt decides holds for the token after it
            _, made, _ = run(prompt)
            masks = {key: mask[:1].expand(len(prompt) + 1) for key, mask in made.items()}
        found.append(run([*prompt, NEXT], masks=masks)[0])
    return found


@pytest.mark.parametrize("name", formula.SCHEMES)
def test_every_projection_goes_through_its_adapter(case, name):
    model, dense = adapted(load(case.export(name))), adapted(formula.load_dense(case.hf))
    put(None, model)
    before = of_export(case, model)
    for target in TARGETS:
        put(target, model, dense)
        after, expected = of_export(case, model), of_formula(case, name, dense)
        for found, meant in zip(after, expected, strict=True):
            assert relative(found, meant) < 2e-5, target
        for part in (slice(-1), slice(-1, None)):  # the prompts, and what follows
            changes = [relative(a[part], b[part]) for a, b in zip(after, before, strict=True)]
            assert max(changes) > 1e-2, target


@pytest.mark.parametrize("name", ["attn_sequence", "attn_token_selected"])
def test_generation_and_controls_work_through_peft(case, name):
    model, merged = adapted(load(case.export(name))), adapted(load(case.export(name)))
    put("q_proj", model, merged)
    merged = merged.merge_and_unload()
    ids, mask = pad(case.prompts, "left")
    settings = {"attention_mask": mask, "max_new_tokens": 5, "eos_token_id": None}
    made = [each.generate(input_ids=ids, do_sample=False, **settings) for each in (model, merged)]
    assert torch.equal(*made)
    assert model.routing_report() == merged.routing_report()
    assert model.routing_report()["cache_bytes_saved"] > 0
    model.set_thresholds(0.0)
    model(ids, attention_mask=mask)
    assert model.routing_report()["capacity"] == 1.0
