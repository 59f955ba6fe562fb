"""Transformer Engine's modules computed by torch, where there is no GPU: what is around them can
then be run. Their names, arguments and shapes are its own."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from itertools import pairwise
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor


def engine_error() -> str | None:
    """Why Transformer Engine does not import here, if it does not."""
    from megatron_mod import parallel  # noqa: F401

    try:
        import transformer_engine.pytorch  # noqa: F401
    except Exception as error:  # a build for another torch fails with more than ImportError
        return f"Transformer Engine does not import here: {error}"
    return None


@contextlib.contextmanager
def engine_on_cpu(*, tokens: list[tuple[int, bool]] | None = None) -> Iterator[None]:
    """For the block, in which models are built and run; ``tokens`` gets of each linear's input how
    many it has and whether the product would be in FP8."""
    import transformer_engine.pytorch as te
    from transformer_engine.pytorch.fp8 import FP8GlobalStateManager
    from transformer_engine.pytorch.module.base import TransformerEngineBaseModule as Base

    made = Base.__init__

    def make(self, *args: object, **kwargs: object) -> None:
        with mock.patch("torch.cuda.is_available", return_value=True):  # needs no more
            made(self, *args, **kwargs)

    def linear(self, inp: Tensor, is_first_microbatch: bool | None = None) -> Tensor:
        if tokens is not None:
            tokens.append((inp.shape[:-1].numel(), FP8GlobalStateManager.is_fp8_enabled()))
        return _linear(self, inp, is_first_microbatch)

    forwards = {
        te.Fp8Padding: {"forward": _pad},
        te.Fp8Unpadding: {"forward": lambda self, inp, splits: inp[: splits[0]]},
        Base: {"__init__": make},
        te.Linear: {"forward": linear},
        te.LayerNormLinear: {"forward": _norm_and_linear},
        te.RMSNorm: {"forward": lambda self, x: _norm(x, self.weight, self.eps)},
        te.DotProductAttention: {"forward": _attention},
    }
    with contextlib.ExitStack() as stack:
        for owner, members in forwards.items():
            for name, member in members.items():
                stack.enter_context(mock.patch.object(owner, name, member))
        yield


def _pad(self, inp: Tensor, splits: list[int]) -> tuple[Tensor, list[int]]:
    (tokens,) = splits
    missing = -tokens % 16
    return F.pad(inp, (0, 0, 0, missing)), [tokens + missing]


def _norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    wide = x.float()
    wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (wide * weight.float()).to(x.dtype)


def _linear(self, inp: Tensor, is_first_microbatch: bool | None = None) -> Tensor:
    """``[..., in]`` to ``[..., out]`` of this tensor-parallel rank."""
    from megatron.core.tensor_parallel import (
        copy_to_tensor_model_parallel_region,
        gather_from_sequence_parallel_region,
        reduce_from_tensor_model_parallel_region,
        reduce_scatter_to_sequence_parallel_region,
    )

    assert inp.dtype == self.weight.dtype
    assert not self.return_bias
    shared, group = self.tp_size > 1, {"group": self.tp_group}
    if shared and self.parallel_mode == "column":
        enter = (
            gather_from_sequence_parallel_region
            if self.sequence_parallel
            else copy_to_tensor_model_parallel_region
        )
        inp = enter(inp, **group)
    out = F.linear(inp, self.weight, self.bias if self.use_bias else None)
    if shared and self.parallel_mode == "row":
        leave = (
            reduce_scatter_to_sequence_parallel_region
            if self.sequence_parallel
            else reduce_from_tensor_model_parallel_region
        )
        out = leave(out, **group)
    return out


def _norm_and_linear(self, inp: Tensor, is_first_microbatch: bool | None = None) -> Tensor:
    return _linear(self, _norm(inp, self.layer_norm_weight, self.eps))


def _attention(
    self,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: None,
    *,
    attn_mask_type: str,
    qkv_format: str = "sbhd",
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_kv: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_kv: int | None = None,
    **unused: object,
) -> Tensor:
    """Rows ``[S, B, heads, D]``, or a stream ``[T, heads, D]`` of documents, to the heads side by
    side."""
    assert attention_mask is None
    assert all(value is None for value in unused.values()), unused
    flash = query.dtype in (torch.float16, torch.bfloat16)
    window = None if self.window_size[0] < 0 else self.window_size[0]
    if self.cp_group is not None:
        # The ring of context-parallel ranks has fused kernels only, and no windows.
        assert flash
        assert window is None
        return self.torch_attention(query, key, value)
    if qkv_format == "sbhd":
        assert attn_mask_type == "causal"
        assert query.dim() == 4
        rows = (_causal(*(t[:, row] for t in (query, key, value)), window=window)
                for row in range(query.shape[1]))  # fmt: skip
        return torch.stack(list(rows), 1).flatten(2)
    assert (qkv_format, attn_mask_type) == ("thd", "padding_causal")
    assert query.dim() == 3
    assert flash
    assert window is None
    assert cu_seqlens_q is not None
    assert cu_seqlens_q is cu_seqlens_kv
    assert cu_seqlens_q.dtype == torch.int32
    ends = cu_seqlens_q.tolist()
    assert ends[0] == 0
    assert ends[-1] == len(query)
    lengths = [stop - start for start, stop in pairwise(ends)]
    assert min(lengths) > 0
    assert max(lengths) == max_seqlen_q == max_seqlen_kv
    parts = zip(*(t.split(lengths) for t in (query, key, value)), strict=True)
    return torch.cat([_causal(*part) for part in parts]).flatten(1)


def _causal(query: Tensor, key: Tensor, value: Tensor, *, window: int | None = None) -> Tensor:
    """One document ``[S, heads, D]``."""
    length, heads, dim = query.shape
    key, value = (t.repeat_interleave(heads // t.shape[1], dim=1) for t in (key, value))
    scores = torch.einsum("qhd,khd->hqk", query.float(), key.float()) / dim**0.5
    seen = torch.ones(length, length, dtype=torch.bool).tril()
    if window is not None:
        seen = seen.triu(-window)
    weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
    return torch.einsum("hqk,khd->qhd", weights.to(value.dtype), value)
