"""The part of LMCache that benchmarks/rivals.py calls: a rehearsal imports it if the package is missing."""
