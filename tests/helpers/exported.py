"""Exports of tiny random models, and padded batches for them."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from tests.helpers import experts, formula
from tests.helpers.routed import save_export

ROUTED = (0, 2, 3)  # the first layer too: a cache must not read its length off it
LENGTHS = (5, 11, 8, 3, 9)
RANK = 3
SCHEMES = {**formula.SCHEMES, **formula.EXPERT_SCHEMES}
PAD, EXTRA = 50, 12  # a token with an embedding like any other, and more of it than needed


def load(export: Path, **changes):
    settings = {"trust_remote_code": True, "dtype": torch.float32, **changes}
    return AutoModelForCausalLM.from_pretrained(export, **settings).eval()


def pad(prompts: Sequence[Sequence[int]], side: str) -> tuple[Tensor, Tensor]:
    """Ids and attention mask, ``[B, longest + EXTRA]``, with padding on one side."""
    longest = max(map(len, prompts)) + EXTRA
    ids, mask = [], []
    for p in prompts:
        blank, real = [0] * (longest - len(p)), [1] * len(p)
        filling, p = [PAD] * len(blank), list(p)
        ids.append(filling + p if side == "left" else p + filling)
        mask.append(blank + real if side == "left" else real + blank)
    return torch.tensor(ids), torch.tensor(mask)


def positions(mask: Tensor) -> Tensor:
    return (mask.cumsum(-1) - 1).clamp(min=0)


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


class Exports:
    """A dense model, and for each scheme its routers and export; each made once.

    ``prompts`` differ in length; each routed layer keeps some of their sequences or tokens.
    ``plain``: routers as published; without, they have biases, and what is skipped stand-ins (but
    skipped experts none).
    """

    def __init__(self, folder: Path, family: str = "llama", *, plain: bool, **changes) -> None:
        generator = torch.Generator().manual_seed(5)
        self.folder = folder
        self.hf = formula.save_model(folder / "dense", family, **changes)
        self.dense = formula.load_dense(self.hf)
        self.prompts = [torch.randint(3, 128, (n,), generator=generator).tolist() for n in LENGTHS]
        self.plain = plain

    @functools.cache  # noqa: B019 (lives as long as its module's tests)
    def more(self, name: str) -> dict[int, dict[str, Tensor]]:
        """The routed layers' biases and stand-ins, if they have any."""
        if self.plain:
            return {}
        generator = torch.Generator().manual_seed(7)
        if name in formula.EXPERT_SCHEMES:
            count = experts.count(self.dense)
            return {n: {"router.bias": torch.randn(count, generator=generator)} for n in ROUTED}
        sizes, granularity = (self.dense.config.hidden_size, RANK), self.granularity(name)
        return {n: formula.bias_and_stand_in(*sizes, generator, granularity) for n in ROUTED}

    @staticmethod
    def granularity(name: str) -> str:
        return SCHEMES[name]["granularity"]

    def scheme(self, name: str) -> dict:
        """What the formula is told beside routers."""
        return {**SCHEMES[name], "more": self.more(name)}

    @functools.cache  # noqa: B019 (lives as long as its module's tests)
    def routers(self, name: str) -> formula.Routers:
        generator = torch.Generator().manual_seed(6)
        scheme = self.scheme(name)
        return formula.mixed_routers(self.dense, self.prompts, ROUTED, generator, **scheme)

    @functools.cache  # noqa: B019 (lives as long as its module's tests)
    def export(self, name: str) -> Path:
        settings = dict(SCHEMES[name])
        if not self.plain:
            rank = None if name in formula.EXPERT_SCHEMES else RANK
            settings.update(bias=True, stand_in_rank=rank)
        more = self.more(name)
        return save_export(self.folder / name, self.hf, self.routers(name), more, **settings)

    @functools.cache  # noqa: B019 (lives as long as its module's tests)
    def model(self, name: str, attention: str = "sdpa"):
        return load(self.export(name), attn_implementation=attention)

    @torch.no_grad()
    def formula(self, name: str, ids: Sequence[int], **extra):
        return formula.forward(self.dense, ids, self.routers(name), **self.scheme(name), **extra)

    def masks(self, name: str) -> list[formula.Routers]:
        """Each prompt's decisions by the formula: of each router ``[T]``."""
        return [self.formula(name, prompt)[1] for prompt in self.prompts]

    def greedy(self, name: str, prompt: Sequence[int], new: int) -> list[int]:
        return formula.greedy(self.dense, prompt, self.routers(name), new=new, **self.scheme(name))


@torch.no_grad()
def prefill(model, prompts, side="left", **extra):
    ids, mask = pad(prompts, side)
    return model(ids, attention_mask=mask, position_ids=positions(mask), **extra), mask


@torch.no_grad()
def decode(model, cache, mask, token=9):
    """Logits of one more token after a left-padded prefill."""
    return model(
        torch.full((len(mask), 1), token),
        attention_mask=torch.cat([mask, mask.new_ones(len(mask), 1)], 1),
        position_ids=mask.sum(1, keepdim=True),
        past_key_values=cache,
    ).logits[:, -1]
