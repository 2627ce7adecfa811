"""Connectors over stores that misbehave."""

from __future__ import annotations

import threading
from typing import Any

from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorRole

from lmcache_mm.vllm.connector import LMCacheMMConnector

gate = threading.Event()
gate.set()


class _Store:
    """A store, but for what a subclass does otherwise; none whose slots can be used in place."""

    def __init__(self, store: Any) -> None:
        self.store = store

    def __getattr__(self, name: str) -> Any:
        if name in ("lend", "reserve", "view", "publish", "release", "discard", "abandon", "register"):
            raise AttributeError(name)
        return getattr(self.store, name)


class FailingStore(_Store):
    def get_into(self, *_: Any) -> list[bool]:
        raise ConnectionError("down")


class LyingStore(_Store):
    """Claims everything, has nothing."""

    def contains(self, keys: Any, peek: bool = False) -> list[bool]:
        return [True] * len(keys)

    def get_into(self, keys: Any, *_: Any) -> list[bool]:
        return [False] * len(keys)


class LosingStore(_Store):
    """Loses what it has between the match and the load."""

    def get_into(self, keys: Any, *_: Any) -> list[bool]:
        self.store.delete(keys)
        return [False] * len(keys)


class StoreThatFailsToStore(_Store):
    def put(self, *_: Any) -> None:
        raise ConnectionError("down")


class BlockingStore(_Store):
    def get_into(self, *arguments: Any) -> list[bool]:
        gate.wait(60)
        return list(self.store.get_into(*arguments))


def corrupt(store: Any) -> Any:
    """Every payload that the slab holds has a flipped byte."""
    with store._index.change() as change:
        for _, record in change.records():
            store._slab[record.start * store._granule_bytes + 5] ^= 0x40
    return store


class _Faulty(LMCacheMMConnector):
    make: Any = None

    def register_kv_caches(self, kv_caches: Any) -> None:
        super().register_kv_caches(kv_caches)
        self._worker._store = type(self).make(self._worker._store)
        for transfer in self._worker._transfers:
            transfer.__init__(transfer.layout, self._worker._store, 1 << 20)

    def __init__(self, vllm_config: Any, role: Any, kv_cache_config: Any) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        if role == KVConnectorRole.SCHEDULER and type(self).make is LyingStore:
            self._scheduler._store = LyingStore(self._scheduler._store)


class Fails(_Faulty):
    make = FailingStore


class Lies(_Faulty):
    make = LyingStore


class Loses(_Faulty):
    make = LosingStore


class FailsToStore(_Faulty):
    make = StoreThatFailsToStore


class Blocks(_Faulty):
    make = BlockingStore


class Corrupts(_Faulty):
    make = staticmethod(corrupt)
