"""Questions and answers from the documentation every Python carries.

Sources: the language reference of ``pydoc help`` (``pydoc_data.topics``) and the
docstrings of the standard library, read from its source files without importing them.
"""

from __future__ import annotations

import ast
import hashlib
import inspect
import json
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from pydoc_data.topics import topics

from megatron_mod.checkpoint.folders import require_room, write_durably, writing

# Not documentation of the library itself, or docstrings that only make sense in place.
_LEFT_OUT = {
    "test", "tests", "idle_test", "idlelib", "lib2to3", "site-packages", "dist-packages",
    "ensurepip", "pydoc_data", "turtledemo", "__pycache__", "_pyrepl",
}  # fmt: skip
_QUESTIONS = {
    "function": "What does the function `{name}` in Python's `{module}` module do?",
    "method": "What does the method `{name}` in Python's `{module}` module do?",
    "class": "What is the class `{name}` in Python's `{module}` module for?",
    "module": "What is Python's `{module}` module for?",
    "topic": "Explain this topic of the Python language: {name}.",
}


def records(*, min_characters: int = 120, max_characters: int = 900) -> list[dict[str, str]]:
    """Every question with its answer (``prompt``, ``completion``), shuffled the same way always.

    Answers are whole paragraphs up to ``max_characters``; shorter ones than
    ``min_characters`` are left out.
    """
    found = {}
    for question, text in (*_from_topics(), *_from_library()):
        answer = _paragraphs(text, max_characters)
        if len(answer) >= min_characters:
            found.setdefault(answer, {"prompt": question, "completion": answer})
    return sorted(found.values(), key=lambda r: hashlib.sha256(r["prompt"].encode()).digest())


def topic_text() -> str:
    """The language reference as one long text, for measurements that need long inputs."""
    return "\n\n".join(topics[name] for name in sorted(topics))


def write_splits(folder: str | Path, sizes: dict[str, int]) -> dict[str, Path]:
    """Write ``NAME.jsonl`` for each split, disjoint, in this order; the last may take all others
    with a size of 0.

    Raises:
        ValueError: a size below 1, more records than there are, or files that cannot be written.
    """
    folder = Path(folder)
    last, texts = list(sizes)[-1], {}
    for name, size in sizes.items():
        if size < (0 if name == last else 1):
            raise ValueError(f"{name} = {size}: must be at least 1 record.")
    left = records()
    for name, size in sizes.items():
        if size > len(left) or not left:
            raise ValueError(
                f"{name} = {size}: only {len(left)} records are left for it; make that, or another "
                "split, smaller."
            )
        chosen, left = (left[:size], left[size:]) if size else (left, [])
        lines = (json.dumps(record, ensure_ascii=False) + "\n" for record in chosen)
        texts[folder / f"{name}.jsonl"] = "".join(lines)
    require_room(folder, sum(len(t.encode()) for t in texts.values()), what="the text")
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    for path, text in texts.items():
        write_durably(path, text)
    return {path.stem: path for path in texts}


def _from_topics() -> Iterator[tuple[str, str]]:
    for name, text in topics.items():
        yield _QUESTIONS["topic"].format(name=name), text


def _from_library() -> Iterator[tuple[str, str]]:
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root).with_suffix("")
        if _LEFT_OUT & set(relative.parts):
            continue
        parts = relative.parts[:-1] if relative.name == "__init__" else relative.parts
        try:
            tree = ast.parse(path.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError):
            continue  # a template or a test of the parser, not a module
        yield from _from_module(tree, ".".join(parts))


def _from_module(tree: ast.Module, module: str) -> Iterator[tuple[str, str]]:
    text = ast.get_docstring(tree)
    if text:
        yield _QUESTIONS["module"].format(module=module), text
    for node in tree.body:
        if isinstance(node, ast.ClassDef):
            yield from _from_node(node, "class", node.name, module)
            for member in node.body:
                if isinstance(member, ast.FunctionDef):
                    yield from _from_node(member, "method", f"{node.name}.{member.name}", module)
        elif isinstance(node, ast.FunctionDef):
            yield from _from_node(node, "function", node.name, module)


def _from_node(node: ast.AST, kind: str, name: str, module: str) -> Iterator[tuple[str, str]]:
    text = ast.get_docstring(node)
    if text and not any(part.startswith("_") for part in name.split(".")):
        yield _QUESTIONS[kind].format(name=name, module=module), text


def _paragraphs(text: str, limit: int) -> str:
    """Whole paragraphs from the start, as long as they stay under ``limit`` characters."""
    kept = ""
    for paragraph in inspect.cleandoc(text).split("\n\n"):
        if kept and len(kept) + len(paragraph) > limit:
            break
        kept = f"{kept}\n\n{paragraph}" if kept else paragraph
    return kept[:limit].strip()
