"""A root-mean-square norm in plain torch that sequence parallelism accepts."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class RMSNorm(nn.Module):
    """``weight * x / sqrt(mean(x^2) + eps)``, statistics in fp32 (Llama's formula).

    Megatron's own wrapper around torch's norm refuses sequence parallelism and its
    fused norms need apex or Transformer Engine.
    """

    def __init__(self, config, hidden_size: int, eps: float = 1e-5, **unused: object) -> None:
        super().__init__()
        self.eps = eps
        device = None if config.use_cpu_initialization else torch.cuda.current_device()
        weight = torch.ones(hidden_size, dtype=config.params_dtype, device=device)
        self.weight = nn.Parameter(weight)
        self.weight.sequence_parallel = config.sequence_parallel

    def forward(self, x: Tensor) -> Tensor:
        """Normalise ``[..., H]`` over its last dim."""
        wide = x.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * wide.to(x.dtype)


class _NormAcrossHeads(RMSNorm):
    """On all heads of a token at once, ``[..., heads, channels]``."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.flatten(-2)).view_as(x)


class QueryNorm(_NormAcrossHeads):
    """Of queries, which one rank holds whole; ``hidden_size`` is a head's."""

    def __init__(self, config, hidden_size: int, eps: float = 1e-5, **unused: object) -> None:
        super().__init__(config, config.num_attention_heads * hidden_size, eps)


class KeyNorm(_NormAcrossHeads):
    """Of keys, which one rank holds whole; ``hidden_size`` is a head's."""

    def __init__(self, config, hidden_size: int, eps: float = 1e-5, **unused: object) -> None:
        super().__init__(config, config.num_query_groups * hidden_size, eps)
