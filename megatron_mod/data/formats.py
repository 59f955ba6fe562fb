"""The six corpora of Router-Tuning, from their published layouts to one form.

Each converter takes a raw record and gives its messages, or raises ``Dropped`` with the reason.
"""

from __future__ import annotations

import json
import reprlib
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from pathlib import Path

from megatron_mod.checkpoint.folders import new_folder, require_room
from megatron_mod.data.json_records import Record
from megatron_mod.data.sources import content_bytes, files_of, load_named, read_dataset, read_file

Messages = list[dict[str, str]]

USERS = ("human", "user")
ASSISTANTS = ("gpt", "chatgpt")


class Dropped(Exception):
    """A record that is left out on purpose; the text is the reason it is counted under."""


@dataclass(frozen=True)
class Corpus:
    """How one corpus is read.

    ``fields``: what each of its records has. ``prefer``: the file taken alone where a folder holds
    several versions of the corpus.
    """

    convert: Callable[[dict], Messages]
    fields: tuple[str, ...] = ("conversations",)
    prefer: str | None = None


@dataclass
class Report:
    """What became of one corpus' records: ``read = written + sum(dropped.values())``."""

    dataset: str
    read: int = 0
    written: int = 0
    dropped: Counter[str] = field(default_factory=Counter)

    def __str__(self) -> str:
        lines = [f"{self.dataset}: {self.written} of {self.read} records written"]
        lines += [f"  {count} dropped: {reason}" for reason, count in self.dropped.most_common()]
        return "\n".join(lines)


def _conversations(record: dict, *, roles: dict[str, str], dropped: Iterable[str]) -> Messages:
    turns = _field(record, "conversations", list)
    messages = []
    for turn in turns:
        sender = turn.get("from") if isinstance(turn, dict) else None
        if not isinstance(sender, str) or sender not in (*roles, *dropped):
            raise Dropped(f"unknown sender {reprlib.repr(sender)}")
        if sender in dropped:
            raise Dropped(f"a turn of {sender!r}")
        messages.append({"role": roles[sender], "content": _field(turn, "value", str)})
    if not messages:
        raise Dropped("no turns")
    return messages


def _pair(record: dict, *, question: str, answer: str) -> Messages:
    return _exchange(_field(record, question, str), _field(record, answer, str))


def _alpaca(record: dict) -> Messages:
    question = _field(record, "instruction", str)
    if record.get("input"):
        question += f"\nInput: {_field(record, 'input', str)}\n"
    return _exchange(question, _field(record, "output", str))


def _exchange(question: str, answer: str) -> Messages:
    return [
        {"role": "user", "content": question},
        {"role": "assistant", "content": answer},
    ]


def _field(record: dict, name: str, kind: type) -> str | list:
    if not isinstance(record, dict) or record.get(name) is None:
        raise Dropped(f"no {name!r}")
    if not isinstance(record[name], kind):
        raise Dropped(f"{name!r} is not {'text' if kind is str else 'a list'}")
    return record[name]


def _roles(assistants: Iterable[str], **others: str) -> dict[str, str]:
    return {**dict.fromkeys(USERS, "user"), **dict.fromkeys(assistants, "assistant"), **others}


CORPORA = {
    "vicuna_sharegpt": Corpus(
        partial(
            _conversations,
            roles=_roles((*ASSISTANTS, "bard"), system="system"),
            dropped=("bing",),
        ),
        prefer="ShareGPT_V3_unfiltered_cleaned_split_no_imsorry.json",
    ),
    "evol_instruct": Corpus(
        partial(_conversations, roles=_roles(ASSISTANTS), dropped=("system", "bing"))
    ),
    "slim_orca": Corpus(
        partial(_conversations, roles=_roles(ASSISTANTS, system="system"), dropped=())
    ),
    "meta_math_qa": Corpus(
        partial(_pair, question="query", answer="response"), fields=("query", "response")
    ),
    "evol_code_alpaca": Corpus(
        partial(_pair, question="instruction", answer="output"), fields=("instruction", "output")
    ),
    "alpaca": Corpus(_alpaca, fields=("instruction", "input", "output")),
}


def layout_of(record: object) -> str | None:
    """The corpus whose raw layout a record has, which is not that of a conversation yet.

    Of several corpora with the same layout the first is named.
    """
    if not isinstance(record, dict) or "messages" in record:
        return None
    fitting = [name for name, corpus in CORPORA.items() if record.keys() >= set(corpus.fields)]
    return max(fitting, key=lambda name: len(CORPORA[name].fields), default=None)


def raw_sources(root: str | Path, names: Iterable[str] | None = None) -> dict[str, str]:
    """Where under ``root`` each corpus lies: the named ones, or all that are there.

    Raises:
        ValueError: an unknown name, a named corpus that is not there, or none at all.
    """
    root = Path(root)
    for name in names or ():
        _known(name)
        if not (root / name).exists():
            raise ValueError(
                f"{root / name}: no such folder; put the raw files of {name} into it, or say with "
                f"--sources {name}=PATH where they are."
            )
    found = {n: str(root / n) for n in names or CORPORA if (root / n).exists()}
    if not found:
        raise ValueError(f"{root}: holds none of the sub-folders {', '.join(CORPORA)}.")
    return found


def parse_sources(arguments: Iterable[str]) -> dict[str, str]:
    """``name=SOURCE`` arguments.

    Raises:
        ValueError: another form, or an unknown corpus.
    """
    sources = {}
    for argument in arguments:
        name, _, source = argument.partition("=")
        if not source:
            raise ValueError(f"--sources {argument}: must be NAME=SOURCE.")
        sources[_known(name)] = source
    return sources


def reformat(name: str, source: str | Path, save: str | Path) -> Report:
    """Write a corpus as ``save/data.jsonl``, and what was dropped as ``save/report.json``.

    Args:
        source: file, folder or name of a dataset.
        save: new folder; it appears when it is whole.

    Raises:
        ValueError: unknown corpus, nothing to read, nothing left to write, or ``save`` exists.
    """
    report = Report(_known(name))
    paths = files_of(source, prefer=CORPORA[name].prefer)
    if paths:
        size = sum(map(content_bytes, paths))
        records = chain.from_iterable(map(read_file, paths))
    else:
        dataset = load_named(str(source))
        size, records = content_bytes(dataset), read_dataset(dataset, name=str(source))
    # What will be dropped is not known yet; with room for less than half there is little hope.
    require_room(Path(save), size // 2, what=f"half of {source}, as messages,")
    with new_folder(save) as folder:
        with (folder / "data.jsonl").open("w", encoding="utf-8") as file:
            for record in records:
                line = _line(name, report.read, record, report.dropped)
                report.read += 1
                if line is not None:
                    file.write(line + "\n")
                    report.written += 1
        if not report.written:
            dropped = [f"{n} dropped: {reason}" for reason, n in report.dropped.most_common()]
            raise ValueError(
                f"{source}: no usable record for {name} "
                f"({'; '.join([f'{report.read} records', *dropped])}); give the raw files of that "
                "corpus, or name the corpus they are of."
            )
        (folder / "report.json").write_text(json.dumps(vars(report), indent=2), encoding="utf-8")
    return report


def _line(name: str, index: int, record: Record, dropped: Counter[str]) -> str | None:
    try:
        if record.problem:
            raise Dropped(record.problem.split(":")[0])
        messages = CORPORA[name].convert(record.content)
        line = json.dumps(
            {"dataset": name, "id": f"{name}_{index}", "messages": messages}, ensure_ascii=False
        )
        line.encode("utf-8")
    except Dropped as reason:
        dropped[str(reason)] += 1
    except UnicodeEncodeError:
        dropped["not UTF-8"] += 1
    else:
        return line
    return None


def _known(name: str) -> str:
    if name not in CORPORA:
        raise ValueError(f"{name}: no corpus of that name; use {', '.join(CORPORA)}.")
    return name
