"""Checkpoint folders: what is in them, whether it is what was written, and how it is written."""

from megatron_mod import parallel  # noqa: F401  (readies torch for Megatron)
