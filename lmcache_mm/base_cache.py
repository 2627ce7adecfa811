"""What KVCache, StateCache and EncoderCache have in common."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Self

from lmcache_mm.prompt import owner_to_forget
from lmcache_mm.stores import opened
from lmcache_mm.stores.store import Store


class BaseCache:
    """A store, whether it must be closed with the cache, and counters; RuntimeError after `close`.

    unit: what the cache looks up, such as "tokens". counts: further counters beside queried_ and hit_`unit`."""

    def __init__(self, store: str | Sequence[str] | Store, unit: str, *counts: str) -> None:
        self._open = True
        self._unit = unit
        self._counts = dict.fromkeys((f"queried_{unit}", f"hit_{unit}", *counts), 0)
        self._counting = threading.Lock()
        self._owns_store = isinstance(store, Sequence)
        self.backend = opened(store)

    def close(self) -> None:
        """Closes the store if this cache opened it."""
        self._open = False
        if self._owns_store:
            self._owns_store = False
            self.backend.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def forget(self, salt: str | bytes) -> int:
        """Removes all records that were stored under a tenant's salt from the store, also those of other caches that
        share it. Returns their number."""
        self._check()
        return self.backend.forget(owner_to_forget(salt))

    def stats(self) -> dict[str, float]:
        self._check()
        with self._counting:
            counts: dict[str, float] = dict(self._counts)
        return counts | {"hit_rate": counts[f"hit_{self._unit}"] / max(1, counts[f"queried_{self._unit}"])}

    def _count(self, **counts: int) -> None:
        with self._counting:
            for name, number in counts.items():
                self._counts[name] += number

    def _check(self) -> None:
        if not self._open:
            raise RuntimeError("cache: it is closed")
