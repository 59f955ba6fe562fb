"""Computing activations again changes memory and nothing else, whatever is routed and wherever."""

from __future__ import annotations

from collections import Counter
from itertools import chain

import pytest
import torch

from tests.distributed import cases
from tests.distributed.test_granularities import (
    ADDED_DEEP,
    DEEP,
    PIPELINE,
    SPARSE,
    TENSOR,
    check,
    make_case,
)
from tests.helpers import tiny
from tests.helpers.memory import kept_by_layer
from tests.helpers.ranks import meet
from tests.helpers.runs import DEFAULT, Trainer, metrics
from tests.helpers.thinned import one_in

VIRTUAL = {"pipeline": 2, "virtual_pipeline": 2}
FULL, SELECTIVE = {"recompute": "full"}, {"recompute": "selective"}
SOME = [DEEP[0], *ADDED_DEEP]


@pytest.fixture(scope="module")
def case(tmp_path_factory, single_process):
    return make_case(tmp_path_factory.mktemp("llama"), "llama", tiny.LLAMAS["odd_vocabulary"])


@pytest.mark.parametrize(
    ("trainings", "world", "topologies", "every"),
    [
        *one_in(
            3,
            [*DEEP, *ADDED_DEEP, *SPARSE[:2]],
            1,
            [FULL, SELECTIVE, {"packed": True, **FULL}],
            id="one_rank",
        ),
        *one_in(
            3,
            SOME,
            2,
            [{**TENSOR, **FULL}, {**VIRTUAL, **FULL}, {"context": 2, **FULL}],
            id="two_ranks",
        ),
        *one_in(
            2, SOME[:2], 2, [{**TENSOR, **SELECTIVE}, {**PIPELINE, **FULL}], id="two_ranks_few"
        ),
    ],
)
def test_loss_capacity_price_and_gradients_equal_the_formula(
    case, trainings, world, topologies, every, tmp_path
):
    check(case, trainings, world, topologies, tmp_path, every)


def step(case, routing, recompute: str) -> tuple[dict, dict, Counter]:
    """Gradients, what routers noted, and the bytes each layer keeps for backward."""
    from megatron_mod.conversion.restore import put_added
    from megatron_mod.routing.capacity import CapacityController
    from megatron_mod.training.optimizer import wrap_ddp
    from megatron_mod.training.step import run_schedule

    _, base, samples, added = case
    ranks = meet()
    model = cases.build(base, ranks, routing=routing, recompute=recompute)
    put_added(model, cases.only(added, routing))
    chunks = wrap_ddp(model, use_distributed_optimizer=False)
    for chunk in chunks:
        chunk.zero_grad_buffer()
    batch = cases._loader(samples, ranks, False, rows=8).step(0)
    with kept_by_layer(model[0].decoder.layers) as kept:
        run_schedule(
            chunks,
            model,
            batch,
            routing,
            controller=CapacityController(routing),
            note_units=True,
        )
    gradients, noted = {}, {}
    for index, layer in model.routed_layers().items():
        for name, parameter in layer.named_parameters():
            if parameter.requires_grad:
                gradients[index, name] = parameter.main_grad.clone()
        for place, router in layer.routers.items():
            noted[place] = [router.kept, router.valid, router.pull, *chain(*router.noted)]
    return gradients, noted, kept


@pytest.mark.parametrize("training", [DEEP[0], *ADDED_DEEP])
def test_to_the_bit_noted_once_and_less_is_kept(case, training):
    routing = getattr(training, "routing", training)
    gradients, noted, kept = step(case, routing, "none")
    assert all(gradient.any() for gradient in gradients.values())
    assert kept[0] == 0  # below the first router
    for recompute, most in (("selective", 0.75), ("full", 0.2)):
        again, noted_again, less = step(case, routing, recompute)
        assert again.keys() == gradients.keys()
        assert all(torch.equal(again[name], found) for name, found in gradients.items()), recompute
        for place, found in noted.items():
            assert len(noted_again[place]) == len(found)
            assert all(map(torch.equal, noted_again[place], found)), (recompute, place)
        assert less[0] == 0
        for layer in (1, 2, 3):
            assert 0 < less[layer] <= kept[layer], (recompute, layer, less, kept)
        assert less.total() < most * kept.total(), (recompute, less, kept)


def test_megatrons_own_checkpoint_around_routed_layers_is_refused(single_process):
    from megatron.core.transformer import TransformerConfig

    from megatron_mod.model.recompute import whole_layers

    settings = {"num_layers": 2, "hidden_size": 32, "num_attention_heads": 4}
    for method, layers in (("uniform", 1), ("block", 2)):
        config = TransformerConfig(
            recompute_granularity="full",
            recompute_method=method,
            recompute_num_layers=layers,
            **settings,
        )
        with pytest.raises(ValueError, match=f"recompute_method = '{method}'"):
            whole_layers(config)


def test_a_run_may_go_on_with_another_and_is_the_same(single_process, tmp_path):
    trainer = Trainer(tmp_path / "trainer")
    settings = {**DEFAULT, "train__steps": 4}
    trainer.train(tmp_path / "none", **settings)
    trainer.train(tmp_path / "other", **settings, train__recompute="full")
    assert metrics(tmp_path / "other") == metrics(tmp_path / "none")
    for run in ("none", "other"):
        settings["train__steps"] = 6
        trainer.train(tmp_path / run, **settings, train__recompute="selective")
    assert metrics(tmp_path / "other") == metrics(tmp_path / "none")
