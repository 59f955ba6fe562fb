"""What a routed model is worth: quality, capacity and speed beside the dense model."""

from megatron_mod import parallel  # noqa: F401  (readies torch for Megatron)
