"""The tokenizer that belongs to a model."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

from transformers import AutoTokenizer, LlamaTokenizerFast, PreTrainedTokenizerFast

from megatron_mod.checkpoint.companions import check_companions

SENTENCEPIECE, VOCABULARY = "tokenizer.model", "vocab.json"
SETTINGS = ("tokenizer.json", "tokenizer_config.json")


def load_tokenizer(source: str | Path, *, vocab_size: int):
    """As ``open_tokenizer``, for a model with this ``vocab_size``.

    Raises:
        ValueError: there is none, or as ``require_fit``.
    """
    tokenizer = open_tokenizer(source)
    require_fit(tokenizer, source, vocab_size=vocab_size)
    return tokenizer


def require_fit(tokenizer, source: str | Path, *, vocab_size: int) -> None:
    """Refuse a tokenizer that a model with this ``vocab_size`` cannot be trained or judged with.

    Raises:
        ValueError: it gives no offsets, it has no end-of-text token, or it knows more tokens than
            the model.
    """
    if not tokenizer.is_fast:
        raise ValueError(f"{source}: a fast tokenizer (tokenizer.json) is needed for offsets.")
    if tokenizer.eos_token is None:
        raise ValueError(f"{source}: the tokenizer has no end-of-text token (eos_token).")
    if len(tokenizer) > vocab_size:
        raise ValueError(
            f"{source}: the tokenizer knows {len(tokenizer)} tokens, but the model only "
            f"{vocab_size} (vocab_size); they do not belong together."
        )


def open_tokenizer(source: str | Path, *, trust_remote_code: bool = False):
    """A Hugging Face tokenizer folder, or a SentencePiece ``.model`` file (Llama 2, Mistral) or a
    folder with nothing but one.

    Args:
        trust_remote_code: run the folder's own code, if its tokenizer needs it.

    Raises:
        ValueError: there is none that can be loaded, or a file beside it is broken.
    """
    path = Path(source)
    check_companions(path)
    bare = path / SENTENCEPIECE
    if path.suffix == ".model" and path.is_file():
        return _from_sentencepiece(path)
    if bare.is_file() and not any((path / name).is_file() for name in SETTINGS):
        return _from_sentencepiece(bare)
    return _from_folder(path, trust_remote_code)


def has_tokenizer(folder: Path) -> bool:
    """Whether a folder has the files of a tokenizer, of whatever kind."""
    return any((folder / name).is_file() for name in (SENTENCEPIECE, *SETTINGS, VOCABULARY))


def make_plain(folder: Path) -> None:
    """Rewrite a folder's tokenizer as a ``PreTrainedTokenizerFast`` with the same tokens.

    Any other class is chosen by the config's ``model_type`` as well, differs between Transformers
    4.57 and 5, and in 5 builds the tokenizer anew instead of reading ``tokenizer.json``. One that
    no training could have read stays as it is.
    """
    if not has_tokenizer(folder):
        return
    try:
        tokenizer = open_tokenizer(folder)
    except ValueError:
        return
    if not tokenizer.is_fast:
        return
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    if type(tokenizer) is not PreTrainedTokenizerFast:  # what its class said without being asked
        for name in ("padding_side", "model_input_names", "clean_up_tokenization_spaces"):
            settings.setdefault(name, getattr(tokenizer, name))
        for name, token in tokenizer.special_tokens_map.items():
            if isinstance(token, str):
                settings.setdefault(name, token)
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    path.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    tokenizer.backend_tokenizer.save(str(folder / "tokenizer.json"))


def _from_folder(folder: Path, trust_remote_code: bool):
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except Exception as error:  # a broken tokenizer.json raises whatever it broke
        if not trust_remote_code and "trust_remote_code" in str(error):
            raise ValueError(
                f"{folder}: its tokenizer is code of the folder's own, which is not run unasked; "
                "put a tokenizer.json beside it, or set data.tokenizer (where a tool judges the "
                "model: --trust-remote-code)."
            ) from error
        reason = (str(error).splitlines() or [""])[0]
        raise ValueError(
            f"{folder}: no tokenizer that Transformers can load ({type(error).__name__}: {reason})"
            "; put the model's tokenizer files into the Hugging Face folder and convert again, or "
            "set data.tokenizer."
        ) from error


def _from_sentencepiece(path: Path):
    """Transformers' Llama tokenizer around the model: beginning of text first, no word border
    after a special token (``legacy=False``) or before a space that begins the text, else what
    SentencePiece itself gives."""
    _require_plain_bpe(path)
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / SENTENCEPIECE).symlink_to(path.resolve())
        try:
            return LlamaTokenizerFast.from_pretrained(folder, legacy=False, add_bos_token=True)
        except Exception as error:  # of pieces that are none: whatever the libraries break on
            reason = (str(error).splitlines() or [""])[0]
            raise ValueError(
                f"{path}: a damaged SentencePiece model ({type(error).__name__}: {reason}); "
                "replace it."
            ) from error


def _require_plain_bpe(path: Path) -> None:
    """Refuse models that Llama's tokenizer would read as something else."""
    from sentencepiece import SentencePieceProcessor, sentencepiece_model_pb2

    model = sentencepiece_model_pb2.ModelProto()
    try:
        model.ParseFromString(path.read_bytes())
        SentencePieceProcessor().LoadFromSerializedProto(path.read_bytes())
    except Exception as error:  # protobuf's own has moved between its releases
        raise ValueError(f"{path}: is not a SentencePiece model ({error}).") from error
    spec, normalizer = model.trainer_spec, model.normalizer_spec
    if spec.model_type != spec.BPE:
        kind = spec.ModelType.Name(spec.model_type)
        raise ValueError(
            f"{path}: is a {kind} model; only BPE ones (Llama 2, Mistral) are read directly. Give "
            "the folder of a Hugging Face tokenizer."
        )
    if normalizer.precompiled_charsmap or normalizer.remove_extra_whitespaces:
        raise ValueError(
            f"{path}: rewrites its text ({normalizer.name}) before it tokenises, which is not "
            "built for .model files. Give the folder of a Hugging Face tokenizer."
        )
