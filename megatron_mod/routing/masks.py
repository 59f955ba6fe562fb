"""What each token of a batch is to a router: padding, prompt or answer."""

from __future__ import annotations

from enum import IntEnum

from torch import Tensor


class TokenRole(IntEnum):
    """Role of a token; a batch carries them as a ``[B, S]`` uint8 tensor."""

    PADDING = 0
    PROMPT = 1  # valid, before the first labelled token
    ANSWER = 2  # valid, the first labelled token and all after it


def valid_tokens(roles: Tensor) -> Tensor:
    """``[B, S]`` bool: every token that is not padding."""
    return roles != TokenRole.PADDING


def pooled_tokens(roles: Tensor, *, pooling: str) -> Tensor:
    """``[B, S]`` bool: the tokens whose logits a sequence router averages.

    ``all`` takes every valid token, ``prompt`` only those a generation's prefill would see.
    """
    return roles == TokenRole.PROMPT if pooling == "prompt" else valid_tokens(roles)
