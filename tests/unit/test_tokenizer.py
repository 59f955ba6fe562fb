"""Tokenizers: SentencePiece models read directly, and what does not belong to a model."""

from __future__ import annotations

import json
from unittest.mock import Mock

import pytest
import sentencepiece
from sentencepiece import sentencepiece_model_pb2
from transformers import LlamaTokenizer, LlamaTokenizerFast

from megatron_mod.data.encoding import Encoder
from megatron_mod.data.python_docs import topic_text
from megatron_mod.data.tokenizer import load_tokenizer
from tests.helpers import tiny
from tests.helpers.text import alpaca, wiki

VOCAB = 500
LLAMA_2 = {
    "model_type": "bpe", "byte_fallback": True, "split_digits": True, "vocab_size": VOCAB,
    "normalization_rule_name": "identity", "remove_extra_whitespaces": False,
    "allow_whitespace_only_pieces": True, "character_coverage": 0.9995,
}  # fmt: skip
BOS, EOS = 1, 2


def train_sentencepiece(folder, **changes):
    """A SentencePiece model made as Llama 2's was, of Python's documentation."""
    text = iter(topic_text()[:100_000].splitlines())
    folder.mkdir(exist_ok=True)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=text, model_prefix=str(folder / "tokenizer"), minloglevel=2,
        **{**LLAMA_2, **changes},
    )  # fmt: skip
    (folder / "tokenizer.vocab").unlink()
    return folder / "tokenizer.model"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return train_sentencepiece(tmp_path_factory.mktemp("sentencepiece"))


@pytest.fixture(scope="module", params=["file", "folder"])
def tokenizer(request, model):
    source = model if request.param == "file" else model.parent
    return load_tokenizer(source, vocab_size=VOCAB)


HARD = ["Häh? 日本 😀", "a  b\t\tc\n\n\nd ", "x = 1234567", "<unk> <0x0A> ▁"]


def same_as_sentencepiece(tokenizer, model, texts):
    oracle = sentencepiece.SentencePieceProcessor(model_file=str(model))
    for text in texts:
        assert tokenizer(text)["input_ids"] == [BOS, *oracle.encode(text)]


def test_ids_are_those_of_sentencepiece(tokenizer, model):
    # Transformers puts no word border before a text that begins with a space; none here does.
    texts = [part for part in topic_text().split("\n\n")[:300] if part.strip() and part[0] != " "]
    same_as_sentencepiece(tokenizer, model, texts + HARD[:3])


def test_ids_are_those_of_sentencepiece_on_real_text(tokenizer, model):
    articles = wiki().read_text(encoding="utf-8").splitlines()
    instructions = [r["output"] for r in json.loads(alpaca().read_text(encoding="utf-8"))]
    same_as_sentencepiece(tokenizer, model, [t for t in articles + instructions if t])


def test_ids_are_those_of_transformers_special_tokens_included(tokenizer, model):
    oracle = LlamaTokenizer.from_pretrained(model.parent, legacy=False, add_bos_token=True)
    for text in [*HARD, "<s>a</s> b</s>\n<s> c", "</s></s>x", "one</s>\n<|user|>\ntwo  three"]:
        assert tokenizer(text)["input_ids"] == oracle(text)["input_ids"]


def test_conversations_are_labelled_with_a_sentencepiece_model(tokenizer, model):
    messages = [
        {"role": "user", "content": "Häh? 日本"},
        {"role": "assistant", "content": "Four,\n  the number 😀"},
        {"role": "user", "content": "So?"},
        {"role": "assistant", "content": "é"},
    ]
    ((encoded,),) = Encoder(tokenizer, max_length=1000, template="published").encode([messages])
    answers = [tokenizer.decode(encoded.ids[a:b]) for a, b in encoded.spans]
    assert answers == ["Four,\n  the number 😀</s>", "é</s>"]
    # SentencePiece on the text up to the first end-of-text, and on what follows it: a newline,
    # which no piece joins with the word border put before it.
    oracle = sentencepiece.SentencePieceProcessor(model_file=str(model))
    head = "<|user|>\nHäh? 日本\n<|assistant|>\nFour,\n  the number 😀"
    border, *tail = oracle.encode("\n<|user|>\nSo?\n<|assistant|>\né")
    assert oracle.id_to_piece(border) == "▁"
    assert encoded.ids == [BOS, *oracle.encode(head), EOS, *tail, EOS]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "unigram"}, "is a UNIGRAM model"),
        ({"normalization_rule_name": "nmt_nfkc"}, r"rewrites its text \(nmt_nfkc\)"),
        ({"remove_extra_whitespaces": True}, "rewrites its text"),
    ],
)
def test_models_llama_would_read_otherwise_are_refused(tmp_path, changes, message):
    model = train_sentencepiece(tmp_path / "other", **changes)
    with pytest.raises(ValueError, match=message):
        load_tokenizer(model, vocab_size=VOCAB)


@pytest.mark.parametrize("damage", ["no pieces", "empty piece", "piece twice", "cut", "breaks"])
def test_a_damaged_sentencepiece_model_is_named(model, tmp_path, monkeypatch, damage):
    proto = sentencepiece_model_pb2.ModelProto()
    proto.ParseFromString(model.read_bytes())
    if damage == "no pieces":
        del proto.pieces[:]
    elif damage == "empty piece":
        proto.pieces[300].piece = ""
    elif damage == "piece twice":
        proto.pieces[300].piece = proto.pieces[301].piece
    elif damage == "breaks":  # of flipped bytes two in sixty come as far as this
        error = TypeError("failed to extract enum PyVocab\n- variant Vocab")
        monkeypatch.setattr(LlamaTokenizerFast, "from_pretrained", Mock(side_effect=error))
    content = proto.SerializeToString()
    path = tmp_path / "tokenizer.model"
    path.write_bytes(content[: len(content) // 2] if damage == "cut" else content)
    with pytest.raises(ValueError, match=rf"^{path}: .* SentencePiece model \(.*\)[^\n]*$"):
        load_tokenizer(path, vocab_size=VOCAB)


def test_what_is_no_tokenizer_or_too_large_is_told(model, tmp_path):
    with pytest.raises(ValueError, match=f"knows {VOCAB} tokens, but the model only 100"):
        load_tokenizer(model, vocab_size=100)
    (tmp_path / "broken.model").write_bytes(b"\x07nonsense")
    with pytest.raises(ValueError, match="is not a SentencePiece model"):
        load_tokenizer(tmp_path / "broken.model", vocab_size=100)
    with pytest.raises(ValueError, match="no tokenizer that Transformers can load"):
        load_tokenizer(tmp_path, vocab_size=100)
    assert len(load_tokenizer(tiny.save_tokenizer(tmp_path), vocab_size=tiny.VOCAB)) == tiny.VOCAB
