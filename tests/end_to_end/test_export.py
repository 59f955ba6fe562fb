"""The exported Hugging Face folder against the formula in plain torch."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, DynamicCache, LlamaForCausalLM

from tests.helpers import oracle, tiny
from tests.helpers.routed import save_export

ROUTED = (0, 2, 3)  # the first layer too: a cache must not read its length off it
LENGTHS = (5, 11, 8, 3, 9)
PAD, EXTRA = 50, 12  # a token with an embedding like any other, and more of it than needed


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    """Export, dense model, routers, and prompts of which each routed layer keeps some."""
    generator = torch.Generator().manual_seed(2)
    folder = tmp_path_factory.mktemp("export")
    hf = tiny.save_llama(folder / "dense", num_key_value_heads=2)
    dense = LlamaForCausalLM.from_pretrained(hf, dtype=torch.float32)
    prompts = [torch.randint(3, 128, (n,), generator=generator).tolist() for n in LENGTHS]
    routers = _mixed_routers(dense, prompts, generator)
    return save_export(folder / "export", hf, routers), dense, routers, prompts


def _mixed_routers(dense, prompts, generator):
    """Routers, layer by layer, under which some prompts are kept, some skipped, none by a hair."""
    routers = {}
    for layer in ROUTED:
        while layer not in routers:
            trial = {**routers, layer: torch.randn(1, 32, generator=generator)}
            with torch.no_grad():
                decided = [oracle.forward(dense, p, trial) for p in prompts]
            kept = sum(float(masks[layer]) for _, masks, _ in decided)
            margin = min(abs(float(logits[layer])) for _, _, logits in decided)
            if 0 < kept < len(prompts) and margin > 1e-3:
                routers = trial
    return routers


def load(export, **changes):
    settings = {"trust_remote_code": True, "dtype": torch.float32, **changes}
    return AutoModelForCausalLM.from_pretrained(export, **settings).eval()


def pad(prompts, side):
    longest = max(map(len, prompts)) + EXTRA
    ids, mask = [], []
    for p in prompts:
        blank = [0] * (longest - len(p))
        ids.append([PAD] * len(blank) + p if side == "left" else p + [PAD] * len(blank))
        real = [1] * len(p)
        mask.append(blank + real if side == "left" else real + blank)
    return torch.tensor(ids), torch.tensor(mask)


def positions(mask):
    return (mask.cumsum(-1) - 1).clamp(min=0)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("use_cache", [True, False])
def test_logits_equal_the_formula(case, side, use_cache, attention):
    export, dense, routers, prompts = case
    ids, mask = pad(prompts, side)
    model = load(export, attn_implementation=attention)
    with torch.no_grad():
        logits = model(
            ids, attention_mask=mask, position_ids=positions(mask), use_cache=use_cache
        ).logits
        for row, prompt in enumerate(prompts):
            expected, _, _ = oracle.forward(dense, prompt, routers)
            difference = (logits[row][mask[row].bool()] - expected).abs().max()
            assert difference / expected.abs().max() < 2e-5


def test_padding_would_change_decisions_if_it_counted(case):
    """A control: the comparison above can tell whether padding is pooled."""
    export, _, _, prompts = case
    ids, mask = pad(prompts, "right")
    model = load(export)
    with torch.no_grad():
        masked, counted = (
            model(ids, attention_mask=m, use_cache=True).past_key_values for m in (mask, None)
        )
    for layer in ROUTED:
        assert not torch.equal(masked.layers[layer].kept, counted.layers[layer].kept)


def test_greedy_generation_equals_the_formula_with_each_prompts_decisions(case):
    export, dense, routers, prompts = case
    ids, mask = pad(prompts, "left")
    new = 12
    made = load(export).generate(
        ids, attention_mask=mask, max_new_tokens=new, do_sample=False, eos_token_id=None
    )
    for row, prompt in enumerate(prompts):
        text = list(prompt)
        with torch.no_grad():
            _, masks, _ = oracle.forward(dense, prompt, routers)
            for _ in range(new):
                logits, _, _ = oracle.forward(dense, text, routers, masks=masks)
                text.append(int(logits[-1].argmax()))
        assert made[row, -new:].tolist() == text[-new:]
        assert len(set(text[-new:])) > 2, "a constant text would compare nothing"


def test_skipped_sequences_store_no_keys_or_values(case):
    export, _, _, prompts = case
    ids, mask = pad(prompts, "left")
    model = load(export)
    with torch.no_grad():
        output = model(ids, attention_mask=mask, position_ids=positions(mask), use_cache=True)
        cache = output.past_key_values
        model(
            ids[:, :1], attention_mask=torch.cat([mask, mask[:, :1] | 1], 1), past_key_values=cache
        )
    for index, layer in enumerate(cache.layers):
        rows = int(layer.kept.sum()) if index in ROUTED else len(prompts)
        assert layer.keys.shape[0] == layer.values.shape[0] == rows
        assert layer.keys.shape[2] == ids.shape[1] + 1
        assert layer.get_seq_length() == ids.shape[1] + 1


def test_a_layer_everybody_skips_holds_nothing(tmp_path):
    hf = tiny.save_llama(tmp_path / "dense")
    export = save_export(tmp_path / "export", hf, {1: torch.zeros(1, 32)})
    model = load(export)
    model.model.layers[1].logit_border = 1.0  # zero routers are below it
    with torch.no_grad():
        cache = model(torch.tensor([[5, 6, 7]]), use_cache=True).past_key_values
    assert cache.layers[1].keys is None
    assert cache.get_seq_length() == 3


def _attention_flops(model, ids, mask, cache=None):
    """Counted work of each layer's attention (math kernel: the fused one counts nothing)."""
    counter = FlopCounterMode(display=False)
    math_kernel = torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH)
    with torch.no_grad(), math_kernel, counter:
        output = model(ids, attention_mask=mask, past_key_values=cache, use_cache=True)
    counts = counter.get_flop_counts()
    name = type(model).__name__
    found = [
        sum(counts.get(f"{name}.model.layers.{i}.self_attn", {}).values())
        for i in range(model.config.num_hidden_layers)
    ]
    return found, output.past_key_values


def test_counted_work_falls_by_what_was_skipped(case):
    export, dense, _, prompts = case
    ids, mask = pad(prompts, "left")
    longer = torch.cat([mask, torch.ones(len(mask), 1, dtype=mask.dtype)], 1)
    model = load(export)
    full, dense_cache = _attention_flops(dense, ids, mask)
    routed, cache = _attention_flops(model, ids, mask)
    _check_work(dense.config, full, routed, cache, queries=ids.shape[1], keys=ids.shape[1])
    full, _ = _attention_flops(dense, ids[:, :1], longer, dense_cache)
    routed, cache = _attention_flops(model, ids[:, :1], longer, cache)
    _check_work(dense.config, full, routed, cache, queries=1, keys=ids.shape[1] + 1)


def _check_work(config, full, routed, cache, *, queries, keys):
    # The dense count is the formula's: projections and scores, two operations a product.
    heads, groups, size = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    projections = 2 * queries * config.hidden_size * size * (2 * heads + 2 * groups)
    scores = 2 * 2 * heads * size * queries * keys
    assert full == [len(LENGTHS) * (projections + scores)] * 4
    for index in range(4):
        kept = int(cache.layers[index].kept.sum()) if index in ROUTED else len(LENGTHS)
        assert routed[index] == full[index] * kept // len(LENGTHS)


def test_cache_follows_reordering_and_repetition(case):
    export, _, _, prompts = case
    model = load(export)
    ids, mask = pad(prompts, "left")
    order = torch.tensor([3, 3, 0, 4, 1])
    twice = torch.arange(5).repeat_interleave(2)

    def decode(cache, mask):
        with torch.no_grad():
            return model(
                torch.full((len(mask), 1), 9),
                attention_mask=torch.cat([mask, mask.new_ones(len(mask), 1)], 1),
                position_ids=mask.sum(1, keepdim=True),
                past_key_values=cache,
            ).logits[:, -1]

    def prefill():
        with torch.no_grad():
            return model(
                ids, attention_mask=mask, position_ids=positions(mask), use_cache=True
            ).past_key_values

    plain = decode(prefill(), mask)
    cache = prefill()
    cache.reorder_cache(order)
    torch.testing.assert_close(decode(cache, mask[order]), plain[order], rtol=1e-5, atol=1e-5)
    cache = prefill()
    cache.batch_repeat_interleave(2)
    torch.testing.assert_close(decode(cache, mask[twice]), plain[twice], rtol=1e-5, atol=1e-5)


def test_router_stays_in_float32_when_the_model_is_bfloat16(case):
    model = load(case[0], dtype=torch.bfloat16)
    assert model.model.layers[ROUTED[0]].router.weight.dtype == torch.float32
    assert model.model.layers[0].mlp.up_proj.weight.dtype == torch.bfloat16


def test_saving_again_keeps_everything(case, tmp_path):
    export, _, _, prompts = case
    model = load(export)
    model.save_pretrained(tmp_path)
    ids, mask = pad(prompts, "right")
    with torch.no_grad():
        first = model(ids, attention_mask=mask).logits
        again = load(tmp_path)(ids, attention_mask=mask).logits
    assert torch.equal(first, again)


def test_a_used_cache_of_another_model_is_refused(case):
    export, dense, _, prompts = case
    with torch.no_grad():
        cache = dense(torch.tensor([prompts[0]]), past_key_values=DynamicCache()).past_key_values
        with pytest.raises(ValueError, match="did not fill"):
            load(export)(torch.tensor([prompts[0]]), past_key_values=cache)


WITHOUT_PACKAGE = """
import sys, torch
sys.path = [p for p in sys.path if p not in ("", ".")]
try:
    import megatron_mod
except ImportError:
    pass
else:
    sys.exit("megatron_mod can be imported here, so this shows nothing")
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
made = model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=3, eos_token_id=None)
print(made.shape)
"""


def _isolated(code: str, *arguments: object, folder) -> subprocess.CompletedProcess:
    """Run code where neither this repository nor an editable install of it can be found."""
    block = folder / "sitecustomize.py"
    block.write_text(
        "import sys\n"
        "class Absent:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.split('.')[0] in ('megatron_mod', 'megatron'):\n"
        "            raise ModuleNotFoundError(name)\n"
        "sys.meta_path.insert(0, Absent())\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(folder), "HF_MODULES_CACHE": str(folder / "hf")}
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        cwd=folder, env=environment, capture_output=True, text=True, timeout=120,
        stdin=subprocess.DEVNULL,
    )  # fmt: skip


def test_the_folder_works_without_this_package(case, tmp_path):
    done = _isolated(WITHOUT_PACKAGE, case[0], folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "torch.Size([1, 6])" in done.stdout


def test_without_trust_remote_code_it_is_refused(case, tmp_path):
    code = WITHOUT_PACKAGE.replace(", trust_remote_code=True", "")
    done = _isolated(code, case[0], folder=tmp_path)
    assert done.returncode != 0
    assert "trust_remote_code" in done.stderr


def test_config_is_written_for_both_releases(case):
    config = json.loads((case[0] / "config.json").read_text())
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == 10000.0
    assert config["dtype"] == config["torch_dtype"] == "float32"
    assert config["model_type"] == "mod_llama"
