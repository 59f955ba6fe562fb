"""One conversation to token ids and the span the loss is taken on."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

ROLES = ("system", "user", "assistant")
IGNORE = -100


@dataclass(frozen=True)
class Sample:
    """A tokenised conversation.

    ``labelled[i]`` says whether token ``i`` is one the model is to produce (content of an
    assistant turn, or its end-of-text). ``source`` names file and line.
    """

    ids: list[int]
    labelled: list[bool]
    source: str

    @property
    def prompt_length(self) -> int:
        """Tokens before the first labelled one: what a generation's prefill would see."""
        return self.labelled.index(True)

    @property
    def num_labels(self) -> int:
        """Labels that a next-token loss counts (the first token has nothing before it)."""
        return sum(self.labelled[1:])


def render(messages: list[dict[str, str]], tokenizer) -> tuple[str, list[tuple[int, int]]]:
    """The conversation as one text, and the character spans of the assistant's turns.

    Uses the tokenizer's own chat template; without one, Router-Tuning's published
    template: a role header on its own line, end-of-text after each assistant turn.
    """
    if tokenizer.chat_template is None:
        return _published_template(messages, tokenizer.eos_token)
    spans = []
    text = ""
    for position, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = tokenizer.apply_chat_template(
            messages[:position], tokenize=False, add_generation_prompt=True
        )
        text = tokenizer.apply_chat_template(messages[: position + 1], tokenize=False)
        if not text.startswith(before):
            raise ValueError(
                "the tokenizer's chat template rewrites earlier turns when a later one is added, "
                "so the assistant's tokens cannot be told apart."
            )
        end = text.rfind(tokenizer.eos_token, len(before))
        end = end + len(tokenizer.eos_token) if end >= 0 else len(text.rstrip())
        spans.append((len(before), end))
    return text, spans


def _published_template(messages: list[dict], eos: str) -> tuple[str, list[tuple[int, int]]]:
    text, spans = "", []
    for message in messages:
        text += f"<|{message['role']}|>\n"
        start = len(text)
        text += message["content"].strip()
        if message["role"] == "assistant":
            text += eos
            spans.append((start, len(text)))
        text += "\n"
    return text, spans


def tokenize(messages: list[dict], tokenizer, *, max_length: int, source: str) -> Sample:
    """Tokenise once, with offsets; a token is labelled when it lies inside an assistant's span.

    Cut to ``max_length`` tokens from the left end on.
    """
    text, spans = render(messages, tokenizer)
    encoded = tokenizer(
        text,
        add_special_tokens=tokenizer.chat_template is None,
        return_offsets_mapping=True,
        truncation=True,
        max_length=max_length,
    )
    labelled = [
        end > start and any(first <= start and end <= last for first, last in spans)
        for start, end in encoded["offset_mapping"]
    ]
    return Sample(encoded["input_ids"], labelled, source)


def messages_of(record: object) -> list[dict[str, str]]:
    """The conversation of one record.

    Raises:
        ValueError: saying what is wrong with the record.
    """
    if not isinstance(record, dict):
        raise ValueError("must be a JSON object")
    if "messages" in record:
        messages = record["messages"]
        if not isinstance(messages, list) or not messages:
            raise ValueError("'messages' must be a non-empty list")
    elif {"prompt", "completion"} <= set(record):
        messages = [
            {"role": "user", "content": record["prompt"]},
            {"role": "assistant", "content": record["completion"]},
        ]
    else:
        raise ValueError("needs 'messages', or 'prompt' and 'completion'")
    for message in messages:
        if not isinstance(message, dict) or message.get("role") not in ROLES:
            raise ValueError(f"every message needs a 'role' out of {', '.join(ROLES)}")
        if not isinstance(message.get("content"), str):
            raise ValueError("every message needs a 'content' that is text")
    if messages[0]["role"] == "assistant":
        raise ValueError("starts with the assistant, so there is no prompt to decide on")
    _require_answer(messages)
    return messages


def _require_answer(messages: Iterable[dict[str, str]]) -> None:
    answers = [m["content"] for m in messages if m["role"] == "assistant"]
    if not any(answer.strip() for answer in answers):
        raise ValueError("no assistant turn with text in it, so nothing to learn from")
