"""LMCache, as far as benchmarks/rivals.py calls it: what a rehearsal imports where the package is not there."""
