"""What trains is told by the module that adds it; whatever it is, it is saved and gone on from."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from megatron_mod.checkpoint.distributed import load_tensors
from megatron_mod.parallel.topology import plan
from tests.helpers.runs import Trainer, metrics


class Gate(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(4, 2, bias=False)  # as Megatron's experts call theirs


class Layer(nn.Module):
    adds = {"router": "routers", "adapters": "adapters"}  # noqa: RUF012

    def __init__(self) -> None:
        super().__init__()
        self.mlp = Gate()
        self.router = nn.Linear(4, 1, bias=False)
        self.adapters = nn.ModuleDict({"router": nn.Linear(4, 4)})


def test_a_part_is_what_its_owner_says_whatever_it_is_called():
    from megatron_mod.model.trainable import BASE, frozen_digests, open_parts, parts_of

    model = nn.ModuleList([Layer(), Gate()])
    part = parts_of(model)
    assert {name: part(name) for name in model.state_dict()} == {
        "0.mlp.router.weight": BASE,
        "0.router.weight": "routers",
        "0.adapters.router.weight": "adapters",
        "0.adapters.router.bias": "adapters",
        "1.router.weight": BASE,
    }
    for opened in ([], ["routers"], ["routers", "adapters"], [BASE]):
        open_parts(model, opened)
        trains = {name for name, p in model.named_parameters() if p.requires_grad}
        assert trains == {name for name in model.state_dict() if part(name) in opened}
        assert trains.isdisjoint(frozen_digests(model))
        assert trains | set(frozen_digests(model)) == set(model.state_dict())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_digest_tells_of_every_bit_and_place(single_process, dtype):
    from megatron_mod.model.trainable import COLUMNS, count_changed, frozen_digests

    model = nn.ParameterDict(
        {str(size): nn.Parameter(torch.randn(size).to(dtype)) for size in (1, 3, 512, 4099)}
    ).requires_grad_(False)
    before = frozen_digests(model)
    assert count_changed(before, frozen_digests(model)) == 0
    assert all(digest.shape == (COLUMNS,) for digest in before.values())  # no copies of weights
    for values in model.values():
        data = values.data.view(torch.uint8)
        for place in {0, 1, len(data) // 2, len(data) - 2, len(data) - 1}:
            for bit in (1, 128):
                data[place] ^= bit
                assert count_changed(before, frozen_digests(model)) == 1, (len(values), place)
                data[place] ^= bit
    words = model["4099"].data.view(torch.uint8)[: 16 * 8].view(16, 8)
    words[[2, 9]] = words[[9, 2]]
    assert count_changed(before, frozen_digests(model)) == 1


@pytest.fixture(scope="module")
def trainer(tmp_path_factory, single_process):
    return Trainer(tmp_path_factory.mktemp("trainer"))


@pytest.fixture
def adapters(monkeypatch):
    """Routed layers with a small matrix of their own, which trains with the router."""
    from megatron_mod.model.layer import RoutedTransformerLayer
    from megatron_mod.model.trainable import ROUTERS

    make, forward = RoutedTransformerLayer.__init__, RoutedTransformerLayer.forward

    def with_adapter(self, config, *args, **kwargs):
        make(self, config, *args, **kwargs)
        self.adapter = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        nn.init.zeros_(self.adapter.weight)

    def with_its_output(self, hidden_states, *args, **kwargs):
        output, rest = forward(self, hidden_states, *args, **kwargs)
        return output + self.adapter(hidden_states), rest

    monkeypatch.setattr(RoutedTransformerLayer, "__init__", with_adapter)
    monkeypatch.setattr(RoutedTransformerLayer, "forward", with_its_output)
    adds = {"router": ROUTERS, "adapter": ROUTERS}
    monkeypatch.setattr(RoutedTransformerLayer, "adds", adds)


def test_what_is_added_needs_nothing_else_to_be_saved_and_gone_on_from(trainer, adapters, tmp_path):
    from megatron_mod.conversion.restore import restore_model
    from megatron_mod.conversion.source import open_source

    whole, halves = tmp_path / "whole", tmp_path / "halves"
    summary = trainer.train(whole, optimizer__lr=0.01)["train"]
    assert summary["trainable_parameters"] == 2 * (32 + 32 * 32)
    assert summary["frozen_parameters_changed"] == 0
    trainer.train(halves, optimizer__lr=0.01)
    for step in ("step_00000004", "step_00000006"):  # as a job that was killed leaves it
        for path in sorted((halves / step).rglob("*"), reverse=True):
            path.rmdir() if path.is_dir() else path.unlink()
        (halves / step).rmdir()
    trainer.train(halves, optimizer__lr=0.01)
    assert metrics(halves) == metrics(whole)
    saved, again = (load_tensors(run / "step_00000006" / "state") for run in (whole, halves))
    assert saved.keys() == again.keys()
    trained = [key for key in saved if not key.startswith("random.")]
    assert all(torch.equal(saved[key], again[key]) for key in trained)

    model, _ = restore_model(open_source(whole), plan(tensor=1, pipeline=1, world_size=1))
    for index, layer in model.routed_layers().items():
        mean = saved[f"average.decoder.layers.{index}.adapter.weight"]
        assert mean.any()
        assert torch.equal(layer.adapter.weight, mean)
