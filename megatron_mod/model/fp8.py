"""Products by frozen weights in FP8, by Transformer Engine: each tensor is scaled by its largest
value as it is (per-tensor current scaling), so nothing has a history that a checkpoint would lack.

What is multiplied so: the linears of all layers, forward and backward. Not the attention's scores,
routers, stand-ins, adapters, the head, and the projection of queries or of keys and values alone
(a routed attention with ``keys_values: all``), which torch computes in the model's dtype.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager

from megatron.core.transformer.transformer_config import TransformerConfig
from torch import nn

from megatron_mod.model.projection import PartLinear
from megatron_mod.model.specs import why_not_transformer_engine


def settings(fp8: str | None) -> dict[str, str]:
    """Megatron's, of a format: ``hybrid`` (forward in E4M3, backward in E5M2) or ``e4m3``."""
    return {} if fp8 is None else {"fp8": fp8, "fp8_recipe": "tensorwise"}


def require_device(fp8: str | None, implementation: str, *, name: str = "model.fp8") -> None:
    """That layers of an implementation can multiply in FP8 here.

    Raises:
        ValueError: they are not Transformer Engine's, or the GPU has no FP8.
    """
    if fp8 is not None and (reason := why_not(implementation)):
        raise ValueError(f"{name} = {fp8}: {reason}; leave it out.")


def why_not(implementation: str) -> str | None:
    """Why layers of an implementation cannot multiply in FP8 here; ``None``: they can."""
    only = "only Transformer Engine's layers multiply in FP8, and"
    if reason := why_not_transformer_engine():
        return f"{only} it cannot work here, {reason}"
    if implementation != "transformer_engine":
        return f"{only} these are {implementation}"
    from transformer_engine.pytorch.fp8 import FP8GlobalStateManager

    is_there, reason = FP8GlobalStateManager.is_fp8_available()
    return None if is_there else reason


def products(config: TransformerConfig) -> AbstractContextManager:
    """In which a layer's products are in the configuration's format; Megatron's block enters it by
    itself."""
    from megatron.core.fp8_utils import get_fp8_context

    return get_fp8_context(config)


def pad_tokens(model: Iterable[nn.Module]) -> None:
    """Let the linears of each chunk take any number of tokens, by padding them; Megatron's own
    wrapper, which undoes it and gathers rows that ranks share before."""
    from megatron.core.fp8_utils import prepare_model_for_fp8_inference

    for chunk in model:
        prepare_model_for_fp8_inference(chunk)
        for module in chunk.modules():
            if isinstance(module, PartLinear):
                module.padded_forward = vars(module).get("forward")
