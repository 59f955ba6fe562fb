"""Files and named datasets as the samples of a run."""

from __future__ import annotations

import json
import logging
from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path

import numpy as np
import torch

from megatron_mod.checkpoint.folders import partial_name, writing
from megatron_mod.config.schema import DataConfig
from megatron_mod.data.cache import default_folder, make_folder
from megatron_mod.data.chat import Records, Sample
from megatron_mod.data.encoding import Encoder
from megatron_mod.data.order import Order, epoch_length
from megatron_mod.data.prefix_states import StatesEntry
from megatron_mod.data.settings import OF_A_RUN, OF_A_TOOL, SettingNames
from megatron_mod.data.sources import files_of
from megatron_mod.data.store import Store, open_store

logger = logging.getLogger(__name__)

Sources = str | Path | Sequence[str] | Mapping[str, float]


@dataclass(frozen=True)
class Part:
    """Samples of one file: ``rows`` is a memory-mapped table (``datasets.Dataset``), ``weight``
    how many times an epoch holds each of them, ``states`` where their hidden states are kept, if
    they come with some."""

    store: Store
    rows: object
    weight: float
    states: StatesEntry | None = None

    def places(self) -> np.ndarray:
        """The place in the store of each sample, int64."""
        return self.rows.with_format("numpy", columns=["place"])[:]["place"]


class Samples(Sequence[Sample]):
    """The samples of several files, one after the other, read when they are asked for."""

    def __init__(self, parts: Iterable[Part]) -> None:
        self.parts = tuple(parts)
        self._ends = list(accumulate(len(part.rows) for part in self.parts))

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: int) -> Sample:
        if not 0 <= index < len(self):
            raise IndexError(index)
        number = bisect_right(self._ends, index)
        part = self.parts[number]
        row = part.rows[index - self._ends[number]]
        labelled = [False] * len(row["ids"])
        for start, stop in zip(row["spans"][::2], row["spans"][1::2], strict=True):
            labelled[start:stop] = [True] * (stop - start)
        source = f"{part.store.name}:{row['number']}"
        states = None if part.states is None else part.states.read(row["place"], source=source)
        return Sample(row["ids"], labelled, source, states)

    @property
    def weights(self) -> list[tuple[int, float]]:
        """Number of samples and weight of each file, as ``Order`` takes them."""
        return [(len(part.rows), part.weight) for part in self.parts]

    @property
    def has_texts(self) -> bool:
        """Whether some of them are pieces of texts, which have no prompts."""
        return any(part.store.summary.texts for part in self.parts)

    @property
    def identity(self) -> list[str]:
        """A fingerprint of each source's samples: their tokens, and which of them are labelled."""
        return [part.store.summary.fingerprint for part in self.parts]

    def without_states(self) -> Samples:
        """The same samples without their hidden states."""
        return Samples(replace(part, states=None) for part in self.parts)

    def split(self, share: float, *, seed: int) -> tuple[Samples, Samples]:
        """The rest and, of each file, a random ``share`` of the samples; the same for a seed.

        Raises:
            ValueError: one of the two would be empty.
        """
        generator = torch.Generator().manual_seed(seed)
        kept, held = [], []
        for part in self.parts:
            order = torch.randperm(len(part.rows), generator=generator)
            count = round(share * len(order))
            held.append(replace(part, rows=part.rows.select(order[:count].sort()[0].numpy())))
            kept.append(replace(part, rows=part.rows.select(order[count:].sort()[0].numpy())))
        rest, validation = Samples(kept), Samples(held)
        if not len(rest) or not len(validation):
            raise ValueError(
                f"data.validation_split = {share}: leaves {len(rest)} of {len(self)} samples to "
                f"train on and {len(validation)} to validate on; both need some."
            )
        return rest, validation

    def draw(self, count: int, *, seed: int) -> Samples:
        """``count`` samples at most, drawn by weight: the first ones of an epoch's order."""
        chosen = Order(self.weights, seed=seed).epoch(0)[:count].sort()[0].numpy()
        parts = []
        for part, end in zip(self.parts, self._ends, strict=True):
            first = end - len(part.rows)
            within = chosen[(first <= chosen) & (chosen < end)] - first
            parts.append(replace(part, rows=part.rows.select(within), weight=1.0))
        return Samples(parts)


def load_samples(
    sources: Sources,
    tokenizer,
    *,
    max_length: int,
    template: str = "auto",
    records: Records = "auto",
    on_bad_record: str = "stop",
    cache: str | Path | None = None,
    names: SettingNames = OF_A_TOOL,
) -> Samples:
    """Every usable sample, in the order of the files; tokenised once and kept in ``cache``.

    Samples whose answers ``max_length`` cuts away entirely are left out; what is left out is
    counted in the log.

    Args:
        sources: file, folder or named dataset, several of them, or a mapping to weights.
        records: what all of their records have to be.
        names: what messages call the settings.

    Raises:
        ValueError: nothing of that name; a bad record (with file, line and reason), unless
            ``on_bad_record`` is ``skip``; a source without a usable sample; a cache that cannot
            be written.
    """
    import datasets  # two seconds: only for those who read data

    encoder = Encoder(tokenizer, max_length=max_length, template=template, names=names)
    folder = Path(cache) if cache else default_folder()
    make_folder(folder, setting=names.cache if cache else OF_A_TOOL.cache)
    parts = []
    for source, weight in _weighted(sources).items():
        for file in files_of(source) or [str(source)]:
            store = open_store(
                file,
                encoder,
                on_bad_record=on_bad_record,
                cache_folder=folder,
                records=records,
                names=names,
            )
            _report(store, max_length=max_length, names=names)
            parts.append(Part(store, datasets.Dataset.from_file(str(store.samples)), weight))
    return Samples(parts)


def load_data(config: DataConfig, tokenizer, *, seed: int) -> tuple[Samples, Samples | None]:
    """The training and validation samples of a run's ``data`` section.

    Raises:
        ValueError: as ``load_samples``, or a split that leaves one of the two empty.
    """
    options = {
        "max_length": config.max_length,
        "template": config.template,
        "records": config.format,
        "on_bad_record": config.on_bad_record,
        "cache": config.cache,
        "names": OF_A_RUN,
    }
    train, validation = load_samples(config.train, tokenizer, **options), None
    if config.validation_split:
        train, validation = train.split(config.validation_split, seed=seed)
    elif config.validation:
        validation = load_samples(config.validation, tokenizer, **options)
    if not epoch_length(train.weights):
        raise ValueError(
            f"data.train = {config.train}: of so few samples these weights leave none in an epoch; "
            "raise them."
        )
    if config.max_train_samples:
        train = train.draw(config.max_train_samples, seed=seed)
    return train, validation


def write_rejects(path: str | Path, *loaded: Samples | None) -> None:
    """Write the bad records that were skipped as JSON lines (``source``, ``reason``,
    ``content``), if there are any.

    Raises:
        ValueError: the file cannot be written; there is then none, or what was there before.
    """
    parts = [part for samples in loaded if samples for part in samples.parts]
    stores = {part.store.name: part.store for part in parts if part.store.summary.rejected}
    if not stores:
        return
    path = Path(path)
    partial = path.with_name(partial_name(path.name))
    partial.unlink(missing_ok=True)
    try:
        with writing(path), partial.open("x", encoding="utf-8") as lines:
            for store in stores.values():
                for reject in store.rejects():
                    source = f"{store.name}:{reject.pop('number')}"
                    lines.write(json.dumps({"source": source, **reject}) + "\n")
            lines.close()
            partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def _weighted(sources: Sources) -> Mapping[str, float]:
    if isinstance(sources, Mapping):
        return sources
    return dict.fromkeys([str(sources)] if isinstance(sources, str | Path) else sources, 1.0)


def _report(store: Store, *, max_length: int, names: SettingNames) -> None:
    summary = store.summary
    if summary.cut:
        logger.warning(
            "%s: %d of %d samples left out: %s = %d cuts their answers away (the first is record "
            "%d).",
            store.name, summary.cut, summary.records, names.max_length, max_length,
            summary.first_cut,
        )  # fmt: skip
    if summary.rejected:
        logger.warning(
            "%s: %d of %d records skipped as bad.", store.name, summary.rejected, summary.records
        )
