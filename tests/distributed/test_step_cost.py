"""What a training step does not do beside what it must compute."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.distributed import cases
from tests.distributed.test_granularities import EVERY, SELECTED, SPARSE, make_case
from tests.helpers import tiny
from tests.helpers.ranks import meet


@pytest.fixture(scope="module")
def case(tmp_path_factory, single_process):
    """A model whose queries see a window, so that its attention needs masks."""
    return make_case(tmp_path_factory.mktemp("mistral"), *tiny.FAMILIES["mistral"])


class BatchedProducts(TorchDispatchMode):
    """Counts batched products by one matrix, repeated."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten.bmm.default:
            self.count += any(factor.stride(0) == 0 for factor in args)
        return function(*args, **(kwargs or {}))


def step(case, routing, *, loss: str = "task", packed: bool = False) -> None:
    from megatron_mod.conversion.restore import put_added
    from megatron_mod.routing.capacity import CapacityController
    from megatron_mod.training.optimizer import wrap_ddp
    from megatron_mod.training.plan import LOSSES
    from megatron_mod.training.step import run_schedule

    _, base, samples, added = case
    ranks = meet()
    model = cases.build(base, ranks, routing=routing)
    put_added(model, cases.only(added, routing))
    batch = cases.pack(samples) if packed else cases._loader(samples, ranks, False).step(0)
    chunks, controller = (
        wrap_ddp(model, use_distributed_optimizer=False),
        CapacityController(routing),
    )
    run_schedule(chunks, model, batch, routing, controller=controller, loss=LOSSES[loss]())


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("loss", ["task", "both"])
def test_a_frozen_weight_takes_one_product_each_way(case, loss, packed):
    """A transposed gradient would make it one for each position of a row."""
    with BatchedProducts() as seen:
        for routing in (EVERY[0], EVERY[1], SELECTED[1], SPARSE[0], SPARSE[3]):
            step(case, routing, loss=loss, packed=packed)
    assert seen.count == 0


def test_a_mask_is_made_once_for_all_layers(case, monkeypatch):
    from megatron_mod.model import attention

    made, visible = [], attention._visible
    monkeypatch.setattr(attention, "_visible", lambda *a, **k: made.append(1) or visible(*a, **k))
    step(case, EVERY[0])
    assert len(made) == 4  # micro-batches


def test_rotary_angles_of_packed_rows_are_taken_once_for_all_layers():
    from megatron_mod.model.layout import TokenLayout

    table = torch.randn(8, 1, 1, 4)
    layout = TokenLayout(
        roles=torch.ones(1, 8, dtype=torch.uint8),
        position_ids=torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4]]),
        documents=((3, 5),),
    )
    angles = layout.rotary(table)
    assert torch.equal(angles[3:, 0], table[:5, 0])
    assert layout.rotary(table) is angles
    assert not torch.equal(layout.rotary(table + 1), angles)
