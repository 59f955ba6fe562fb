"""Megatron-core models whose layers carry routers."""
