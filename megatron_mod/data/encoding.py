"""Conversations and texts to token ids, and which of them the loss counts."""

from __future__ import annotations

import hashlib
import json
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

from tokenizers import Tokenizer

from megatron_mod.data.chat import Content, Messages
from megatron_mod.data.settings import OF_A_TOOL, SettingNames
from megatron_mod.data.templates import Rendered, template_of


@dataclass(frozen=True)
class Encoded:
    """``ids`` of a conversation or a piece of a text, cut to the length asked for; ``spans``: first
    and past-last token of each run of labelled ones."""

    ids: list[int]
    spans: list[tuple[int, int]]

    @property
    def num_labels(self) -> int:
        """Labels that a next-token loss counts (the first token has nothing before it)."""
        return sum(stop - max(start, 1) for start, stop in self.spans if stop > 1)


class Encoder:
    """Tokenises each conversation or text once; a conversation's token is labelled when all its
    characters are an assistant's.

    A text stands between the beginning-of-text token (without one, end-of-text) and end-of-text,
    and is cut into pieces, each of which begins with the last token of the one before, so that
    every token but the first is labelled once.

    Args:
        tokenizer: a fast Hugging Face tokenizer.
        max_length: tokens a conversation is cut to, from its start on, and a text's pieces have.
        template: ``published``, ``tokenizer`` (its own chat template) or ``auto`` (its own if it
            has one).
        names: what messages call the settings.

    Raises:
        ValueError: too small a ``max_length``, or ``template`` asks for what there is not.
    """

    def __init__(
        self,
        tokenizer,
        *,
        max_length: int,
        template: str = "auto",
        names: SettingNames = OF_A_TOOL,
    ) -> None:
        if max_length < 2:
            raise ValueError(
                f"{names.max_length} = {max_length}: must be at least 2, a token to see and one to "
                "predict; raise it."
            )
        self.backend = tokenizer.backend_tokenizer
        self._take_all()
        settings = self.backend.to_str()
        self._digest = hashlib.sha256(settings.encode()).hexdigest()
        if _trims_offsets(self.backend):
            self.backend = _with_exact_offsets(settings)
        self.max_length = max_length
        self.template = template_of(tokenizer, template=template, names=names)
        self.eos = tokenizer.eos_token
        self._ends = [token for token in (tokenizer.eos_token_id,) if token is not None]
        begins = tokenizer.bos_token_id
        self._begins = self._ends if begins is None else [begins]
        self._leading, self._trailing = self._special_tokens()

    def _take_all(self) -> None:
        """Neither cut nor pad; Transformers leaves behind what it was last called with, and sets
        both anew at its next call."""
        self.backend.no_truncation()
        self.backend.no_padding()

    def _special_tokens(self) -> tuple[int, int]:
        """How many special tokens stand before and after a text, none of whose characters are
        theirs."""
        if not self.template.adds_special_tokens:
            return 0, 0
        mask = self.backend.encode("a").special_tokens_mask
        return mask.index(0), mask[::-1].index(0)

    @property
    def identity(self) -> dict[str, object]:
        """What the result depends on besides the conversation."""
        return {
            "tokenizer": self._digest,
            "eos": self.eos,
            "template": self.template.name,
            "template_source": self.template.source,
            "max_length": self.max_length,
        }

    def encode(self, contents: Sequence[Content]) -> list[list[Encoded] | ValueError]:
        """Each conversation (one sample) or text (its pieces), or what is wrong with it."""
        conversations = iter(self._encode([c for c in contents if not isinstance(c, str)]))
        texts = [c for c in contents if isinstance(c, str)]
        pieces = iter(self.backend.encode_batch(texts, add_special_tokens=False))
        found: list[list[Encoded] | ValueError] = []
        for content in contents:
            if isinstance(content, str):
                found.append(self._cut(next(pieces).ids))
            else:
                one = next(conversations)
                found.append([one] if isinstance(one, Encoded) else one)
        return found

    def _cut(self, ids: list[int]) -> list[Encoded]:
        ids = [*self._begins, *ids, *self._ends]
        starts = range(0, len(ids) - 1, self.max_length - 1)
        pieces = [ids[start : start + self.max_length] for start in starts]
        return [Encoded(piece, [(1, len(piece))]) for piece in pieces]

    def _encode(self, conversations: Sequence[Messages]) -> list[Encoded | ValueError]:
        rendered = self.template.render(conversations)
        whole = [item for item in rendered if isinstance(item, Rendered)]
        self._take_all()
        encodings = iter(
            self.backend.encode_batch(
                [item.text for item in whole],
                add_special_tokens=self.template.adds_special_tokens,
            )
        )
        return [
            self._labelled(next(encodings), item.spans) if isinstance(item, Rendered) else item
            for item in rendered
        ]

    def _labelled(self, encoding, spans: list[tuple[int, int]]) -> Encoded | ValueError:
        tokens = range(self._leading, len(encoding) - self._trailing)
        found = []
        for first, last in spans:
            start = bisect_left(tokens, first, key=lambda t: encoding.token_to_chars(t)[0])
            stop = bisect_right(tokens, last, key=lambda t: encoding.token_to_chars(t)[1])
            start, stop = (min(n + self._leading, self.max_length) for n in (start, stop))
            if start < stop:
                found.append((start, stop))
        if found and found[0][0] == 0:
            return ValueError("starts with the assistant, so there is no prompt to decide on")
        return Encoded(encoding.ids[: self.max_length], found)


def _trims_offsets(backend: Tokenizer) -> bool:
    """Whether the post-processor takes white space off the offsets, as byte-level ones may: a
    header's last newline would then seem to lie in the answer."""
    if backend.post_processor is None:
        return False
    # What it is pickled as: the whole tokenizer's JSON takes a third of a second to parse.
    processor = json.loads(backend.post_processor.__getstate__())
    return any(part.get("trim_offsets") for part in _parts(processor))


def _with_exact_offsets(settings: str) -> Tokenizer:
    """A copy of a tokenizer whose offsets cover white space too."""
    values = json.loads(settings)
    for part in _parts(values["post_processor"]):
        if "trim_offsets" in part:
            part["trim_offsets"] = False
    return Tokenizer.from_str(json.dumps(values))


def _parts(processor: dict) -> list[dict]:
    """The post-processors a post-processor is made of."""
    return processor.get("processors", [processor])
