"""Conversations as text, with the characters the model is to produce."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from typing import Protocol

import jinja2

from megatron_mod.data.chat import Messages
from megatron_mod.data.settings import OF_A_TOOL, SettingNames


@dataclass(frozen=True)
class Rendered:
    """``spans``: first and past-last character of each assistant turn with its end-of-text."""

    text: str
    spans: list[tuple[int, int]]


class Template(Protocol):
    """Turns conversations into text.

    ``name`` and ``source`` tell two templates apart; ``adds_special_tokens``: whether the
    tokenizer still has to put its own (beginning of text) around the result.
    """

    name: str
    source: str
    adds_special_tokens: bool

    def render(self, conversations: Sequence[Messages]) -> list[Rendered | ValueError]:
        """Each conversation, or what is wrong with it."""
        ...


def template_of(tokenizer, *, template: str, names: SettingNames = OF_A_TOOL) -> Template:
    """The template a ``data.template`` setting means for a tokenizer; ``names``: what messages call
    the settings.

    Raises:
        ValueError: ``tokenizer`` is asked for and the tokenizer has no chat template.
    """
    if template == "auto":
        template = "tokenizer" if tokenizer.chat_template else "published"
    if template == "published":
        return PublishedTemplate(tokenizer.eos_token)
    if not tokenizer.chat_template:
        raise ValueError(
            f"{names.template or 'template'} = tokenizer: the tokenizer has no chat template; use "
            "published, or add chat_template to its tokenizer_config.json."
        )
    return TokenizerTemplate(tokenizer, names=names)


class PublishedTemplate:
    """Router-Tuning's: a role header on its own line, end-of-text after each assistant turn."""

    name = "published"
    source = ""
    adds_special_tokens = True

    def __init__(self, eos: str) -> None:
        self.eos = eos

    def render(self, conversations: Sequence[Messages]) -> list[Rendered | ValueError]:
        return [self._one(messages) for messages in conversations]

    def _one(self, messages: Messages) -> Rendered:
        parts, spans, length = [], [], 0
        for message in messages:
            header, content = f"<|{message['role']}|>\n", message["content"].strip()
            if message["role"] == "assistant":
                content += self.eos
                start = length + len(header)
                spans.append((start, start + len(content)))
            parts += header, content, "\n"
            length += len(header) + len(content) + 1
        return Rendered("".join(parts).strip(), spans)


class TokenizerTemplate:
    """The tokenizer's own chat template.

    Where the assistant's turns lie is learnt from the same roles with marks for contents,
    rendered once for each sequence of roles; the result counts only if filling in the contents
    gives exactly what the template itself makes of the conversation.
    """

    name = "tokenizer"
    adds_special_tokens = False

    def __init__(self, tokenizer, *, names: SettingNames = OF_A_TOOL) -> None:
        self.tokenizer = tokenizer
        self._names = names
        self._skeletons: dict[tuple[str, ...], Skeleton] = {}

    @property
    def source(self) -> str:
        return str(self.tokenizer.chat_template)

    def render(self, conversations: Sequence[Messages]) -> list[Rendered | ValueError]:
        try:
            texts = self._apply(conversations)
        except (jinja2.TemplateError, TypeError, ValueError) as error:
            if len(conversations) == 1:
                return [ValueError(f"the tokenizer's chat template refuses it: {error}")]
            return [self.render([messages])[0] for messages in conversations]
        return [self._one(m, text) for m, text in zip(conversations, texts, strict=True)]

    def _apply(self, conversations: Sequence[Messages], **options: bool) -> list[str]:
        return self.tokenizer.apply_chat_template(list(conversations), tokenize=False, **options)

    def _one(self, messages: Messages, text: str) -> Rendered | ValueError:
        roles = tuple(message["role"] for message in messages)
        if roles not in self._skeletons:
            self._skeletons[roles] = Skeleton(self, roles)
        skeleton = self._skeletons[roles]
        for strips in product((False, True), repeat=2):  # templates may strip what they are given
            contents = [
                m["content"].strip() if strips[m["role"] == "assistant"] else m["content"]
                for m in messages
            ]
            if skeleton.fill(contents) == text:
                return Rendered(text, skeleton.spans(contents))
        return ValueError(
            "the tokenizer's chat template changes what is said, so the assistant's tokens cannot "
            "be told apart"
            + (f" ({self._names.template}: published does not)" if self._names.template else "")
        )


class Skeleton:
    """A chat template's rendering of a sequence of roles, cut at the contents.

    ``literals[i]`` comes before ``slots[i]``, the index of the message whose content follows;
    the last literal ends the text.
    """

    _MARK = re.compile("\ue000([0-9]+)\ue001")  # private-use characters around a message's index

    def __init__(self, template: TokenizerTemplate, roles: tuple[str, ...]) -> None:
        self.template, self.roles = template, roles
        self.literals, self.slots = self._cut(roles)

    def _cut(self, roles: Sequence[str], **options: bool) -> tuple[list[str], list[int]]:
        marked = [{"role": r, "content": f"\ue000{i}\ue001"} for i, r in enumerate(roles)]
        (text,) = self.template._apply([marked], **options)
        parts = self._MARK.split(text)
        return parts[::2], [int(index) for index in parts[1::2]]

    def fill(self, contents: Sequence[str]) -> str:
        """The text with these contents in their places."""
        parts = [literal + contents[i] for literal, i in zip(self.literals, self.slots)]  # noqa: B905
        return "".join(parts) + self.literals[-1]

    def spans(self, contents: Sequence[str]) -> list[tuple[int, int]]:
        """First and past-last character of what each assistant turn adds to its prompt."""
        spans, end = [], 0
        for place, slot in enumerate(self.slots):
            start = end + len(self.literals[place])
            end = start + len(contents[slot])
            if slot in self._borders:
                before, after = self._borders[slot]
                spans.append((start - before, end + after))
        return spans

    @cached_property
    def _borders(self) -> dict[int, tuple[int, int]]:
        """For each assistant turn, the characters of it before and after its content: what its
        header leaves to be generated (a space, say), and its end-of-text."""
        return {
            slot: (self._before(place, slot), self._after(place, slot))
            for place, slot in enumerate(self.slots)
            if self.roles[slot] == "assistant"
        }

    def _before(self, place: int, slot: int) -> int:
        try:
            prompt = self._cut(self.roles[:slot], add_generation_prompt=True)[0][-1]
            ending = self._cut(self.roles[:slot])[0][-1]
        except (jinja2.TemplateError, IndexError, TypeError, ValueError):
            return 0  # no prompt can end here (the conversation begins with the assistant, say)
        literal = self.literals[place]
        rest = literal[len(prompt) :]
        # Without a prompt of the template's own, what is not white space is the role's header.
        is_generated = prompt != ending or not rest.strip()
        return len(rest) if literal.startswith(prompt) and is_generated else 0

    def _after(self, place: int, slot: int) -> int:
        literals, _ = self._cut(self.roles[: slot + 1])
        eos, ending = self.template.tokenizer.eos_token, literals[-1]
        found = ending.rfind(eos)
        ending = ending[: found + len(eos)] if found >= 0 else ending.rstrip()
        return len(ending) if self.literals[place + 1].startswith(ending) else 0
