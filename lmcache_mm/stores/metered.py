"""Metrics of the transfers of stores: what observes them, and the buckets of histograms."""

from __future__ import annotations

from collections.abc import Callable

# Gets the kind of store, "load" or "store", seconds, and bytes. Called from any thread; must not raise.
Observe = Callable[[str, str, float, int], None]
# The upper bounds of histograms' buckets.
SECONDS = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
BYTES = tuple(float(1 << power) for power in range(14, 36, 2))  # 16 KiB to 16 GiB
