"""Records of one source as tokenised samples on disk."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import pyarrow as pa

from megatron_mod.data import cache
from megatron_mod.data.chat import messages_of
from megatron_mod.data.encoding import Encoder
from megatron_mod.data.sources import Record, load_named, read_file, read_named

BATCH = 1000  # records tokenised together: enough for all cores, little memory
SCHEMA = pa.schema(
    {"ids": pa.list_(pa.int32()), "spans": pa.list_(pa.int32()), "number": pa.int64()}
)


@dataclass(frozen=True)
class Summary:
    """What became of a source's records: ``records = samples + rejected + cut``; ``cut`` counts
    those whose answers ``max_length`` cut away."""

    records: int = 0
    samples: int = 0
    rejected: int = 0
    cut: int = 0
    first_cut: int | None = None
    tokens: int = 0


@dataclass(frozen=True)
class Store:
    """One source, tokenised: ``name`` is what errors call it."""

    name: str
    folder: Path
    summary: Summary

    @property
    def samples(self) -> Path:
        return self.folder / "samples.arrow"

    def rejects(self) -> Iterator[dict]:
        """``number``, ``reason`` and ``content`` of each bad record."""
        with (self.folder / "rejects.jsonl").open(encoding="utf-8") as lines:
            yield from map(json.loads, lines)


def open_store(
    source: Path | str, encoder: Encoder, *, on_bad_record: str, cache_folder: Path
) -> Store:
    """The tokenised samples of a local file (``Path``) or a named dataset (``str``).

    Raises:
        ValueError: a bad record, unless ``on_bad_record`` is ``skip``; no usable sample.
    """
    name = str(source)
    if isinstance(source, Path):
        content = cache.digest_of_file(source, cache=cache_folder) + source.suffix
    else:
        content = load_named(source)._fingerprint

    def build(folder: Path) -> None:
        records = read_file(source) if isinstance(source, Path) else read_named(source)
        with _Writer(folder, name, stop=on_bad_record == "stop") as writer:
            writer.write(records, encoder)

    folder = cache.entry(cache_folder, {"content": content, **encoder.identity}, build)
    summary = Summary(**json.loads((folder / "summary.json").read_text(encoding="utf-8")))
    store = Store(name, folder, summary)
    if summary.rejected and on_bad_record == "stop":
        first = next(store.rejects())
        raise _bad_record(name, first["number"], first["reason"])
    return store


def _bad_record(name: str, number: int, reason: str) -> ValueError:
    return ValueError(
        f"{name}:{number}: {reason}. Correct the record, or set data.on_bad_record to skip."
    )


class _Writer:
    """Fills a cache entry, a batch of records at a time."""

    def __init__(self, folder: Path, name: str, *, stop: bool) -> None:
        self.folder, self.name, self.stop = folder, name, stop
        self.counts = vars(Summary()).copy()

    def __enter__(self) -> _Writer:
        self._samples = pa.ipc.new_stream(str(self.folder / "samples.arrow"), SCHEMA)
        self._rejects = (self.folder / "rejects.jsonl").open("w", encoding="utf-8")
        return self

    def __exit__(self, *exception: object) -> None:
        self._samples.close()
        self._rejects.close()

    def write(self, records: Iterable[Record], encoder: Encoder) -> None:
        records = iter(records)
        while batch := list(islice(records, BATCH)):
            self._write_batch(batch, encoder)
        if not self.counts["samples"]:
            raise ValueError(f"{self.name}: no usable sample ({self._why_none()}).")
        text = json.dumps(self.counts, indent=2)
        (self.folder / "summary.json").write_text(text, encoding="utf-8")

    def _write_batch(self, batch: list[Record], encoder: Encoder) -> None:
        readable, conversations, problems = [], [], {}
        for record in batch:
            try:
                if record.problem:
                    raise ValueError(record.problem)
                conversations.append(messages_of(record.content))
                readable.append(record)
            except ValueError as error:
                problems[record.number] = error
        rows: dict[str, list] = {name: [] for name in SCHEMA.names}
        for record, encoded in zip(readable, encoder.encode(conversations), strict=True):
            if isinstance(encoded, ValueError):
                problems[record.number] = encoded
            elif not encoded.num_labels:
                self.counts["cut"] += 1
                self.counts["first_cut"] = self.counts["first_cut"] or record.number
            else:
                rows["ids"].append(encoded.ids)
                rows["spans"].append([place for span in encoded.spans for place in span])
                rows["number"].append(record.number)
        self._reject(batch, problems)
        self._samples.write_batch(pa.record_batch(rows, schema=SCHEMA))
        self.counts["records"] += len(batch)
        self.counts["samples"] += len(rows["ids"])
        self.counts["tokens"] += sum(map(len, rows["ids"]))

    def _reject(self, batch: list[Record], problems: dict[int, ValueError]) -> None:
        for record in batch:
            if record.number not in problems:
                continue
            reason = str(problems[record.number])
            if self.stop:
                raise _bad_record(self.name, record.number, reason)
            self.counts["rejected"] += 1
            line = {"number": record.number, "reason": reason, "content": record.content}
            self._rejects.write(json.dumps(line, default=str) + "\n")

    def _why_none(self) -> str:
        cut, rejected = self.counts["cut"], self.counts["rejected"]
        reasons = [f"data.max_length cuts the answers of {cut} away"] if cut else []
        reasons += [f"{rejected} are bad"] if rejected else []
        return f"{self.counts['records']} records" + "".join(f"; {reason}" for reason in reasons)
