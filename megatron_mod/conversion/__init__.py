"""Hugging Face folders to Megatron distributed checkpoints and back."""

from megatron_mod import parallel  # noqa: F401  (readies torch for Megatron)
