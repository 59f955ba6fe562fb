"""Hugging Face models from folders that may be damaged, or come from anybody."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn
from transformers import AutoModelForCausalLM

from megatron_mod.checkpoint.companions import check_companions
from megatron_mod.checkpoint.export_checksums import as_written
from megatron_mod.config.model_folder import ADAPTER, LORA
from megatron_mod.conversion.check import check_tied
from megatron_mod.conversion.export import dense_config, routing_of
from megatron_mod.conversion.families import family_of
from megatron_mod.conversion.finite import require_finite
from megatron_mod.conversion.hf_reader import HFReader, read_config
from megatron_mod.conversion.merging import add_to
from megatron_mod.conversion.peft import read_peft
from megatron_mod.data.tokenizer import open_tokenizer, require_fit
from megatron_mod.hf import FILES, MODULE, modeling_mod, routed_name
from megatron_mod.process import is_first_rank
from megatron_mod.verbosity import says

TRUST = "--trust-remote-code"


def load_huggingface(
    folder: str | Path, *, dtype: torch.dtype = torch.float32, trust_remote_code: bool = False
):
    """A model as ``load_model`` gives it, and its tokenizer.

    Raises:
        ValueError: as ``load_model``, or the tokenizer is broken or another model's.
    """
    with as_written(folder):
        read_config(folder)
        tokenizer = open_tokenizer(folder, trust_remote_code=trust_remote_code)
        model = _load_model(folder, dtype=dtype, trust_remote_code=trust_remote_code)
        require_fit(tokenizer, folder, vocab_size=model.config.get_text_config().vocab_size)
    return model, tokenizer


def load_model(
    folder: str | Path, *, dtype: torch.dtype = torch.float32, trust_remote_code: bool = False
):
    """A Hugging Face model with torch's attention, original and export alike.

    An export runs on this package's own class, which its code must be a copy of. The adapters that
    it carries apart are merged into its weights.

    Args:
        trust_remote_code: run other code that the folder brings.

    Raises:
        ValueError: no such folder, one that is not exactly the model its config.json describes,
            weights that are not finite, code in it that nobody said to trust, or an export that is
            not what was written.
    """
    with as_written(folder):
        return _load_model(folder, dtype=dtype, trust_remote_code=trust_remote_code)


def _load_model(folder: str | Path, *, dtype: torch.dtype, trust_remote_code: bool):
    folder = Path(folder)
    config = read_config(folder)
    check_companions(folder)
    routing_of(config, folder / "config.json")
    model_class = AutoModelForCausalLM
    if not trust_remote_code:
        _refuse_generation_code(folder)
        model_class = _class_of(folder, config)
    with HFReader(folder) as reader:
        check_tied(reader, tied=bool(config.get("tie_word_embeddings")))
        try:
            model, found = model_class.from_pretrained(
                folder,
                dtype=dtype,
                attn_implementation="sdpa",
                trust_remote_code=trust_remote_code,
                use_safetensors=True,
                local_files_only=True,
                ignore_mismatched_sizes=True,  # they are in what was found
                output_loading_info=True,
            )
        except Exception as error:  # whatever a config.json can make go wrong in there
            reason = (str(error).splitlines() or [""])[0]
            raise ValueError(
                f"{folder}: Transformers cannot load it: {type(error).__name__}: {reason}"
            ) from error
        _require_whole(folder, found)
        for name, tensor in model.state_dict().items():
            require_finite(tensor, name, where=reader.file(name))
    _add_own_adapters(model, folder, config)
    return model.to("cuda" if torch.cuda.is_available() else "cpu").eval()


def _add_own_adapters(model: nn.Module, folder: Path, config: dict) -> None:
    """Add to an export's weights the adapters that it carries apart from them."""
    if not (folder / LORA / ADAPTER).is_file():
        return
    dense = dense_config(config)
    settings, adapters = read_peft(folder / LORA, family_of(dense).architecture_of(dense))
    add_to(model, settings, adapters)
    if is_first_rank() and says():
        print(f"{folder / LORA}: its adapters of rank {settings.rank} are added to the weights")


def _refuse_generation_code(folder: Path) -> None:
    """Transformers 4.57 runs it as soon as the model is loaded, trusted or not."""
    code = folder / "custom_generate" / "generate.py"
    if code.exists():
        raise ValueError(
            f"{code}: is code of the folder's own, which is not run unasked; take it out, or read "
            f"it and give {TRUST} (tools/evaluate.py, tools/compare_logits.py)."
        )


def _class_of(folder: Path, config: Mapping[str, object]) -> type:
    """The class to run a folder on, none of it the folder's own code."""
    auto_map, model_type = config.get("auto_map"), str(config.get("model_type"))
    if not model_type.startswith("mod_"):
        if auto_map:
            raise ValueError(
                f"{folder}: its config.json asks for code of the folder's own (auto_map), which is "
                f"not run unasked; read it and give {TRUST} (tools/evaluate.py, "
                "tools/compare_logits.py), or take auto_map out if Transformers knows the model."
            )
        return AutoModelForCausalLM
    name = f"{routed_name(model_type.removeprefix('mod_'))}ForCausalLM"
    model_class = getattr(modeling_mod, name, None)
    differing = [file.name for file in FILES if not _is_copy(folder / file.name, file)]
    modules = {str(name).split(".")[0] for name in (auto_map or {}).values()}
    is_ours = (
        model_class is not None
        and config.get("architectures") == [name]
        and modules <= {MODULE}
        and not differing
    )
    if not is_ours:
        file = f"{MODULE}.py" if len(differing) != 1 else differing[0]
        raise ValueError(
            f"{folder / file}: is not the modelling file of this release, and is not run unasked; "
            f"export the run again, or read it and give {TRUST} (tools/evaluate.py, "
            "tools/compare_logits.py)."
        )
    return model_class


def _is_copy(copied: Path, original: Path) -> bool:
    return copied.is_file() and copied.read_bytes() == original.read_bytes()


def _require_whole(folder: Path, found: Mapping[str, object]) -> None:
    """Refuse a folder whose tensors are not exactly the model's, by what loading it found."""
    faults = {
        "missing": found.get("missing_keys"),
        "unknown to the model its config.json describes": [
            name for name in found.get("unexpected_keys") or () if not _says_nothing(name)
        ],
        "of another shape than its config.json describes": [
            name if isinstance(name, str) else name[0]
            for name in found.get("mismatched_keys") or ()
        ],
    }
    for what, names in faults.items():
        if names:
            listed = ", ".join(sorted(names)[:10])
            more = f" and {len(names) - 10} more" if len(names) > 10 else ""
            raise ValueError(f"{folder}: {len(names)} tensors are {what}: {listed}{more}.")


def _says_nothing(name: str) -> bool:
    """Rotary frequencies, which old releases saved."""
    return name.endswith("rotary_emb.inv_freq")
