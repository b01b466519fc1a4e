"""Benchmarks of the kernels: one file per operation; ``registry.py`` lists them, ``kernels/bench.py`` runs them."""
