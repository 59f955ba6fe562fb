"""Several reformatted corpora as one shuffled file, each in its portion."""

from __future__ import annotations

import json
import mmap
from array import array
from codecs import BOM_UTF8
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np

from megatron_mod.checkpoint.folders import new_folder, require_room
from megatron_mod.data.sources import reading

DEFAULT_PORTIONS = {
    "vicuna_sharegpt": 2.9,
    "evol_instruct": 1.0,
    "slim_orca": 1.0,
    "meta_math_qa": 1.0,
    "evol_code_alpaca": 1.0,
}
SEED = 233  # the published mix's


def parse_portions(arguments: Iterable[str]) -> dict[str, float]:
    """``name=2.9`` arguments as portions.

    Raises:
        ValueError: another form, a name given twice, or a number that is no portion.
    """
    portions: dict[str, float] = {}
    for argument in arguments:
        name, equals, text = argument.partition("=")
        try:
            portion = float(text)
        except ValueError:
            portion = None
        if not name or not equals or portion is None:
            raise ValueError(f"--portions {argument}: must be name=NUMBER with a number above 0.")
        if name in portions:
            raise ValueError(f"--portions {argument}: {name} is given twice; give it once.")
        portions[name] = portion
    check_portions(portions)
    return portions


def check_portions(portions: Mapping[str, float]) -> None:
    """Refuse portions that are no share.

    Raises:
        ValueError: naming the portion.
    """
    for name, portion in portions.items():
        if not 0 < portion < float("inf"):
            raise ValueError(
                f"--portions {name}={portion:g}: must be a number above 0, how many times it is "
                "taken; leave it out to take nothing of it."
            )


def copies(count: int, portion: float, generator: np.random.Generator) -> np.ndarray:
    """Indices of ``count`` records replicated ``portion`` times: whole copies, and of the rest as
    many as ``round`` says, drawn without repetition. Int64, ``[round(portion * count)]``."""
    whole = int(portion)
    rest = round((portion - whole) * count)
    drawn = generator.permutation(count)[:rest]
    return np.concatenate([np.tile(np.arange(count), whole), drawn]).astype(np.int64)


def mix(
    reformatted: str | Path,
    save: str | Path,
    *,
    portions: dict[str, float] | None = None,
    seed: int = SEED,
) -> dict[str, dict]:
    """Write the mix as ``save/data.jsonl`` and what is in it as ``save/report.json``.

    Only the places of the lines are held in memory (24 bytes for each one read or written); the
    text stays in memory-mapped files.

    Args:
        reformatted: folder with ``NAME/*.jsonl`` for each corpus.
        save: new folder; it appears when it is whole.
        portions: name to portion; ``None`` takes those of ``DEFAULT_PORTIONS`` that are there.

    Returns:
        For each corpus its portion, lines read and lines written.

    Raises:
        ValueError: a portion or the seed is out of range, a named corpus is missing, empty or
            unreadable, nothing is left to write, there is no room for it, or ``save`` exists.
    """
    if seed < 0:
        raise ValueError(f"seed = {seed}: must be at least 0.")
    check_portions(portions or {})
    files = _files(Path(reformatted), portions)
    portions = portions or DEFAULT_PORTIONS
    generator = np.random.default_rng(seed)
    texts, places, report, size = [], [], {}, 0
    for name in sorted(files):
        read, chosen = 0, []
        for path in files[name]:
            texts.append(_mapped(path))
            chosen.append(_line_places(texts[-1], number=len(texts) - 1))
            read += len(chosen[-1])
        lines = np.concatenate(chosen)
        if not read:
            raise ValueError(f"{Path(reformatted) / name}: holds no line.")
        size += int(portions[name] * int((lines[:, 2] - lines[:, 1]).sum()))
        require_room(Path(save), size, what="the mix")
        places.append(lines[copies(read, portions[name], generator)])
        report[name] = {"portion": portions[name], "read": read, "written": len(places[-1])}
    mixed = np.concatenate(places)
    if not len(mixed):
        raise ValueError(f"--portions: {portions} leave no line; raise them.")
    order = generator.permutation(len(mixed))
    with new_folder(save) as folder:
        with (folder / "data.jsonl").open("wb") as out:
            for number, start, stop in mixed[order]:
                out.write(texts[number][start:stop].rstrip(b"\r\n") + b"\n")
        summary = {"seed": seed, "written": len(mixed), "datasets": report}
        (folder / "report.json").write_text(json.dumps(summary, indent=2), encoding="utf-8")
    return report


def _files(root: Path, portions: dict[str, float] | None) -> dict[str, list[Path]]:
    names = portions or [n for n in DEFAULT_PORTIONS if (root / n).is_dir()]
    if not names:
        raise ValueError(
            f"{root}: holds none of {', '.join(DEFAULT_PORTIONS)}; make them with "
            "tools/reformat_datasets.py, or name your own sub-folders with --portions."
        )
    files = {name: sorted(filter(Path.is_file, (root / name).rglob("*.jsonl"))) for name in names}
    for name, found in files.items():
        if not found:
            raise ValueError(
                f"{root / name}: no .jsonl file there; correct --portions or reformat."
            )
    return files


def _mapped(path: Path) -> mmap.mmap | bytes:
    with reading(path), path.open("rb") as file:
        if not path.stat().st_size:  # an empty file cannot be mapped
            return b""
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


def _line_places(text: mmap.mmap | bytes, *, number: int) -> np.ndarray:
    """``[lines, 3]`` int64: file number, start and stop of every line that is not blank."""
    places, start = array("q"), len(BOM_UTF8) if text[:3] == BOM_UTF8 else 0
    while start < len(text):
        stop = text.find(b"\n", start) + 1 or len(text)
        if text[start:stop].strip():
            places.extend((number, start, stop))
        start = stop
    return np.frombuffer(places, dtype=np.int64).reshape(-1, 3)
