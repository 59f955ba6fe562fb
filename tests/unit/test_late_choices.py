"""Where a device has to be waited for, what does not depend on a choice is launched before that,
and comes out the same."""

from __future__ import annotations

import pytest
import torch

from megatron_mod.evaluation.huggingface import load_model
from megatron_mod.hf.answers_mod import Answers
from megatron_mod.hf.cache_mod import TokenSelection
from tests.helpers import exact, formula
from tests.helpers.exported import Exports, pad

NAMES = [name for name in formula.SCHEMES if "token" in name]


@pytest.fixture(scope="module", params=[True, False], ids=["plain", "stand-ins"])
def exports(tmp_path_factory, request):
    return Exports(tmp_path_factory.mktemp("exports"), plain=request.param)


@pytest.fixture
def late(monkeypatch):
    """Lets the host wait for a CPU as for a GPU."""
    return lambda: monkeypatch.setattr(Answers, "are_late", staticmethod(lambda device: True))


@torch.no_grad()
def logits(model, prompts) -> list[torch.Tensor]:
    """Of padded texts, of one alone, and of what is added to a cache of it."""
    ids, mask = pad(prompts[:3], "left")
    alone = torch.tensor([prompts[1]])
    first = model(alone[:, :6], use_cache=True)
    rest = model(alone[:, 6:], past_key_values=first.past_key_values).logits
    return [model(ids, attention_mask=mask).logits, model(alone).logits, first.logits, rest]


def check(export, late, prompts) -> None:
    model = load_model(export, dtype=torch.float32).eval()
    thresholds = model.config.thresholds()
    asked = [list(thresholds.values()), [0.0] * len(thresholds), [1.0] * len(thresholds)]
    wanted = []
    for each in asked:
        model.set_thresholds(each)
        wanted.append((logits(model, prompts), model.routing_report()))
    late()
    for each, (those, report) in zip(asked, wanted, strict=True):
        model.set_thresholds(each)
        for ours, theirs in zip(logits(model, prompts), those, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
        assert model.routing_report() == report


@pytest.mark.parametrize("name", NAMES)
def test_all_granularities(exports, late, name):
    check(exports.export(name), late, exports.prompts)


def test_exact_routers(exports, late, tmp_path):
    made = exact.draw("block", "predictor", {1: 0.5, 2: 0.25})
    check(exact.save(tmp_path / "export", exports.hf, made), late, exports.prompts)


@pytest.mark.parametrize(
    ("name", "meanwhile"),
    [
        ("attn_token_all", ["k_proj", "v_proj"]),
        ("block_token_all", ["k_proj", "v_proj"]),
        ("mlp_token", ["q_proj", "k_proj", "v_proj", "o_proj"]),
        ("block_token_selected", []),
    ],
)
def test_what_is_done_meanwhile(exports, late, monkeypatch, name, meanwhile):
    late()
    events: list[str] = []
    ask = Answers.ask

    def asked(self, values):
        events.append("ask")
        answer = ask(self, values)
        return lambda: (events.append("wait"), answer())[1]

    monkeypatch.setattr(Answers, "ask", asked)
    model = load_model(exports.export(name), dtype=torch.float32).eval()
    attention = model.model.layers[2].self_attn  # a routed layer's
    for part in ("q_proj", "k_proj", "v_proj", "o_proj"):
        attention.get_submodule(part).register_forward_hook(
            lambda *_, part=part: events.append(part)
        )
    before = model.model.layers[2].register_forward_pre_hook(lambda *_: events.clear())
    model.model.layers[2].register_forward_hook(lambda *_: events.append("end"))
    with torch.no_grad():
        model(torch.tensor([exports.prompts[1]]))
    before.remove()
    events = events[: events.index("end")]
    assert events[: events.index("wait") + 1] == ["ask", *meanwhile, "wait"]
    assert events.count("wait") == 1


@pytest.mark.parametrize("share", [0.0, 0.4, 1.0])
def test_the_kept_and_the_others(late, share):
    keep = torch.rand(3, 7) < share
    early = TokenSelection(keep)
    late()
    found = TokenSelection(keep)
    assert (early.is_late, found.is_late) == (False, True)
    assert torch.equal(found.index, early.index)
    assert torch.equal(found.others, early.others)
    assert torch.equal(found.others, (~keep).flatten().nonzero()[:, 0])
    assert not TokenSelection(keep[:, :1]).is_late
