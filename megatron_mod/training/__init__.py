"""The training loop and its parts."""

from megatron_mod import parallel  # noqa: F401  (readies torch for Megatron)
