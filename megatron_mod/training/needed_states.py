"""Which samples a run reads with their hidden states, and which of these are not kept yet."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

import numpy as np
import torch.distributed as dist

from megatron_mod.config.schema import Config
from megatron_mod.data.chat import Sample
from megatron_mod.data.dataset import Samples
from megatron_mod.data.prefix_states import StatesEntry
from megatron_mod.training.plan import Plan, make_loader
from megatron_mod.training.start import steps_read

Items: TypeAlias = Sequence[int] | np.ndarray


@dataclass(frozen=True)
class Needed:
    """Samples, each once; all arrays are int64 and as long as there are samples.

    Args:
        entries: where their states are kept.
        entry, place: of each sample, which of the ``entries``, and its place there.
        lengths: its tokens.
        of: which of ``samples`` it can be read from.
        row: its index there.
        samples: training samples, and validation samples if there are any.
    """

    entries: list[StatesEntry]
    entry: np.ndarray
    place: np.ndarray
    lengths: np.ndarray
    of: np.ndarray
    row: np.ndarray
    samples: list[Samples]

    def __len__(self) -> int:
        return len(self.place)

    def sample(self, item: int) -> Sample:
        return self.samples[self.of[item]][int(self.row[item])]

    def by_entry(self, items: Items) -> Iterator[tuple[StatesEntry, np.ndarray]]:
        """Each entry that has some of the items, and these."""
        chosen = np.asarray(items, dtype=np.int64)
        for number, entry in enumerate(self.entries):
            if len(its := chosen[self.entry[chosen] == number]):
                yield entry, its

    def nbytes(self, items: Items) -> int:
        """Bytes that the states of the items take."""
        return sum(entry.nbytes(self.place[its]) for entry, its in self.by_entry(items))

    def missing(self, among: Items) -> tuple[list[int], list[int]]:
        """The items whose states are not there or damaged, and the damaged ones, ascending; all
        ranks, which share the reading."""
        share = np.asarray(among, dtype=np.int64)[dist.get_rank() :: dist.get_world_size()]
        absent, damaged = [], []
        for entry, its in self.by_entry(share):
            noted = entry.noted(self.place[its])
            absent += its[~noted].tolist()
            its = its[noted]
            damaged += its[~entry.whole(self.place[its])].tolist()
        everybody: list = [None] * dist.get_world_size()
        dist.all_gather_object(everybody, (absent, damaged))
        absent = [item for found, _ in everybody for item in found]
        damaged = [item for _, found in everybody for item in found]
        return sorted(absent + damaged), sorted(damaged)


def needed_by(config: Config, plan: Plan) -> Needed:
    """What a run reads: at its start, in its steps, and to validate; the samples of the plan say
    where their states are kept."""
    without = plan.train.without_states()
    loader = make_loader(config, replace(plan, train=without), without, data_rank=0)
    steps = max(config.train.steps, steps_read(config, plan, loader))
    read = [(plan.train, loader.order.first(steps * config.train.global_batch_size).numpy())]
    if plan.validation:
        read.append((plan.validation, np.arange(len(plan.validation))))
    entries: list[StatesEntry] = []
    table = []
    for number, (samples, indices) in enumerate(read):
        first = 0
        for part in samples.parts:
            rows = indices[(first <= indices) & (indices < first + len(part))]
            places = part.places()[rows - first]
            assert part.states is not None, "samples of a plan that keeps no states"
            paths = [entry.path for entry in entries]
            if part.states.path not in paths:
                entries.append(part.states)
                paths.append(part.states.path)
            entry = np.full_like(rows, paths.index(part.states.path))
            table.append(np.stack((entry, places, np.full_like(rows, number), rows)))
            first += len(part)
    columns = np.concatenate(table, axis=1)
    _, once = np.unique(columns[:2], axis=1, return_index=True)
    entry, place, of, row = columns[:, once]
    lengths = np.empty_like(place)
    for number, each in enumerate(entries):
        lengths[entry == number] = each.lengths[place[entry == number]]
    plain = [samples.without_states() for samples, _ in read]
    return Needed(entries, entry, place, lengths, of, row, plain)
