"""Times the tiers after the first one, for metrics."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lmcache_mm.stores.arguments import Buffer
    from lmcache_mm.stores.store import Store

# Gets the kind of store, "load" or "store", seconds, and bytes. Called from any thread; must not raise.
Observe = Callable[[str, str, float, int], None]
# The upper bounds of histograms' buckets.
SECONDS = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
BYTES = tuple(float(1 << power) for power in range(14, 36, 2))  # 16 KiB to 16 GiB


class MeteredStore:
    """Wraps `store`, and reports every put and every read that found something to `observe`."""

    def __init__(self, store: Store, kind: str, observe: Observe) -> None:
        self._store, self._kind, self._observe = store, kind, observe

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    def get_into(
        self, keys: Sequence[bytes], buffers: Sequence[Buffer], owner: bytes = b"", peek: bool = False
    ) -> list[bool]:
        begun = time.perf_counter()
        found = self._store.get_into(keys, buffers, owner, peek)
        size = sum(memoryview(buffer).nbytes for buffer, there in zip(buffers, found, strict=True) if there)
        if size:
            self._observe(self._kind, "load", time.perf_counter() - begun, size)
        return found

    def put(self, keys: Sequence[bytes], buffers: Sequence[Buffer], *arguments: Any) -> None:
        begun = time.perf_counter()
        self._store.put(keys, buffers, *arguments)
        size = sum(memoryview(buffer).nbytes for buffer in buffers)
        self._observe(self._kind, "store", time.perf_counter() - begun, size)
