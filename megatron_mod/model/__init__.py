"""Megatron-core models whose layers carry routers."""

from megatron_mod import parallel  # noqa: F401  (readies torch for Megatron)
