"""The routing rules, each against its formula."""

from __future__ import annotations

import json
import math

import pytest
import torch

from megatron_mod.routing.capacity import CapacityController
from megatron_mod.routing.config import RoutingConfig, resolve_capacity, resolve_layers
from megatron_mod.routing.decision import keep_mask
from megatron_mod.routing.masks import TokenRole, pooled_tokens, valid_tokens
from megatron_mod.routing.quantile import borders
from megatron_mod.routing.router import Router
from megatron_mod.routing.scheme import Place


def decide(logits, *, border=0.0, penalty=0.0, valid=None, **more):
    valid = torch.ones_like(logits, dtype=torch.bool) if valid is None else valid
    return keep_mask(logits, valid, border=border, penalty=torch.tensor(penalty), **more)


def config(**changes):
    settings = {"granularity": "attn_sequence", "layers": (3, 5), "capacity": (0.5, 0.75)}
    return RoutingConfig(**{**settings, **changes})


def test_an_untrained_router_keeps_everything():
    router = Router(8)
    logits = router(torch.randn(6, 2, 8))
    assert torch.equal(logits, torch.zeros(6, 2))
    assert decide(logits, border=config().logit_border(Place(3, "attn"))).min() == 1


def test_logits_are_fp32_in_a_bf16_model():
    router = Router(64)
    router.weight.data.normal_()
    hidden = torch.randn(3, 64).bfloat16()
    exact = (hidden.double() @ router.weight.double().t()).squeeze(-1)
    assert router(hidden).dtype == torch.float32
    torch.testing.assert_close(router(hidden).double(), exact, rtol=1e-5, atol=1e-5)


def test_a_layer_may_have_its_own_threshold():
    made = config(threshold=(0.5, 0.9))
    assert made.logit_border(Place(3, "attn")) == 0.0
    assert made.logit_border(Place(5, "attn")) == pytest.approx(math.log(9))
    assert RoutingConfig.from_dict(json.loads(json.dumps(made.to_dict()))) == made
    everything, nothing = config(threshold=0.0), config(threshold=1.0)
    borders = [one.logit_border(Place(3, "attn")) for one in (everything, nothing)]
    assert borders == [-math.inf, math.inf]


@pytest.mark.parametrize("threshold", [0.3, 0.5, 0.9])
def test_ties_are_kept_and_the_next_smaller_number_is_not(threshold):
    border = config(threshold=threshold).logit_border(Place(3, "attn"))
    assert border == math.log(threshold / (1 - threshold))
    at = torch.tensor(border, dtype=torch.float32)
    if float(at) < border:  # the nearest fp32 lies below
        at = torch.nextafter(at, torch.tensor(math.inf))
    below = torch.nextafter(at, torch.tensor(-math.inf))
    logits = torch.stack([at, below])
    assert decide(logits, border=border).tolist() == [1.0, 0.0]


def test_gradient_is_straight_through_plus_the_penalty():
    logits = torch.tensor([-2.0, -1e-7, 0.0, 3.0, 5.0], requires_grad=True)
    downstream = torch.tensor([1.0, -2.0, 0.5, 4.0, 9.0])
    valid = torch.tensor([True, True, True, True, False])
    pull = torch.tensor([1.0, 2.0])
    mask = decide(logits, penalty=0.25, valid=valid, pull=pull)
    (mask * downstream).sum().backward()
    probability = torch.sigmoid(logits.detach())
    slope = probability * (1 - probability) * valid
    assert mask.tolist() == [0, 0, 1, 1, 0]
    torch.testing.assert_close(logits.grad, slope * (downstream + 0.25))
    added = torch.stack([(slope * downstream).sum(), slope.sum()])
    torch.testing.assert_close(pull, torch.tensor([1.0, 2.0]) + added)


def test_what_is_skipped_may_hear_nothing():
    logits = torch.tensor([-2.0, 1.0, 3.0], requires_grad=True)
    downstream = torch.tensor([1.0, 0.5, 4.0])
    pull = torch.zeros(2)
    (decide(logits, penalty=0.25, only_kept=True, pull=pull) * downstream).sum().backward()
    slope = torch.sigmoid(logits.detach()) * torch.sigmoid(-logits.detach())
    slope[0] = 0
    torch.testing.assert_close(logits.grad, slope * (downstream + 0.25))
    torch.testing.assert_close(pull, torch.stack([(slope * downstream).sum(), slope.sum()]))


def end_step(controller, capacity, pull=((0.0, 1.0), (0.0, 1.0)), num_units=8):
    controller.end_step(torch.tensor(capacity), torch.tensor(pull), num_units)


def test_penalty_is_on_before_the_first_step_then_follows_the_last_capacity():
    controller = CapacityController(config(scope="layer", capacity_loss_weight=2.0))
    assert controller.penalty_per_unit(8).tolist() == [0.25, 0.25]
    end_step(controller, [0.5, 0.8])  # at the target is not above it
    assert controller.penalty_per_unit(8).tolist() == [0.0, 0.25]
    assert float(controller.penalty(torch.tensor([0.9, 0.9]))) == pytest.approx(2 * (0.9 - 0.75))


def test_model_scope_compares_means_so_one_layer_may_stay_on():
    controller = CapacityController(config(scope="model"))
    end_step(controller, [1.0, 0.2])  # mean 0.6 under the mean target 0.625
    assert controller.penalty_per_unit(4).tolist() == [0.0, 0.0]
    end_step(controller, [1.0, 0.3])
    assert controller.penalty_per_unit(4).tolist() == [0.25, 0.25]


def test_target_falls_from_one_over_the_warm_up():
    controller = CapacityController(
        config(capacity=(0.5, 0.7), scope="layer", capacity_warmup_fraction=0.4)
    )
    for progress, targets in ((0.0, [1.0, 1.0]), (0.1, [0.875, 0.925]), (0.4, [0.5, 0.7])):
        controller.start_step(progress)
        torch.testing.assert_close(controller.target, torch.tensor(targets))
    controller.start_step(0.0)
    assert controller.penalty_per_unit(4).tolist() == [0.0, 0.0]  # 1 is not above 1
    controller.start_step(1.0)
    assert controller.penalty_per_unit(4).tolist() == [0.25, 0.25]


def test_controller_state_survives():
    made = config(capacity_loss_weight="auto", scope="layer")
    first, second = CapacityController(made), CapacityController(made)
    for controller in (first, second):
        end_step(controller, [0.1, 0.2], ((0.1, 0.3), (0.7, 0.9)))
    state = json.loads(json.dumps(first.state_dict()))
    second = CapacityController(made)
    second.load_state_dict(state)
    assert torch.equal(first.previous, second.previous)
    assert torch.equal(first.price, second.price)
    second.load_state_dict({"previous": [1.0, 0.5]})  # of a run from before there was a price
    assert second.price is None


@pytest.mark.parametrize("scope", ["layer", "model"])
def test_a_price_leaves_nothing_for_moving_all_logits(scope):
    """At the price found in a step, the gradients of that step's logits add up to zero."""
    controller = CapacityController(config(capacity_loss_weight="auto", scope=scope))
    assert controller.penalty_per_unit(40).tolist() == [0.0, 0.0]
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(2, 40, generator=generator)
    downstream = torch.randn(2, 40, generator=generator) - 0.5

    def gradients():
        found, pulls = [], torch.zeros(2, 2)
        for layer, price in enumerate(controller.penalty_per_unit(40)):
            own = logits[layer].clone().requires_grad_()
            mask = decide(own, penalty=float(price), pull=pulls[layer])
            (mask * downstream[layer]).sum().backward()
            found.append(own.grad)
        return torch.stack(found), pulls

    before, pulls = gradients()
    controller.end_step(torch.tensor([0.5, 0.5]), pulls, 40)
    assert controller.price.min() > 0, "keeping a unit lowers the loss here"
    after, again = gradients()
    torch.testing.assert_close(again, pulls)  # the price is no part of what is found
    left = after.sum(1) if scope == "layer" else after.sum()
    assert before.sum(1).abs().min() > 1
    assert left.abs().max() < 1e-5
    first = controller.price
    controller.end_step(torch.tensor([0.5, 0.5]), torch.tensor([[0.0, 1.0], [0.0, 1.0]]), 40)
    torch.testing.assert_close(controller.price, 0.7 * first)
    assert float(controller.penalty(torch.tensor([0.9, 0.9]))) == 0.0


def kept_by(scores, shares, *, together=False):
    """Shares of each layer's units that the borders keep, as one rank and as two find them."""
    found = []
    for parts in ([scores], [scores[:, ::2], scores[:, 1::2]]):
        whole = max(part.shape[1] for part in parts)
        parts = [torch.nn.functional.pad(p, (0, whole - p.shape[1]), value=math.nan) for p in parts]
        found.append(meet(parts, torch.tensor(shares), together=together))
    torch.testing.assert_close(found[0], found[1], rtol=1e-6, atol=1e-6)
    kept = (scores.double() >= found[0][:, None]).sum(1) / scores.isfinite().sum(1)
    return kept.tolist(), found[0].tolist()


def meet(parts, shares, *, together):
    """What ``borders`` finds when ranks hold parts, each in a thread of its own."""
    from concurrent.futures import ThreadPoolExecutor
    from threading import Barrier

    barrier, said, found = Barrier(len(parts)), [None] * len(parts), []

    def reduced(rank, how):
        def reduce(values):
            said[rank] = values.clone()
            barrier.wait()
            total = how(torch.stack(said))
            barrier.wait()
            return total

        return reduce

    def one(rank):
        return borders(
            parts[rank],
            shares,
            together=together,
            add_up=reduced(rank, lambda all_: all_.sum(0)),
            largest=reduced(rank, lambda all_: all_.amax(0)),
        )

    with ThreadPoolExecutor(len(parts)) as pool:
        found = list(pool.map(one, range(len(parts))))
    assert all(torch.equal(found[0], other) for other in found)
    return found[0]


def test_borders_keep_the_share_that_is_wanted():
    generator = torch.Generator().manual_seed(2)
    scores = torch.randn(3, 1000, generator=generator)
    scores[1] = scores[1] * 1e-3 + 7
    scores[2, 5] = 1e4  # one massive activation
    scores[0, 900:] = math.nan
    kept, _ = kept_by(scores, [0.5, 0.25, 0.9])
    assert kept == pytest.approx([0.5, 0.25, 0.9], abs=0.004)
    kept, found = kept_by(scores, [0.2, 0.5, 0.8], together=True)
    assert len(set(found)) == 1
    assert sum(k * n for k, n in zip(kept, (900, 1000, 1000), strict=True)) == pytest.approx(
        1450, abs=1
    )


def test_borders_of_few_units_lie_between_two():
    scores = torch.tensor([[4.0, 1.0, 2.0, 3.0], [0.5, 0.5, 0.5, -1.0], [2.0, 2.0, 2.0, 2.0]])
    for shares, wanted, found in (
        ([0.5, 0.5, 0.5], [0.5, 0.75, 1.0], [2.5, -0.25, 1.95]),
        ([1.0, 1.0, 1.0], [1.0, 1.0, 1.0], [0.95, -1.05, 1.95]),
        ([0.3, 1e-6, 0.1], [0.5, 0.75, 1.0], [2.5, -0.25, 1.95]),
    ):
        kept, at = kept_by(scores, shares)
        assert kept == wanted
        assert at == pytest.approx(found)
    kept, _ = kept_by(torch.full((1, 40), 0.1) + 1e-8 * torch.randn(1, 40), [0.9])
    assert kept == [1.0], "rounding parts nothing"
    nothing = torch.full((2, 3), math.nan)
    assert meet([nothing], torch.tensor([0.5, 0.5]), together=False).tolist() == [0.0, 0.0]


def test_pooling_sees_the_prompt_or_everything_but_padding():
    roles = torch.tensor(
        [[TokenRole.PROMPT, TokenRole.PROMPT, TokenRole.ANSWER, TokenRole.PADDING]]
    )
    assert pooled_tokens(roles, pooling="prompt").tolist() == [[True, True, False, False]]
    assert pooled_tokens(roles, pooling="all").tolist() == [[True, True, True, False]]
    assert torch.equal(valid_tokens(roles), pooled_tokens(roles, pooling="all"))


def test_deepest_leaves_out_the_last_layer_as_published():
    assert resolve_layers({"deepest": 16}, num_layers=32) == tuple(range(15, 31))
    assert resolve_layers([5, 1], num_layers=6) == (1, 5)


def test_all_layers_are_all_with_the_first_and_the_last():
    assert resolve_layers("all", num_layers=3) == (0, 1, 2)


def test_every_counts_from_its_offset():
    assert resolve_layers({"every": 2}, num_layers=6) == (1, 3, 5)
    assert resolve_layers({"every": 2, "offset": 0}, num_layers=6) == (0, 2, 4)
    assert resolve_layers({"every": 3, "offset": 1}, num_layers=6) == (1, 4)


@pytest.mark.parametrize(
    ("granularity", "pooling", "keys_values"),
    [
        ("attn_sequence", "prompt", None),
        ("attn_token", None, "all"),
        ("mlp_sequence", "prompt", None),
        ("mlp_token", None, None),
        ("block_sequence", "prompt", None),
        ("block_token", None, "all"),
    ],
)
def test_settings_belong_to_their_granularity(granularity, pooling, keys_values):
    made = config(granularity=granularity)
    assert (made.pooling, made.keys_values) == (pooling, keys_values)
    assert RoutingConfig.from_dict(made.to_dict()) == made
    for name, belongs in (("pooling", pooling), ("keys_values", keys_values)):
        if belongs is None:
            with pytest.raises(ValueError, match=f"router.{name} = 'all'.*no meaning"):
                config(granularity=granularity, **{name: "all"})
        else:
            assert getattr(config(granularity=granularity, **{name: "all"}), name) == "all"


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ({"deepest": 6}, "use 1 to 5"),
        ({"deepest": 0}, "use 1 to 5"),
        ({"evry": 2}, "the rules are 'all', 'deepest: n' and 'every: n'"),
        ({"deepest": 2, "offset": 1}, "'every: n'"),
        ({"every": 7}, "must be 1 to 6"),
        ({"every": 0}, "must be 1 to 6"),
        ({"every": 2, "offset": 6}, "must be 0 to 5"),
        ([0, 6], r"\[6\] out of range; this model has layers 0 to 5"),
        ([2, 2], "twice"),
        ([], "at least one layer, or use 'deepest: n' or 'all'"),
    ],
)
def test_layers_that_do_not_fit_are_refused(layers, message):
    with pytest.raises(ValueError, match=message):
        resolve_layers(layers, num_layers=6)


def test_capacity_is_one_number_or_one_per_layer():
    assert resolve_capacity(0.5, num_layers=3) == (0.5, 0.5, 0.5)
    assert resolve_capacity([0.2, 1.0], num_layers=2) == (0.2, 1.0)
    with pytest.raises(ValueError, match="has 1 values, but router.layers routes 2"):
        resolve_capacity([0.5], num_layers=2)
    with pytest.raises(ValueError, match=r"router.capacity = 0\.0"):
        resolve_capacity(0.0, num_layers=2)


def test_average_is_the_mean_of_what_it_saw():
    from megatron_mod.training.average import ParameterAverage

    router = Router(4)
    average = ParameterAverage({"router": router.weight})
    with average.applied():  # nothing seen: nothing changes
        assert not router.weight.any()
    seen = torch.randn(5, 1, 4)
    for weight in seen:
        router.weight.data.copy_(weight)
        average.update()
    with average.applied(when=False):
        assert torch.equal(router.weight.data, seen[-1])
    with average.applied():
        torch.testing.assert_close(router.weight.data, seen.mean(0))
    assert torch.equal(router.weight.data, seen[-1])  # what the optimizer goes on from


def test_routing_imports_no_megatron():
    import subprocess
    import sys

    code = (
        "import sys, megatron_mod.routing.capacity, megatron_mod.routing.decision, "
        "megatron_mod.routing.router, megatron_mod.routing.masks, megatron_mod.routing.quantile, "
        "megatron_mod.routing.stand_in; "
        "sys.exit(any(m.split('.')[0] == 'megatron' for m in sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
