"""A loss sees states, labels, and what the layers decided; its share is all there is."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from megatron_mod.data.batch import IGNORE
from megatron_mod.training.losses import Shares
from tests.helpers.runs import DEFAULT, Trainer, metrics


class FromLogits:
    """The cross entropy again, from logits, with something of the decisions beside it."""

    def __init__(self, weight: float = 0.0) -> None:
        self.weight, self.seen = weight, []

    def prepare(self, model, batch) -> None:
        pass

    def __call__(self, outcome, batch) -> Shares:
        labels = outcome.batch.labels
        states = outcome.states(torch.ones_like(labels).nonzero(as_tuple=True))
        logits = outcome.model.head(states).float()
        loss = torch.nn.functional.cross_entropy(
            logits, labels.flatten(), ignore_index=IGNORE, reduction="sum"
        )
        made = outcome.decisions
        self.seen.append(sorted(made))
        assert all(d.logits.shape == d.mask.shape == d.valid.shape for d in made.values())
        small = sum((d.logits.square() * d.valid).sum() for d in made.values())
        task = loss / batch.num_labels
        return Shares(task + self.weight * small / batch.num_sequences, task.detach())


@pytest.fixture(scope="module")
def trainer(tmp_path_factory, single_process):
    return Trainer(tmp_path_factory.mktemp("trainer"))


def train(trainer, run, loss=None) -> list[dict]:
    from megatron_mod.config import cli
    from megatron_mod.training import loop
    from megatron_mod.training.plan import prepare

    config = cli.parse(trainer.arguments(run, train__steps=3))
    plan = prepare(config)
    loop.train(config, replace(plan, loss=loss) if loss else plan)
    return metrics(run)


def test_a_loss_may_read_all_logits_and_decisions(trainer, tmp_path):
    usual = train(trainer, tmp_path / "usual")
    loss = FromLogits()
    same = train(trainer, tmp_path / "same", loss)
    assert len(loss.seen) == 3 * 2  # steps and micro-batches
    assert {tuple(places) for places in loss.seen} == {((1, "attn"), (2, "attn"))}
    for line, expected in zip(same, usual, strict=True):
        assert line["task_loss"] == pytest.approx(expected["task_loss"], rel=1e-5)
        assert line["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-4)
    other = train(trainer, tmp_path / "other", FromLogits(weight=0.5))
    assert other[0]["task_loss"] == pytest.approx(usual[0]["task_loss"])  # all logits are 0 yet
    assert other[1]["task_loss"] == pytest.approx(usual[1]["task_loss"], rel=1e-2)
    more, before = (line[1]["loss"] - line[1]["task_loss"] for line in (other, usual))
    assert more > before + 1e-3
    assert other[1]["grad_norm"] != pytest.approx(usual[1]["grad_norm"], rel=1e-3)


def test_routers_are_trained_on_texts(trainer, tmp_path):
    """Every token but a piece's first is labelled; a sequence's decision has no prompt to see."""
    text = tmp_path / "some.txt"
    text.write_text("Words of a text. " * 30)
    both = f'{{"{text}": 2, "{trainer.text}": 1}}'
    with pytest.raises(ValueError, match="pooling = prompt: data.train has texts.*pooling to all"):
        trainer.train(tmp_path / "refused", data__train=both, router__pooling="prompt")
    found = trainer.train(tmp_path / "run", data__train=both)
    assert found["train"]["tokens"] > 0
    tokens = {**DEFAULT, "router__granularity": "block_token"}
    trainer.train(tmp_path / "tokens", **tokens, data__train=str(text))
