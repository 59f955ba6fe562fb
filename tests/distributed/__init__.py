from megatron_mod import parallel  # noqa: F401  (readies torch before Megatron-core is imported)
