"""What the benchmarks of ``tools/benchmark`` run; ``RESULTS.md`` there has their figures."""

from megatron_mod import parallel  # noqa: F401  (readies torch for Megatron)
