"""Misbehaving stores for an engine in this process."""

from __future__ import annotations

import threading
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

from vllm.distributed.ec_transfer import get_ec_transfer
from vllm.distributed.kv_transfer import get_kv_transfer_group

from lmcache_mm.encoder_cache import DESCRIPTION_BYTES
from lmcache_mm.transfer import Transfer
from lmcache_mm.vllm.options import GROUPS_OF_TABLE

gate = threading.Event()  # hanging calls continue when it is set
SLOTS = ("lend", "reserve", "view", "publish", "release", "discard", "abandon", "register")


class _Store:
    """Wraps a store; subclasses change its behavior. Looks like a remote one: its slots cannot be used in place."""

    local = False

    def __init__(self, store: Any) -> None:
        self.store = store

    def __getattr__(self, name: str) -> Any:
        if name in SLOTS:
            raise AttributeError(name)
        return getattr(self.store, name)


class Fails(_Store):
    def get_into(self, *_: Any) -> list[bool]:
        raise ConnectionError("down")


class FailsToTell(_Store):
    def contains(self, *_: Any) -> list[bool]:
        raise ConnectionError("down")


class FailsToStore(_Store):
    def put(self, *_: Any) -> None:
        raise ConnectionError("down")


class Lies(_Store):
    """Claims to have everything, and has nothing."""

    def contains(self, keys: Any, peek: bool = False) -> list[bool]:
        return [True] * len(keys)

    def get_into(self, keys: Any, *_: Any) -> list[bool]:
        return [False] * len(keys)


class Loses(_Store):
    """Loses its records between the match and the load."""

    def get_into(self, keys: Any, *_: Any) -> list[bool]:
        self.store.delete(keys)
        return [False] * len(keys)


def loses_groups(tables: Collection[int]) -> type[_Store]:
    """A store that has lost, when it is read, what belongs to these of vLLM's KV cache groups."""

    class LosesGroups(_Store):
        def get_into(self, keys: Any, *arguments: Any) -> list[bool]:
            lost = [int.from_bytes(key[32:34], "little") // GROUPS_OF_TABLE in tables for key in keys]
            found = self.store.get_into(keys, *arguments)
            return [there and not gone for there, gone in zip(found, lost, strict=True)]

    return LosesGroups


class Corrupts(_Store):
    """Flips a bit in every payload in the slab; slots are read in place."""

    def __init__(self, store: Any) -> None:
        super().__init__(store)
        store._slab[5 :: store._granule_bytes] ^= 0x40  # wherever one may begin

    def __getattr__(self, name: str) -> Any:
        return getattr(self.store, name)


class Hangs(_Store):
    def get_into(self, *arguments: Any) -> list[bool]:
        gate.wait(60)
        return list(self.store.get_into(*arguments))


class HangsInPlace(Corrupts):
    def __init__(self, store: Any) -> None:
        _Store.__init__(self, store)

    def lend(self, *arguments: Any) -> Any:
        gate.wait(60)
        return self.store.lend(*arguments)


class HangsToTell(_Store):
    def contains(self, *arguments: Any) -> list[bool]:
        gate.wait(60)
        return list(self.store.contains(*arguments))


class HangsToStore(_Store):
    def put(self, *arguments: Any) -> None:
        gate.wait(60)
        self.store.put(*arguments)


class Emptied(_Store):
    """Loses everything as soon as it has said what it has."""

    def get_into(self, keys: Any, *arguments: Any) -> list[bool]:
        found = list(self.store.get_into(keys, *arguments))
        if len(arguments[0][0]) != DESCRIPTION_BYTES:
            self.store.clear()
        return found


IN_SCHEDULER_TOO = (Lies, FailsToTell, HangsToTell)


@contextmanager
def misbehaving(llm: Any, kind: type[_Store]) -> Iterator[None]:
    """Makes the engine's store misbehave; hanging calls continue at the end."""
    scheduler = llm.llm_engine.engine_core.engine_core.scheduler.connector._scheduler
    worker = get_kv_transfer_group()._worker
    before = scheduler._store, worker._store, worker._transfers
    gate.clear()
    worker._store = kind(worker._store)
    worker._transfers = [Transfer(t.layout, worker._store, 1 << 20) for t in worker._transfers]
    if kind in IN_SCHEDULER_TOO:
        scheduler._store = worker._store
    try:
        yield
    finally:
        gate.set()
        for transfer in worker._transfers:
            transfer.close()
        scheduler._store, worker._store, worker._transfers = before


@contextmanager
def encoder_misbehaving(llm: Any, kind: type[_Store]) -> Iterator[None]:
    """As `misbehaving`, for the encoder connector's store."""
    sides = [llm.llm_engine.engine_core.engine_core.scheduler.ec_connector._scheduler, get_ec_transfer()._worker]
    before = [side._store for side in sides]
    gate.clear()
    store = kind(before[0])
    for side in sides:
        side._store = store
    try:
        yield
    finally:
        gate.set()
        for side, one in zip(sides, before, strict=True):
            side._store = one
