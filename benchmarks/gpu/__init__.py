"""Everything that can be measured on one GPU in about ten minutes; see benchmarks/gpu.md."""
