"""Which samples a run reads with their hidden states, and which of these are not kept yet."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch.distributed as dist

from megatron_mod.config.schema import Config
from megatron_mod.data.chat import Sample
from megatron_mod.data.dataset import Samples
from megatron_mod.data.prefix_states import StatesEntry
from megatron_mod.training.plan import Plan, make_loader
from megatron_mod.training.start import steps_read


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

    def by_entry(self, items: np.ndarray) -> Iterator[tuple[StatesEntry, np.ndarray]]:
        """Each entry that has some of the items, and these."""
        for number, entry in enumerate(self.entries):
            if len(its := items[self.entry[items] == number]):
                yield entry, its

    def nbytes(self, items: np.ndarray) -> int:
        """Bytes that the states of the items take."""
        return sum(entry.nbytes(self.place[its]) for entry, its in self.by_entry(items))

    def missing(self, among: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The items whose states are not there or damaged, and the damaged ones, ascending; all
        ranks, which share the reading."""
        share = among[dist.get_rank() :: dist.get_world_size()]
        absent, damaged = [among[:0]], [among[:0]]
        for entry, its in self.by_entry(share):
            noted = entry.noted(self.place[its])
            absent.append(its[~noted])
            its = its[noted]
            damaged.append(its[~entry.whole(self.place[its])])
        everybody: list = [None] * dist.get_world_size()
        dist.all_gather_object(everybody, (np.concatenate(absent), np.concatenate(damaged)))
        all_absent, all_damaged = map(np.concatenate, zip(*everybody, strict=True))
        return np.sort(np.concatenate((all_absent, all_damaged))), np.sort(all_damaged)


def needed_by(config: Config, plan: Plan) -> Needed:
    """What a run reads: at its start, in its steps, and to validate; the samples of the plan say
    where their states are kept."""
    plain = replace(plan, train=plan.train.without_states())
    loader = make_loader(config, plain, plain.train, data_rank=0)
    steps = max(plan.steps, steps_read(config, plan, loader))
    read = [(plan.train, loader.order.first(steps * config.train.global_batch_size).numpy())]
    if plan.validation:
        read.append((plan.validation, np.arange(len(plan.validation))))
    entries: list[StatesEntry] = []
    table = []
    for number, (samples, indices) in enumerate(read):
        first = 0
        for part in samples.parts:
            states, places = part.states, part.places()
            assert states is not None
            if states.path not in [entry.path for entry in entries]:
                entries.append(states)
            entry = [entry.path for entry in entries].index(states.path)
            rows = indices[(first <= indices) & (indices < first + len(places))]
            table.append(np.stack(np.broadcast_arrays(entry, places[rows - first], number, rows)))
            first += len(places)
    columns = np.concatenate(table, axis=1)
    _, once = np.unique(columns[:2], axis=1, return_index=True)
    of_entry, place, of, row = columns[:, once]
    lengths = np.empty_like(place)
    for number, each in enumerate(entries):
        lengths[of_entry == number] = each.lengths[place[of_entry == number]]
    without = [samples.without_states() for samples, _ in read]
    return Needed(entries, of_entry, place, lengths, of, row, without)
