"""Where a run starts: stand-ins solved and layers measured, each against a plain computation."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from megatron_mod.data.batch import blank_like, collate
from megatron_mod.data.chat import Sample
from megatron_mod.data.loader import StepBatch
from megatron_mod.parallel.topology import ONE_RANK
from megatron_mod.routing.config import RoutingConfig
from megatron_mod.routing.scheme import Place
from megatron_mod.routing.stand_in import Moments, StandIn
from tests.helpers import formula, tiny
from tests.helpers.training_formula import Scheme, forward

RANK, RIDGE = 5, 1e-2
LAYERS = (1, 2)


def numpy_stand_in(h: np.ndarray, x: np.ndarray, y: np.ndarray, rank: int, ridge: float):
    """``W`` and ``b`` by weighted least squares with the ridge as further rows, and by the SVD of
    the fitted values; and the share of the weighted variance explained."""
    w = 1 / (h.astype(np.float64) ** 2).mean(1)
    root, total = np.sqrt(w)[:, None], w.sum()
    mean_x, mean_y = (w @ x) / total, (w @ y) / total
    a, b = root * (x - mean_x), root * (y - mean_y)
    damping = ridge * (a**2).sum() / total / x.shape[1]
    a_more = np.concatenate((a, np.sqrt(damping * total) * np.eye(x.shape[1])))
    b_more = np.concatenate((b, np.zeros((x.shape[1], y.shape[1]))))
    whole, *_ = np.linalg.lstsq(a_more, b_more, rcond=None)
    _, _, directions = np.linalg.svd(a @ whole, full_matrices=False)
    best = directions[:rank].T @ directions[:rank]
    weight = (whole @ best).T
    explained = 1 - ((b - a @ weight.T) ** 2).sum() / (b**2).sum()
    return weight, mean_y - weight @ mean_x, explained


def test_the_closed_form_is_numpys():
    generator = np.random.default_rng(3)
    h, x = generator.normal(2, 3, (200, 12)), generator.normal(0.5, 1, (200, 12))
    h[7] *= 1e3  # a massive activation, which must not decide
    y = x @ generator.normal(size=(12, 12)) + generator.normal(size=(200, 12))
    y[7] += 1e4
    moments = Moments(12)
    for part in np.array_split(np.arange(200), 3):
        moments.add(*(torch.tensor(t[part]) for t in (h, x, y)))
    for rank in (1, 4, 12):
        found = moments.solve(rank, ridge=RIDGE)
        weight, bias, explained = numpy_stand_in(h, x, y, rank, RIDGE)
        assert found.down.shape == (rank, 12)
        np.testing.assert_allclose(found.up @ found.down, weight, rtol=1e-8, atol=1e-8)
        np.testing.assert_allclose(found.bias, bias, rtol=1e-8, atol=1e-8)
        assert found.explained == pytest.approx(explained, abs=1e-9)
    stand_in = StandIn(12, 12)
    assert not stand_in(torch.tensor(x).float()).any(), "it starts by adding nothing"
    stand_in.put(found)
    wanted = torch.tensor(x @ weight.T + bias).float()
    torch.testing.assert_close(stand_in(torch.tensor(x).float()), wanted, rtol=1e-4, atol=1e-4)


def test_nothing_to_learn_from_gives_nothing():
    for moments in (Moments(4), Moments(4)):
        solution = moments.solve(2, ridge=RIDGE)
        assert all(torch.isfinite(t).all() for t in solution[:3])
        assert not (solution.up @ solution.down).any()


@pytest.fixture(scope="module")
def case(tmp_path_factory, single_process):
    """A model in both forms, and samples of it in micro-batches with padding, one of it alone."""
    from transformers import AutoModelForCausalLM

    from megatron_mod.conversion.convert import hf_to_megatron

    root = tmp_path_factory.mktemp("start")
    hf = tiny.save_llama(root / "hf", num_key_value_heads=2)
    hf_to_megatron(hf, root / "base")
    generator = torch.Generator().manual_seed(4)
    samples = []
    for prompt, answer in [(3, 4), (9, 6), (5, 11), (7, 2), (4, 8), (12, 5), (6, 6), (3, 9)]:
        ids = torch.randint(3, 128, (prompt + answer,), generator=generator).tolist()
        samples.append(Sample(ids, [False] * prompt + [True] * answer, "made"))
    batches = [step_batch(samples[:4]), step_batch(samples[4:])]
    model = AutoModelForCausalLM.from_pretrained(hf, dtype=torch.float32).requires_grad_(False)
    return root / "base", model, samples, batches


def step_batch(samples: list[Sample]) -> StepBatch:
    micro_batches = [collate(samples[:2]), collate(samples[2:])]
    return StepBatch(
        [*micro_batches, blank_like(micro_batches[0])],
        num_sequences=len(samples),
        num_tokens=sum(len(sample.ids) for sample in samples),
        num_labels=sum(sample.num_labels for sample in samples),
        num_positions=0,
    )


def routed(base, granularity: str, *, dtype=torch.float32, **changes):
    from megatron_mod.conversion.restore import load_model
    from megatron_mod.conversion.source import open_base

    settings = {"stand_in_rank": RANK, "bias": True, "capacity_loss_weight": "auto", **changes}
    routers = len(LAYERS) * len(formula.targets_of(granularity))
    routing = RoutingConfig(granularity, LAYERS, (0.5,) * routers, **settings)
    return load_model(open_base(base), routing, ONE_RANK, implementation="local", dtype=dtype)


def seen(model, samples: list[Sample], target: str) -> dict[int, tuple]:
    """What a unit's residual stream, input and update are, of every token, in each layer."""
    found: dict[int, list] = {layer: [] for layer in LAYERS}
    taps: dict[str, torch.Tensor] = {}

    def tap(name):
        def hook(module, inputs, output):
            taps[name] = (output[0] if isinstance(output, tuple) else output)[0]
            taps["before " + name] = inputs[0][0] if inputs else None

        return hook

    hooks = [
        part.register_forward_hook(tap(f"{index} {name}"))
        for index in LAYERS
        for name, part in (
            ("layer", model.model.layers[index]),
            ("norm", model.model.layers[index].input_layernorm),
            ("attn", model.model.layers[index].self_attn),
            ("mlp norm", model.model.layers[index].post_attention_layernorm),
            ("mlp", model.model.layers[index].mlp),
        )
    ]
    for sample in samples:
        model(torch.tensor([sample.ids]))
        for index in LAYERS:
            x, out = taps[f"before {index} norm"], taps[f"{index} layer"]
            found[index].append({
                "attn": (x, taps[f"{index} norm"], taps[f"{index} attn"]),
                "mlp": (
                    taps[f"before {index} mlp norm"], taps[f"{index} mlp norm"],
                    taps[f"{index} mlp"],
                ),
                "block": (x, taps[f"{index} norm"], out.reshape(x.shape) - x),
            }[target])  # fmt: skip
    for hook in hooks:
        hook.remove()
    return {k: tuple(torch.cat(t).numpy() for t in zip(*v, strict=True)) for k, v in found.items()}


@pytest.mark.parametrize("granularity", ["mlp_sequence", "block_token", "attn_token+mlp_token"])
def test_stand_ins_are_fitted_to_what_the_dense_model_computes(case, granularity):
    from megatron_mod.training.stand_ins import fit_stand_ins

    base, hf, samples, batches = case
    model = routed(base, granularity)
    for router in model.routers().values():
        router.weight.data.normal_()  # it must not be asked
    explained = fit_stand_ins(model, batches)
    targets = formula.targets_of(granularity)
    assert list(explained) == [(layer, target) for layer in LAYERS for target in targets]
    tokens = {target: seen(hf, samples, target) for target in targets}
    for place, found in model.stand_ins().items():
        weight, bias, share = numpy_stand_in(*tokens[place.target][place.layer], RANK, RIDGE)
        np.testing.assert_allclose(
            (found.up.weight @ found.down.weight).detach(), weight, atol=2e-4 * abs(weight).max()
        )
        np.testing.assert_allclose(found.up.bias.detach(), bias, atol=2e-4 * abs(bias).max())
        assert explained[place] == pytest.approx(share, abs=1e-4)
        assert 0.2 < share < 1


def test_a_bf16_model_gets_nearly_the_same_stand_ins(case):
    from megatron_mod.training.stand_ins import fit_stand_ins

    base, _, _, batches = case
    wanted = fit_stand_ins(routed(base, "attn_token"), batches)
    model = routed(base, "attn_token", dtype=torch.bfloat16)
    found = fit_stand_ins(model, batches)
    for place, stand_in in model.stand_ins().items():
        assert stand_in.down.weight.dtype == torch.float32
        assert found[place] == pytest.approx(wanted[place], abs=0.02)


@pytest.mark.parametrize("granularity", ["attn_token+mlp_token", "mlp_token", "block_sequence"])
@pytest.mark.parametrize("rank", [None, RANK], ids=["nothing", "stand_in"])
def test_importance_is_the_divergence_without_a_layer(case, granularity, rank):
    from megatron_mod.training.importance import leave_one_out

    base, hf, samples, batches = case
    model = routed(base, granularity, stand_in_rank=rank)
    torch.manual_seed(6)
    for layer in model.routed_layers().values():
        for name, parameter in layer.named_parameters():
            if name.startswith(("stand_in", "router")):
                parameter.data.normal_(0, 0.2)
    places = list(model.routers())
    costs = leave_one_out(model, batches, places)
    assert model.training
    own = {
        index: {n: p.detach() for n, p in layer.named_parameters() if n.startswith("stand_in")}
        for index, layer in model.routed_layers().items()
    }
    scheme = Scheme(granularity, LAYERS, pooling="all", keys_values="all")
    for left_out in places:
        total, labels = 0.0, 0
        for sample in samples:
            dense = hf(torch.tensor([sample.ids])).logits[0].log_softmax(-1)
            added = {index: dict(stand_ins) for index, stand_ins in own.items()}
            for place in places:
                router = {
                    "router.weight": torch.zeros(1, 32),
                    "router.bias": torch.full((1,), -9.0 if place == left_out else 9.0),
                }
                for name, value in router.items():
                    name = formula.name_of(name, place.target, granularity)
                    added[place.layer][name] = value
            ours = forward(hf, sample.ids, sample.prompt_length, added, scheme)[0].log_softmax(-1)
            at = [i - 1 for i, label in enumerate(sample.labelled) if label and i]
            total += float((dense.exp() * (dense - ours))[at].sum())
            labels += len(at)
        assert costs[left_out] == pytest.approx(total / labels, rel=1e-3, abs=1e-6)
    assert min(costs.values()) > 1e-3


@pytest.mark.parametrize("threshold", [0.5, 0.7])
def test_routers_start_apart_and_keep_everything(case, threshold):
    from megatron_mod.routing.config import logit_border
    from megatron_mod.training.importance import start_apart

    model = routed(case[0], "attn_token", stand_in_rank=None)
    border = logit_border(threshold)
    start_apart(model, {Place(1, "attn"): 0.5, Place(2, "attn"): 0.0}, border=border)
    biases = {place.layer: float(router.bias) for place, router in model.routers().items()}
    assert min(biases.values()) == pytest.approx(border + 0.05)
    assert biases[1] > biases[2] + 0.5


@pytest.mark.parametrize("scope", ["model", "layer"])
def test_borders_are_settled_with_real_skipping(case, scope):
    from megatron_mod.training.borders import settle
    from megatron_mod.training.step import run_schedule

    base, _, _, batches = case
    model = routed(base, "block_token", scope=scope)
    torch.manual_seed(7)
    for router in model.routers().values():
        router.weight.data.normal_(0, 0.3)
    routing = replace(next(iter(model.routed_layers().values())).routing)
    before = {k: float(r.bias) for k, r in model.routers().items()}
    shares = torch.tensor([0.4, 0.7])
    moved, reached = settle(model, model, batches, routing, shares=shares)
    for (layer, router), shift in zip(model.routers().items(), moved.tolist(), strict=True):
        assert float(router.bias) == pytest.approx(before[layer] + shift, abs=1e-6)
    model.eval()
    kept = torch.zeros(2)
    with torch.no_grad():
        for batch in batches:
            result = run_schedule(model, model, batch, routing, controller=None)
            kept += result.capacity * result.num_units
    capacity = kept / sum(batch.num_tokens for batch in batches)
    assert reached.tolist() == pytest.approx(capacity.tolist(), abs=1e-6)
    if scope == "layer":
        assert capacity.tolist() == pytest.approx([0.4, 0.7], abs=0.02)
    else:
        assert float(capacity.mean()) == pytest.approx(0.55, abs=0.02)
        assert moved[0] == moved[1]
