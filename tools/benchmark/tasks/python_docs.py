"""Choices for the ``python_docs`` task; lm-eval loads this file."""

from __future__ import annotations

OTHERS = 3


def with_choices(documents):
    """Give each question the first line of its answer, then those of the next three answers."""
    lines = [answer.strip().split("\n")[0] for answer in documents["completion"]]
    choices = [
        [lines[(index + step) % len(lines)] for step in range(OTHERS + 1)]
        for index in range(len(lines))
    ]
    return documents.add_column("choices", choices)
