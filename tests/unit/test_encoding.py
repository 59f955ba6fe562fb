"""Conversations to ids: what a record must hold, and which tokens the loss counts."""

from __future__ import annotations

from functools import lru_cache
from itertools import pairwise

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from megatron_mod.data.chat import content_of, messages_of
from megatron_mod.data.encoding import Encoder
from megatron_mod.data.python_docs import topic_text
from tests.helpers import tiny


def said(role, content):
    return {"role": role, "content": content}


TURNS = [
    said("system", "Be brief."),
    said("user", "2 + 2?"),
    said("assistant", "4"),
    said("user", " Häh? "),
    said("assistant", "Four,\n the number. 😀"),
]
ANSWERS = ["4", "Four,\n the number. 😀"]

# As four families write theirs; `generation` tells Transformers which part is the assistant's.
TEMPLATES = {
    "chatml": (
        "{% for m in messages %}{% if loop.first and m.role != 'system' %}"
        "{{ '<|im_start|>system\nHelp.</s>\n' }}{% endif %}{{ '<|im_start|>' + m.role + '\n' }}"
        "{% generation %}{% if m.role == 'assistant' %}{{ m.content + '</s>' }}{% endif %}"
        "{% endgeneration %}"
        "{% if m.role != 'assistant' %}{{ m.content + '</s>' }}{% endif %}{{ '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    ),
    "trims": (
        "{% for m in messages %}{{ '<h>' + m.role + '</h>\n\n' }}{% generation %}"
        "{% if m.role == 'assistant' %}{{ m.content | trim + '<eot>' }}{% endif %}"
        "{% endgeneration %}{% if m.role != 'assistant' %}{{ m.content | trim + '<eot>' }}"
        "{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<h>assistant</h>\n\n' }}{% endif %}"
    ),
    "instructions": (
        "{% for m in messages %}{% if m.role == 'system' %}{% elif m.role == 'user' %}"
        "{{ '[INST] ' + (messages[0].content + '\n\n' if loop.index0 == 1 "
        "and messages[0].role == 'system' else '') + m.content + ' [/INST]' }}"
        "{% else %}{% generation %}"
        "{{ ' ' + m.content | trim + '</s>' }}{% endgeneration %}{% endif %}{% endfor %}"
    ),
    "thinks": (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}"
        "{% generation %}{% if loop.last %}{{ '<think>\n</think>\n\n' }}{% endif %}"
        "{{ m.content + '</s>' }}{% endgeneration %}{{ '\n' }}"
        "{% else %}{{ m.content + '</s>\n' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def byte_tokenizer(tmp_path_factory):
    return AutoTokenizer.from_pretrained(tiny.save_tokenizer(tmp_path_factory.mktemp("tokenizer")))


@lru_cache
def trained(trim: bool, around: bool):
    """A byte-level BPE tokenizer of 500 tokens, trained on Python's documentation."""
    text = topic_text()[:60_000].split("\n\n")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=500, special_tokens=["<s>", "</s>"], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    tokenizer.train_from_iterator(text, trainer)
    parts = [processors.ByteLevel(trim_offsets=True)] if trim else []
    if around:
        special = [("<s>", 0), ("</s>", 1)]
        parts += [processors.TemplateProcessing("<s> $A </s>", special_tokens=special)]
    if parts:
        tokenizer.post_processor = processors.Sequence(parts)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


def joining(*merges: tuple[str, str]):
    """A byte-level tokenizer with these merges only, which may run across white space."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = ["<s>", "</s>", *alphabet, *("".join(merge) for merge in merges)]
    vocab = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=list(merges)))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


def encode(messages, tokenizer, *, template="auto", max_length=1000):
    (found,) = Encoder(tokenizer, max_length=max_length, template=template).encode([messages])
    if isinstance(found, ValueError):
        return found
    (encoded,) = found
    return encoded


def labelled(encoded, tokenizer):
    return [tokenizer.decode(encoded.ids[first:last]) for first, last in encoded.spans]


@pytest.mark.parametrize("kind", ["bytes", "bpe", "bpe_with_trimmed_offsets"])
@pytest.mark.parametrize("name", TEMPLATES)
def test_ids_and_labels_are_those_of_the_chat_template(byte_tokenizer, name, kind):
    tokenizer = byte_tokenizer if kind == "bytes" else trained(kind.endswith("offsets"), False)
    tokenizer.chat_template = TEMPLATES[name]
    # Transformers goes by the offsets as they are, trimmed or not.
    exact = tokenizer if kind == "bytes" else trained(False, False)
    exact.chat_template = TEMPLATES[name]
    for messages in (TURNS, TURNS[1:], TURNS[1:3], TURNS + [said("user", "And?")]):
        oracle = exact.apply_chat_template(
            messages, return_dict=True, return_assistant_tokens_mask=True
        )
        encoded = encode(messages, tokenizer)
        assert encoded.ids == oracle["input_ids"]
        mask = [any(a <= i < b for a, b in encoded.spans) for i in range(len(encoded.ids))]
        assert mask == [bool(m) for m in oracle["assistant_masks"]]
    tokenizer.chat_template = exact.chat_template = None


@pytest.mark.parametrize("around", [False, True], ids=["alone", "between_special_tokens"])
@pytest.mark.parametrize("trim", [False, True])
def test_published_template_labels_answers_and_their_end_of_text(trim, around):
    tokenizer = trained(trim, around)
    encoded = encode(TURNS, tokenizer)
    text = (
        "<|system|>\nBe brief.\n<|user|>\n2 + 2?\n<|assistant|>\n4</s>\n"
        "<|user|>\nHäh?\n<|assistant|>\nFour,\n the number. 😀</s>"
    )
    assert encoded.ids == tokenizer(text)["input_ids"]
    assert labelled(encoded, tokenizer) == [answer + "</s>" for answer in ANSWERS]
    assert encoded.num_labels == sum(b - a for a, b in encoded.spans)


def retokenised(messages, tokenizer):
    """Labels as the published code finds them: the tokens of every prefix are counted anew."""

    def text(count, *, header=False):
        parts = [
            f"<|{m['role']}|>\n{m['content'].strip()}{'</s>' * (m['role'] == 'assistant')}\n"
            for m in messages[:count]
        ]
        return "".join(parts) + "<|assistant|>\n" * header

    ids = tokenizer(text(len(messages)).strip())["input_ids"]
    masked = [False] * len(ids)
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            first = len(tokenizer(text(index))["input_ids"]) if index else 0
            last = len(tokenizer(text(index + 1, header=True))["input_ids"])
            masked[first:last] = [True] * (last - first)
    return ids, [i for i, hidden in enumerate(masked) if not hidden]


def test_a_border_where_tokenising_prefixes_anew_goes_wrong():
    """`>`, newline and `F` are one token together but two without the F, so the prefix up to the
    header has one token more than it has in its place, and the answer loses its first token."""
    tokenizer = joining(("Ċ", "F"), (">", "ĊF"))
    messages = [said("user", "2 + 2?"), said("assistant", "Four")]
    encoded = encode(messages, tokenizer)
    ids, theirs = retokenised(messages, tokenizer)
    assert ids == encoded.ids
    assert labelled(encoded, tokenizer) == ["our</s>"]  # the F came with the header
    assert tokenizer.decode([ids[i] for i in theirs]) == "ur</s>"


def test_published_labels_agree_where_borders_are_clean(byte_tokenizer):
    encoded = encode(TURNS, byte_tokenizer)
    ids, theirs = retokenised(TURNS, byte_tokenizer)
    assert encoded.ids == ids
    ours = [i for first, last in encoded.spans for i in range(first, last)]
    # Theirs also counts the newline after an inner end-of-text.
    newline = byte_tokenizer("\n")["input_ids"]
    assert [ids[i] for i in theirs if i not in ours] == newline
    assert set(ours) < set(theirs)


def test_cutting_keeps_the_start(byte_tokenizer):
    whole = encode(TURNS, byte_tokenizer)
    (first, last), (second, _) = whole.spans
    cut = encode(TURNS, byte_tokenizer, max_length=second)
    assert (cut.ids, cut.spans) == (whole.ids[:second], [(first, last)])
    cut = encode(TURNS, byte_tokenizer, max_length=first + 1)
    assert (cut.ids, cut.spans) == (whole.ids[: first + 1], [(first, first + 1)])
    assert encode(TURNS, byte_tokenizer, max_length=first).num_labels == 0


def test_what_a_tokenizer_file_asks_for_is_not_done(byte_tokenizer):
    limited = AutoTokenizer.from_pretrained(byte_tokenizer.name_or_path)
    limited.backend_tokenizer.enable_truncation(5)
    limited.backend_tokenizer.enable_padding(length=900)
    assert encode(TURNS, limited) == encode(TURNS, byte_tokenizer)


def test_templates_that_refuse_or_rewrite_are_told(byte_tokenizer):
    byte_tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}"
        "{% endif %}{{ m.role + m.content.replace('forbidden', '') + '</s>' }}{% endfor %}"
    )
    plain = [said("user", "a"), said("assistant", "b")]
    rewritten = [said("user", "a"), said("assistant", "not forbidden")]
    encoder = Encoder(byte_tokenizer, max_length=100)
    refused, changed, (good,) = encoder.encode([TURNS, rewritten, plain])
    byte_tokenizer.chat_template = None
    assert "no system" in str(refused)
    assert "changes what is said" in str(changed)
    assert labelled(good, byte_tokenizer) == ["b</s>"]
    with pytest.raises(ValueError, match="has no chat template"):
        Encoder(byte_tokenizer, max_length=100, template="tokenizer")


def test_an_answer_without_any_prompt_is_refused(byte_tokenizer):
    byte_tokenizer.chat_template = "{% for m in messages %}{{ m.content + '</s>' }}{% endfor %}"
    encoded = encode([said("assistant", "b")], byte_tokenizer)
    byte_tokenizer.chat_template = None
    assert "no prompt to decide on" in str(encoded)
    encoded = encode([said("assistant", "b")], byte_tokenizer)  # here the header is one
    assert labelled(encoded, byte_tokenizer) == ["b</s>"]


def test_prompt_and_completion_are_two_turns():
    assert messages_of({"prompt": "a", "completion": "b"}) == [
        said("user", "a"),
        said("assistant", "b"),
    ]


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ([1], "must be a JSON object"),
        ({"texts": "x"}, "needs 'messages', or 'prompt' and 'completion', or 'text'"),
        ({"text": " "}, "'text' must be text, and not empty"),
        ({"text": 3}, "'text' must be text, and not empty"),
        ({"text": "\ud83d"}, "not UTF-8"),
        ({"instruction": "a", "input": "", "output": "b", "text": "ab"}, "needs 'messages'"),
        ({"messages": []}, "non-empty list"),
        ({"messages": "x"}, "non-empty list"),
        ({"messages": [said("wizard", "x")]}, "'role' out of"),
        ({"messages": ["x"]}, "'role' out of"),
        ({"messages": [said("user", 3)]}, "'content' that is text"),
        ({"prompt": None, "completion": "x"}, "'content' that is text"),
        ({"messages": [said("user", "x")]}, "no assistant turn"),
        ({"prompt": "a", "completion": " "}, "no assistant turn"),
        ({"prompt": " ", "completion": "a"}, "message 1 (user) is empty"),
        ({"prompt": "a", "completion": "\ud83d"}, "not UTF-8"),
    ],
)
def test_what_is_wrong_with_a_record_is_told(record, reason):
    with pytest.raises(ValueError) as caught:
        content_of(record)
    assert reason in str(caught.value)


def test_a_conversation_that_has_a_text_too_is_a_conversation():
    assert content_of({"text": "ab", "prompt": "a", "completion": "b"})[0] == said("user", "a")
    assert content_of({"text": "ab", "id": 3}) == "ab"


@pytest.mark.parametrize("max_length", [2, 5, 6, 7, 100])
def test_every_token_of_a_text_is_labelled_once(byte_tokenizer, max_length):
    text = "Two words."
    (pieces,) = Encoder(byte_tokenizer, max_length=max_length).encode([text])
    ids = [byte_tokenizer.bos_token_id, *byte_tokenizer.encode(text, add_special_tokens=False),
           byte_tokenizer.eos_token_id]  # fmt: skip
    assert [i for piece in pieces for i in piece.ids[1:]] == ids[1:]
    assert all(piece.spans == [(1, len(piece.ids))] for piece in pieces)
    assert all(len(piece.ids) == max_length for piece in pieces[:-1])
    assert 2 <= len(pieces[-1].ids) <= max_length
    for before, after in pairwise(pieces):
        assert after.ids[0] == before.ids[-1]
