"""The export's tokenizer gives the original's tokens, whatever class either one has."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer

from megatron_mod.data.python_docs import topic_text
from megatron_mod.data.tokenizer import load_tokenizer
from tests.helpers import tiny
from tests.helpers.broken import edit_config
from tests.helpers.routed import save_export
from tests.unit.test_tokenizer import train_sentencepiece

VOCAB = 700
TEXTS = [
    topic_text()[:3000], " lead", "e\u0301 é ﬁ 12345 ½", "<s>a</s> b  c\n\n\td 日本 😀 don't", "",
]  # fmt: skip
CLASSES = [
    "Qwen2Tokenizer", "Qwen2TokenizerFast", "LlamaTokenizer", "GPT2Tokenizer",
    "PreTrainedTokenizerFast", None,
]  # fmt: skip


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A model of each family, and a byte-level tokenizer whose words no class would cut alike."""
    folder = tmp_path_factory.mktemp("families")
    for family in ("llama", "mistral", "qwen2", "qwen3"):
        tiny.save_model(folder / family, family, vocab_size=VOCAB)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=["<pad>", "<s>", "</s>", "<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(topic_text()[:60_000].splitlines(), trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def same(export, original) -> None:
    """Tokens, their text, and what generation needs of a tokenizer."""
    for text in TEXTS:
        ids = original(text)["input_ids"]
        assert export(text)["input_ids"] == ids
        assert export.decode(ids) == original.decode(ids)
    assert export.special_tokens_map == original.special_tokens_map
    assert export.padding_side == original.padding_side
    assert set(export("a")) == set(original("a"))
    assert len(export) == len(original)


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
@pytest.mark.parametrize("name", CLASSES)
def test_it_has_the_originals_tokens(folders, tmp_path, family, name):
    hf = shutil.copytree(folders / family, tmp_path / "hf")
    shutil.copyfile(folders / "tokenizer.json", hf / "tokenizer.json")
    settings = {"bos_token": "<s>", "eos_token": "</s>", "add_bos_token": True}
    settings = {**settings, "tokenizer_class": name} if name else settings
    (hf / "tokenizer_config.json").write_text(json.dumps(settings))
    original, run = AutoTokenizer.from_pretrained(hf), load_tokenizer(hf, vocab_size=VOCAB)
    export = save_export(tmp_path / "export", hf, {1: torch.ones(1, 32)})
    same(AutoTokenizer.from_pretrained(export), original)
    same(AutoTokenizer.from_pretrained(export), run)
    same(load_tokenizer(export, vocab_size=VOCAB), run)


def test_a_bare_sentencepiece_model_has_the_runs_tokens(folders, tmp_path):
    hf = shutil.copytree(folders / "llama", tmp_path / "hf")
    shutil.copyfile(train_sentencepiece(tmp_path / "pieces"), hf / "tokenizer.model")
    run = load_tokenizer(hf, vocab_size=VOCAB)
    export = save_export(tmp_path / "export", hf, {1: torch.ones(1, 32)})
    same(AutoTokenizer.from_pretrained(export), run)
    same(load_tokenizer(export, vocab_size=VOCAB), run)


def test_without_a_tokenizer_there_is_none(folders, tmp_path):
    export = save_export(tmp_path / "export", folders / "qwen2", {1: torch.ones(1, 32)})
    assert not list(export.glob("*token*"))


def test_a_tokenizer_no_training_could_read_stays_as_it_is(folders, tmp_path):
    hf = shutil.copytree(folders / "llama", tmp_path / "hf")
    edit_config(hf)
    settings = '{"tokenizer_class": "Theirs", "auto_map": {"AutoTokenizer": ["theirs.T", null]}}'
    (hf / "tokenizer_config.json").write_text(settings)
    export = save_export(tmp_path / "export", hf, {1: torch.ones(1, 32)})
    assert (export / "tokenizer_config.json").read_text() == settings
