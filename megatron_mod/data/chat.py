"""Conversations and texts: what a record must hold, and what one is as tokens."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:  # torch takes seconds to import
    from torch import Tensor

from megatron_mod.data.formats import layout_of

ROLES = ("system", "user", "assistant")
IGNORE = -100

Messages = list[dict[str, str]]
Content = Messages | str  # a conversation, or a text
Records = Literal["auto", "conversations", "text"]  # what the records of a source are


@dataclass(frozen=True)
class Sample:
    """A tokenised conversation, or a piece of a text.

    ``labelled[i]`` says whether token ``i`` is one the model is to produce (content of an
    assistant turn, or its end-of-text; of a text all but the first). ``source`` names file and
    line. ``states`` ``[tokens, H]``: the hidden states that enter a layer, for a model that starts
    there.
    """

    ids: list[int]
    labelled: list[bool]
    source: str
    states: Tensor | None = field(default=None, compare=False, repr=False)

    @property
    def prompt_length(self) -> int:
        """Tokens before the first labelled one: what a generation's prefill would see."""
        return self.labelled.index(True)

    @property
    def num_labels(self) -> int:
        """Labels that a next-token loss counts (the first token has nothing before it)."""
        return sum(self.labelled[1:])


def content_of(record: object, records: Records = "auto") -> Content:
    """The text of a record, or its messages.

    Args:
        records: what it has to be; of ``auto`` a text if it has one and is no conversation.

    Raises:
        ValueError: saying what is wrong with the record.
    """
    if records == "conversations":
        return messages_of(record, or_text=False)
    if records == "text":
        return _text_of(record)
    if not isinstance(record, dict) or "text" not in record or layout_of(record):
        return messages_of(record)
    if _is_conversation(record):
        return messages_of(record)
    return _text_of(record)


def _is_conversation(record: dict) -> bool:
    return record.get("messages") is not None or {"prompt", "completion"} <= set(record)


def _text_of(record: object) -> str:
    if not isinstance(record, dict):
        raise ValueError("must be a JSON object")
    if "text" not in record:
        raise ValueError(f"needs a 'text', because data.format = text; it has {_keys(record)}")
    text = record["text"]
    if not isinstance(text, str) or not text.strip():
        raise ValueError("'text' must be text, and not empty")
    _require_utf8(text)
    return text


def messages_of(record: object, *, or_text: bool = True) -> Messages:
    """The conversation of one record, with nothing but ``role`` and ``content``.

    Args:
        or_text: whether a text would have been taken too.

    Raises:
        ValueError: saying what is wrong with the record.
    """
    if not isinstance(record, dict):
        raise ValueError("must be a JSON object")
    messages = _turns(record, or_text=or_text)
    for message in messages:
        if not isinstance(message, dict) or message.get("role") not in ROLES:
            raise ValueError(f"every message needs a 'role' out of {', '.join(ROLES)}")
        if not isinstance(message.get("content"), str):
            raise ValueError("every message needs a 'content' that is text")
        _require_utf8(message["content"])
    answers = [m["content"] for m in messages if m["role"] == "assistant"]
    if not any(answer.strip() for answer in answers):
        raise ValueError("no assistant turn with text in it, so nothing to learn from")
    for number, message in enumerate(messages, start=1):
        if message["role"] != "system" and not message["content"].strip():
            raise ValueError(f"message {number} ({message['role']}) is empty")
    return [{"role": m["role"], "content": m["content"]} for m in messages]


def _turns(record: dict, *, or_text: bool) -> list:
    if record.get("messages") is not None:
        if not isinstance(record["messages"], list) or not record["messages"]:
            raise ValueError("'messages' must be a non-empty list")
        return record["messages"]
    if {"prompt", "completion"} <= set(record):
        return [
            {"role": "user", "content": record["prompt"]},
            {"role": "assistant", "content": record["completion"]},
        ]
    wanted = ", or 'text'" if or_text else ", because data.format = conversations"
    raise ValueError(
        f"needs 'messages', or 'prompt' and 'completion'{wanted}; it has {_keys(record)}"
    )


def _keys(record: dict) -> str:
    return (", ".join(map(repr, list(record)[:5])) or "nothing")[:200]


def _require_utf8(text: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(f"not UTF-8: half a surrogate pair ({error.reason})") from error
