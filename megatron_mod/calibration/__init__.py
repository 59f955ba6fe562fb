"""Thresholds that meet a budget, and what every budget costs."""

from megatron_mod import parallel  # noqa: F401  (readies torch for Megatron)
