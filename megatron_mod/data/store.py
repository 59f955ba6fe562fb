"""Records of one source as tokenised samples on disk."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import xxhash
from pyarrow.ipc import new_stream

from megatron_mod.checkpoint.folders import require_room
from megatron_mod.data import cache
from megatron_mod.data.chat import Records, content_of
from megatron_mod.data.encoding import Encoder
from megatron_mod.data.formats import layout_of
from megatron_mod.data.json_records import Record
from megatron_mod.data.settings import OF_A_TOOL, SettingNames
from megatron_mod.data.sources import (
    content_bytes,
    load_named,
    read_dataset,
    read_file,
    text_bytes,
)

# Tokenised together: enough for all cores; a tokenizer takes up to 120 bytes for each of text.
BATCH_RECORDS = 1000
BATCH_BYTES = 2 * 2**20
SCHEMA = pa.schema(
    {
        "ids": pa.list_(pa.int32()),
        "spans": pa.list_(pa.int32()),
        "number": pa.int64(),  # of the record
        "place": pa.int64(),  # of the sample, counted from 0
    }
)


@dataclass(frozen=True)
class Summary:
    """What became of a source's records: of conversations ``records = samples + rejected + cut``, a
    text is as many samples as it has pieces; ``cut`` counts those whose answers ``max_length`` cut
    away; ``texts``: records that are texts. ``fingerprint``: of the samples' tokens and
    labels, in their order, however they are stored."""

    records: int = 0
    samples: int = 0
    rejected: int = 0
    cut: int = 0
    first_cut: int | None = None
    tokens: int = 0
    texts: int = 0
    fingerprint: str = ""


@dataclass(frozen=True)
class Store:
    """One source, tokenised: ``name`` is what errors call it."""

    name: str
    folder: Path
    summary: Summary

    @property
    def samples(self) -> Path:
        return self.folder / "samples.arrow"

    def lengths(self) -> np.ndarray:
        """The tokens of each sample, int64, in their order."""
        with pa.memory_map(str(self.samples)) as file:
            lengths = pc.list_value_length(pa.ipc.open_stream(file).read_all()["ids"])
            return lengths.to_numpy().astype(np.int64)

    def rejects(self) -> Iterator[dict]:
        """``number``, ``reason`` and ``content`` of each bad record."""
        with (self.folder / "rejects.jsonl").open(encoding="utf-8") as lines:
            yield from map(json.loads, lines)


def open_store(
    source: Path | str,
    encoder: Encoder,
    *,
    on_bad_record: str,
    cache_folder: Path,
    records: Records = "auto",
    names: SettingNames = OF_A_TOOL,
) -> Store:
    """The tokenised samples of a local file (``Path``) or a named dataset (``str``), all of whose
    ``records`` have to be of that kind.

    Raises:
        ValueError: a bad record, unless ``on_bad_record`` is ``skip``; no usable sample; a source
            that cannot be read; a full disk.
    """
    name = str(source)
    if isinstance(source, Path):
        digest = cache.digest_of_file(source, cache=cache_folder)
        content, found, size = digest + source.suffix, read_file(source), content_bytes(source)
    else:
        dataset = load_named(source)
        content, size = dataset._fingerprint, content_bytes(dataset)
        found = read_dataset(dataset, name=name)

    def build(folder: Path) -> None:
        with _Writer(folder, name, names, records, stop=on_bad_record == "stop") as writer:
            writer.write(found, encoder, size=size)
        if isinstance(source, Path) and cache.digest_of_file(source, cache=cache_folder) != digest:
            raise ValueError(f"{name}: has changed while it was read; run the same command again.")

    key = {"content": content, "records": records, **encoder.identity}
    folder = cache.entry(cache_folder, key, build)
    summary = Summary(**json.loads((folder / "summary.json").read_text(encoding="utf-8")))
    store = Store(name, folder, summary)
    if summary.rejected and on_bad_record == "stop":
        raise _bad_record(name, next(store.rejects()), names)
    return store


def _bad_record(source: str, reject: dict, names: SettingNames) -> ValueError:
    layout = layout_of(reject["content"])
    if layout:
        remedy = (
            f"It has the layout of raw {layout}: bring the file to messages with "
            f"tools/reformat_datasets.py --sources {layout}={source} --save-path FOLDER, and give "
            f"FOLDER/{layout}."
        )
    elif names.on_bad_record:
        remedy = f"Correct the record, or set {names.on_bad_record} to skip."
    else:
        remedy = "Correct the record, or take it out."
    return ValueError(f"{source}:{reject['number']}: {reject['reason']}. {remedy}")


class _Writer:
    """Fills a cache entry, a batch of records at a time."""

    def __init__(
        self, folder: Path, name: str, names: SettingNames, records: Records, *, stop: bool
    ) -> None:
        self.folder, self.name, self.names, self.stop = folder, name, names, stop
        self.records = records
        self.counts = vars(Summary()).copy()
        self.first_reject: dict | None = None
        self._content = xxhash.xxh3_128()

    def __enter__(self) -> _Writer:
        self._samples = new_stream(str(self.folder / "samples.arrow"), SCHEMA)
        self._rejects = (self.folder / "rejects.jsonl").open("w", encoding="utf-8")
        return self

    def __exit__(self, *exception: object) -> None:
        try:
            self._samples.close()
        finally:
            self._rejects.close()

    def write(self, records: Iterable[Record], encoder: Encoder, *, size: int) -> None:
        """Write all records of a source of ``size`` bytes; a large one is refused after the first
        batch if the disk has not even half of the room that it then seems to take."""
        done = 0
        for batch in batches(records):
            written = self._write_batch(batch, encoder)
            if not done:
                done = sum(text_bytes(record.content) for record in batch)
                more = written * (size - done) // (2 * max(done, 1))
                require_room(self.folder.parent, more, what=f"half of {self.name}, tokenised,")
        if not self.counts["samples"]:
            raise self._none_usable()
        self.counts["fingerprint"] = self._content.hexdigest()
        text = json.dumps(self.counts, indent=2)
        (self.folder / "summary.json").write_text(text, encoding="utf-8")

    def _write_batch(self, batch: list[Record], encoder: Encoder) -> int:
        """The bytes that the samples take."""
        readable, contents, problems = [], [], {}
        for record in batch:
            try:
                if record.problem:
                    raise ValueError(record.problem)
                contents.append(content_of(record.content, self.records))
                self.counts["texts"] += isinstance(contents[-1], str)
                readable.append(record)
            except ValueError as error:
                problems[record.number] = error
        rows: dict[str, list] = {name: [] for name in SCHEMA.names}
        for record, samples in zip(readable, encoder.encode(contents), strict=True):
            if isinstance(samples, ValueError):
                problems[record.number] = samples
                continue
            for encoded in samples:
                if not encoded.num_labels:
                    self.counts["cut"] += 1
                    self.counts["first_cut"] = self.counts["first_cut"] or record.number
                    continue
                rows["ids"].append(encoded.ids)
                rows["spans"].append([place for span in encoded.spans for place in span])
                rows["number"].append(record.number)
                rows["place"].append(self.counts["samples"] + len(rows["place"]))
        self._reject(batch, problems)
        encoded = pa.record_batch(rows, schema=SCHEMA)
        self._samples.write_batch(encoded)
        for ids, spans in zip(rows["ids"], rows["spans"], strict=True):
            # Lengths first, so that no two lists of samples have the same bytes.
            self._content.update(np.array([len(ids), len(spans), *ids, *spans], dtype="<i4"))
        self.counts["records"] += len(batch)
        self.counts["samples"] += len(rows["ids"])
        self.counts["tokens"] += sum(map(len, rows["ids"]))
        return encoded.nbytes

    def _reject(self, batch: list[Record], problems: dict[int, ValueError]) -> None:
        for record in batch:
            if record.number not in problems:
                continue
            reason = str(problems[record.number])
            reject = {"number": record.number, "reason": reason, "content": record.content}
            if self.stop:
                raise _bad_record(self.name, reject, self.names)
            self.first_reject = self.first_reject or reject
            self.counts["rejected"] += 1
            self._rejects.write(json.dumps(reject, default=str) + "\n")

    def _none_usable(self) -> ValueError:
        cut, rejected = self.counts["cut"], self.counts["rejected"]
        reasons = [f"{self.names.max_length} cuts the answers of {cut} away"] if cut else []
        reasons += [f"{rejected} are bad"] if rejected else []
        why = "; ".join([f"{self.counts['records']} records", *reasons])
        first = f" {_bad_record(self.name, self.first_reject, self.names)}" if rejected else ""
        return ValueError(f"{self.name}: no usable sample ({why}).{first}")


def batches(records: Iterable[Record]) -> Iterator[list[Record]]:
    """Records together: ``BATCH_RECORDS`` and ``BATCH_BYTES`` of text at most, or one record that
    has more."""
    batch: list[Record] = []
    held = 0
    for record in records:
        adds = text_bytes(record.content)
        if batch and (len(batch) == BATCH_RECORDS or held + adds > BATCH_BYTES):
            yield batch
            batch, held = [], 0
        batch.append(record)
        held += adds
    if batch:
        yield batch
