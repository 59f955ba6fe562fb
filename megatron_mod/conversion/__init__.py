"""Hugging Face folders to Megatron distributed checkpoints and back."""
