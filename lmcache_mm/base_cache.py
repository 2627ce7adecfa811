"""What KVCache, StateCache and EncoderCache have in common."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Self

from lmcache_mm.prompt import owner_to_forget
from lmcache_mm.stores import opened
from lmcache_mm.stores.store import Store


class BaseCache:
    """A store and whether it must be closed with the cache; RuntimeError after `close`."""

    def __init__(self, store: str | Sequence[str] | Store) -> None:
        self._open = True
        self._owns_store = isinstance(store, Sequence)
        self.backend = opened(store)

    def close(self) -> None:
        """Finishes all jobs, then closes the store if this cache opened it."""
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

    def _check(self) -> None:
        if not self._open:
            raise RuntimeError("cache: it is closed")
