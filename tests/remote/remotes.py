"""What lies on a store's server, and calls in their budgets."""

import time

from lmcache_mm.stores import open_store
from lmcache_mm.stores.remote import remote
from lmcache_mm.stores.remote.record import HEADER_BYTES
from test_stores import key


def engine_of(store):
    """The bare client, next to the store."""
    return store._calls.hands[0]._connect()


def read_record(store, i, size=100):
    record = bytearray(HEADER_BYTES + size)
    assert engine_of(store).read(store._name(key(i)), memoryview(record)) == len(record)
    return record


def write_record(store, i, record):
    engine = engine_of(store)
    engine.delete([store._name(key(i))])
    assert engine.write(store._name(key(i)), memoryview(bytearray(record)), 0.0, False)


SLOW_S = 20.0  # how far a call may exceed its budget on a busy machine


def opened(port, timeout="0.5"):
    return open_store(f"valkey://127.0.0.1:{port}?timeout={timeout}")


def later(monkeypatch, seconds):
    now = time.monotonic()
    monkeypatch.setattr(remote.time, "monotonic", lambda: now + seconds)


def within(call, *arguments, budget_s=0.5, calls=1):
    begin = time.monotonic()
    result = call(*arguments)
    assert time.monotonic() - begin < budget_s * calls + SLOW_S
    return result
