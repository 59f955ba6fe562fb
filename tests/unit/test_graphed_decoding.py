"""Decode steps by graphs are the model's own; on a CPU operations are recorded and repeated."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch

from megatron_mod.benchmark.inference_speed import Pair
from megatron_mod.benchmark.routing import Operations
from megatron_mod.evaluation.huggingface import load_model
from megatron_mod.hf import graph_mod, step_mod
from megatron_mod.hf.answers_mod import Answers
from megatron_mod.hf.graph_mod import DecodingGraphs
from tests.helpers import exact, formula
from tests.helpers.exported import Exports, pad
from tests.helpers.graphed import NEW, assert_same, generated

ALMOST = 1 - 1e-9  # skips everything, but keys and values are stored


def check(export, recorded, prompts) -> None:
    """Of padded texts, of beams of them, and of one alone, graphs make what is made without."""
    model = load_model(export, dtype=torch.float32).eval()
    together, alone = pad(prompts[:3], "left"), (torch.tensor([prompts[1]]),)
    for inputs, settings in ((together, {}), (together, {"num_beams": 2}), (alone, {})):
        wanted = [generated(model, *inputs, **settings)]
        recorded.clear()
        with model.graphed_decoding():
            assert_same([generated(model, *inputs, **settings)], wanted)
        assert recorded


@pytest.fixture(scope="module", params=[True, False], ids=["plain", "stand-ins"])
def exports(tmp_path_factory, request):
    return Exports(tmp_path_factory.mktemp("exports"), plain=request.param)


def some(*sliding: int) -> dict:
    """Settings of a model some of whose layers have windows."""
    kinds = [f"{'sliding' if n in sliding else 'full'}_attention" for n in range(4)]
    return {"use_sliding_window": True, "layer_types": kinds}


@pytest.fixture(
    scope="module",
    params=[("mistral", {}), ("qwen2", some(0, 2)), ("qwen2", some(1, 3)), ("qwen3", some(2, 3))],
    ids=["all", "first", "second", "last"],
)
def windows(tmp_path_factory, request):
    family, settings = request.param
    folder = tmp_path_factory.mktemp("windows")
    return Exports(folder, family, plain=True, sliding_window=4, **settings)


@pytest.mark.parametrize("name", formula.SCHEMES)
def test_all_granularities(exports, graphs, name):
    check(exports.export(name), graphs, exports.prompts)


@pytest.mark.parametrize("name", ["attn_sequence", "attn_token_all", "block_token_selected"])
def test_windows(windows, graphs, name):
    check(windows.export(name), graphs, windows.prompts)


@pytest.mark.parametrize("causal", ["predictor", "auxiliary_loss"])
@pytest.mark.parametrize("target", ["attn", "block"])
def test_exact_routers(exports, graphs, tmp_path, target, causal):
    made = exact.draw(target, causal, {1: 0.5, 2: 0.25})
    check(exact.save(tmp_path / "export", exports.hf, made), graphs, exports.prompts)


@pytest.mark.parametrize("name", ["attn_token_all", "block_token_selected"])
def test_thresholds_of_nothing_and_everything(exports, graphs, name, tmp_path):
    model = load_model(exports.export(name), dtype=torch.float32).eval()
    ids = torch.tensor([exports.prompts[0]])
    wanted = {}
    for threshold in (0.0, ALMOST, 1.0):
        model.set_thresholds(threshold)
        wanted[threshold] = generated(model, ids)
    with model.graphed_decoding():  # they may be set meanwhile, and are in what is recorded
        for threshold, is_new in ((1.0, True), (0.0, True), (ALMOST, True), (1.0, False)):
            graphs.clear()
            model.set_thresholds(threshold)
            assert_same([generated(model, ids)], [wanted[threshold]])
            assert bool(graphs) == is_new


def test_padding_is_not_kept(exports, graphs):
    """A row whose newest token is padding."""
    model = load_model(exports.export("block_token_all"), dtype=torch.float32).eval()
    model.set_thresholds(0.0)
    ids, mask = torch.tensor([[5, 6, 7], [8, 9, 10]]), torch.ones(2, 4, dtype=torch.int64)
    mask[1, 3] = 0
    with torch.no_grad(), model.graphed_decoding():
        cache = model(ids, use_cache=True).past_key_values
        model(ids[:, :1], attention_mask=mask, past_key_values=cache)
    assert graphs
    report = model.routing_report()
    assert (report["kept"], report["units"]) == (len(report["layers"]), len(report["layers"]))


@pytest.mark.parametrize(
    ("name", "batch"), [("attn_sequence", 3), ("block_token_all", 1), ("block_token_selected", 3)]
)
def test_no_cache_outlives_its_calls(exports, graphs, name, batch):
    model = load_model(exports.export(name), dtype=torch.float32).eval()
    ids, mask = pad(exports.prompts[:batch], "left")
    with torch.no_grad(), model.graphed_decoding():
        cache = model(ids, attention_mask=mask, use_cache=True).past_key_values
        mask = torch.cat([mask, torch.ones(batch, 1, dtype=mask.dtype)], 1)
        model(ids[:, :1], attention_mask=mask, past_key_values=cache)
        assert graphs
        held = [weakref.ref(layer) for layer in cache.layers]
        del cache
        gc.collect()
        assert not any(layer() for layer in held)


def test_one_within_another(exports, graphs):
    model = load_model(exports.export("block_token_all"), dtype=torch.float32).eval()
    with model.graphed_decoding():
        outer = model.model.graphs
        with model.graphed_decoding():
            assert model.model.graphs is not outer
        assert model.model.graphs is outer
    assert model.model.graphs is None


@pytest.mark.parametrize("in_place", [False, True])
def test_hooks_may_change_what_a_layer_is_given(exports, graphs, in_place):
    model = load_model(exports.export("attn_token_all"), dtype=torch.float32).eval()
    prompts = pad(exports.prompts[:3], "left"), (torch.tensor([exports.prompts[0]]),)

    def steer(layer, args, output):
        steering = torch.linspace(-1, 1, output.shape[-1])
        return output.add_(steering) if in_place else output + steering

    def both() -> list:
        found = [generated(model, *inputs) for inputs in prompts]
        hook = model.model.layers[1].register_forward_hook(steer)
        found += [generated(model, *inputs) for inputs in prompts]
        hook.remove()
        return found

    wanted = both()
    with model.graphed_decoding():
        found = both()
    assert_same(found, wanted)


def test_a_step_that_was_broken_off_leaves_nothing_behind(exports, graphs):
    model = load_model(exports.export("attn_token_all"), dtype=torch.float32).eval()
    ids = torch.tensor([exports.prompts[0]])
    wanted = generated(model, ids)

    def interrupt(layer, args):
        if args[0].shape[1] == 1:
            raise KeyboardInterrupt

    with model.graphed_decoding():
        for layer in model.model.layers:
            hook = layer.register_forward_pre_hook(interrupt)
            with pytest.raises(KeyboardInterrupt):
                generated(model, ids)
            hook.remove()
            assert_same([generated(model, ids)], [wanted])


def test_sequences_of_another_batch(exports, graphs):
    """Decisions are the batch's own, of which there may be several in turn."""
    model = load_model(exports.export("block_sequence"), dtype=torch.float32).eval()
    batches = [pad(exports.prompts[first : first + 3], "left") for first in range(3)]
    wanted = [generated(model, *batch) for batch in batches]
    assert len({str(report["layers"]) for _, _, report in wanted}) > 1
    with model.graphed_decoding():
        assert_same([generated(model, *batch) for batch in batches], wanted)


@pytest.mark.parametrize(
    ("granularity", "batch", "wanted"),
    [
        # of a model without routers, two graphs: the first layer's queries and attention, the rest
        (None, 1, [(0, "to", 0), (0, "from", 0)]),
        (None, 3, [(0, "to", 0), (0, "from", 0)]),
        # of a router of tokens a decision to ask for, the attention meanwhile, and what follows
        (
            "attn_token",
            1,
            [(0, "to", 0), (0, "from", 0)]
            + [(layer, what, n) for layer in (1, 2) for what, n in (("attend", 0), ("from", 1))],
        ),
        # or, of several tokens, decisions to report
        ("attn_token", 3, [(0, "to", 0), (0, "from", 0), (1, "from", 1), (2, "from", 1)]),
        ("block_sequence", 1, [(0, "to", 0), (0, "from", 0), (1, "from", 0), (2, "from", 0)]),
    ],
)
def test_what_the_host_launches(graphs, monkeypatch, granularity, batch, wanted):
    """Graphs, of which layer, and before each of them how many operations."""
    pair = Pair.of_shape("tiny", granularity or "attn_token", dtype=torch.float32)
    model = pair.routed if granularity else pair.plain
    model.set_thresholds(0.0)
    assert tuple(model.config.routing["layers"]) == ((1, 2) if granularity else ())
    ids = pair.prompts(batch, 16)
    launched, before = [], []
    run = DecodingGraphs.run
    with torch.no_grad(), model.graphed_decoding():
        cache = model(ids, use_cache=True).past_key_values
        model(ids[:, :1], past_key_values=cache)
        counter = Operations()

        def launch(self, key, *args):
            launched.append(key[:2])
            before.append(counter.count)
            result = run(self, key, *args)
            counter.count = 0  # the graph's are not the host's
            return result

        monkeypatch.setattr(DecodingGraphs, "run", launch)
        with counter:
            model(ids[:, :1], past_key_values=cache)
    assert before[0] <= 18  # embedding, positions, and what graphs read
    assert [(*key, n) for key, n in zip(launched, [0, *before[1:]], strict=True)] == wanted


@pytest.mark.parametrize("exports", [True], indirect=True, ids=["plain"])
@pytest.mark.parametrize("name", ["attn_token_all", "block_token_all", "mlp_token"])
@pytest.mark.parametrize("few", [True, False], ids=["few", "many"])
def test_a_decision_is_waited_for_behind_the_attention(exports, graphs, monkeypatch, name, few):
    """Of few keys, or where it is not about the attention; of many keys before it, which is then
    left out where it is skipped."""
    model = load_model(exports.export(name), dtype=torch.float32).eval()
    layers, ids = model.config.routing["layers"], torch.tensor([exports.prompts[0]])
    model.set_thresholds([0.0] * (len(layers) - 1) + [ALMOST])
    wanted = generated(model, ids)
    events: list[str] = []
    ask, run = Answers.ask, DecodingGraphs.run
    attend = step_mod.scaled_dot_product_attention

    def asked(self, decided):
        answer = ask(self, decided)
        events.append("ask")
        return lambda: (events.append("wait"), answer())[1]

    def ran(self, key, *args):
        if key[1] == "attend":
            events.append("attend")
        return run(self, key, *args)

    def attended(*args, **how):
        events.append("attend")
        return attend(*args, **how)

    monkeypatch.setattr(Answers, "ask", asked)
    monkeypatch.setattr(DecodingGraphs, "run", ran)
    monkeypatch.setattr(step_mod, "scaled_dot_product_attention", attended)
    if not few:
        monkeypatch.setattr(step_mod, "AHEAD", 0)
        monkeypatch.setattr(graph_mod, "AHEAD", 0)
    with model.graphed_decoding():
        assert_same([generated(model, ids)], [wanted])
    expected: list[str] = []
    for layer in range(model.config.num_hidden_layers):
        if layer not in layers:
            expected += [] if few else ["attend"]
        elif few or name == "mlp_token":
            expected += ["ask", "attend", "wait"]
        else:
            expected += ["ask", "wait", *(["attend"] if layer != layers[-1] else [])]
    assert events == expected * (NEW - 1)


def test_hooks_see_what_every_layer_returns(exports, graphs):
    model = load_model(exports.export("attn_token_all"), dtype=torch.float32).eval()
    ids = torch.tensor([exports.prompts[0]])
    seen: list[torch.Tensor] = []
    hooks = [
        layer.register_forward_hook(lambda layer, args, output: seen.append(output.clone()))
        for layer in model.model.layers
    ]
    wanted = generated(model, ids)
    without, seen = seen, []
    with model.graphed_decoding():
        assert_same([generated(model, ids)], [wanted])
    assert len(seen) == len(without)
    for ours, theirs in zip(seen, without, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    for hook in hooks:
        hook.remove()


def test_steps_that_need_more_run_as_ever(exports, graphs):
    model = load_model(exports.export("block_token_all"), dtype=torch.float32).eval()
    ids = torch.tensor([exports.prompts[0]])
    with model.graphed_decoding():
        with torch.no_grad():
            cache = model(ids, use_cache=True).past_key_values
            found = model(ids[:, :1], past_key_values=cache, output_hidden_states=True)
        different = {float(states.sum()) for states in found.hidden_states}
        assert len(different) > 1
        assert model(ids[:, :1], past_key_values=cache).logits.requires_grad
        assert not graphs


def test_what_cannot_be(exports, monkeypatch):
    model = load_model(exports.export("block_token_all"), dtype=torch.float32)
    with pytest.raises(ValueError, match="graphed_decoding: CUDA graphs need a GPU"):
        model.graphed_decoding().__enter__()
    monkeypatch.setattr(DecodingGraphs, "work_on", staticmethod(lambda device: True))
    with pytest.raises(ValueError, match=r"in training; call eval\(\)"):
        model.train().graphed_decoding().__enter__()
    model.eval().set_attn_implementation("eager")
    with pytest.raises(ValueError, match="is 'eager'; load the model with 'sdpa'"):
        model.graphed_decoding().__enter__()


def test_mixtures_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(DecodingGraphs, "work_on", staticmethod(lambda device: True))
    size = {"num_local_experts": 3, "num_experts_per_tok": 2}
    mixtures = Exports(tmp_path, "mixtral", plain=True, **size)
    model = load_model(mixtures.export("attn_token_all"), dtype=torch.float32).eval()
    with pytest.raises(ValueError, match="which experts a token goes to"):
        model.graphed_decoding().__enter__()


def test_they_are_timed_beside_the_dense_model(graphs):
    pair = Pair.of_shape("tiny", "block_token", dtype=torch.float32)
    row = pair.measure(1, 16, repetitions=1, new_tokens=3, capacity=0.5)
    assert graphs
    assert row["graphed"].keys() == row["decode"].keys()
    assert pair.plain.model.graphs is pair.routed.model.graphs is None
    ids = pair.prompts(2, 16)
    with torch.no_grad():
        assert torch.equal(pair.plain(ids).logits, pair.dense(ids).logits)
