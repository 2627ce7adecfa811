"""Stores on other hosts against their bare clients, with servers on this machine; and the cost of sealing."""

from __future__ import annotations

import functools
import os
import sys
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest

sys.path.append(str(Path(__file__).parent.parent / "tests"))

import servers
from lmcache_mm.secret import MAC_BYTES, Seal
from lmcache_mm.stores import open_store
from lmcache_mm.stores.remote.record import HEADER_BYTES

RECORD_BYTES = 7 << 20  # 256 tokens of Qwen2-VL-2B
RECORDS = int(os.environ.get("LMCACHE_MM_BENCH_RECORDS", "64"))  # a prompt of 16 K tokens


def key(i: int) -> bytes:
    return i.to_bytes(36, "little")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], servers.Server]]:
    started = []

    @functools.cache
    def start(scheme: str) -> servers.Server:
        launch = {"valkey": servers.valkey, "s3": servers.seaweed, "mooncake": servers.mooncake}[scheme]
        started.append(launch(tmp_path_factory.mktemp(scheme)))
        return started[-1]

    yield start
    for one in started:
        one.stop()


@pytest.fixture(params=["valkey", "s3", "mooncake"])
def remote(request: pytest.FixtureRequest, server: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """(scheme, the store, one engine of the bare client per connection)"""
    for name, value in {**servers.AWS, "LMCACHE_MM_SECRET": uuid.uuid4().hex}.items():
        monkeypatch.setenv(name, value)
    scheme, url = request.param, server(request.param).url
    with ExitStack() as stack:
        if scheme == "mooncake":  # a third client lends the memory, so that both transfer
            capacity = 3 * RECORDS * (RECORD_BYTES + (1 << 20))
            stack.enter_context(closing(open_store(f"{url}&capacity={capacity}")))
        store, bare = (stack.enter_context(closing(open_store(url))) for _ in range(2))
        engines = [hand.engine for hand in bare._calls.hands]
        yield scheme, store, engines
        store.clear()
        engines[0].delete([f"bare-{i}" for i in range(RECORDS)])


def by_all(engines: list[Any], call: Callable[[Any, int], Any]) -> list[Any]:
    """Calls call(engine, i) for all records, with one thread per engine."""

    def work(number: int) -> list[Any]:
        return [call(engines[number], i) for i in range(number, RECORDS, len(engines))]

    with ThreadPoolExecutor(len(engines)) as pool:
        return [one for results in pool.map(work, range(len(engines))) for one in results]


def beside(against: Any, scheme: str, direction: str, ours: Callable[[], None], bare: Callable[[], None]) -> None:
    """Times ours, the bare client, and ours without MACs."""

    def without_macs() -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Seal, "mac", lambda *_: bytes(MAC_BYTES))
            patch.setattr(Seal, "verify", lambda *_: True)
            ours()

    peers = {"bare client": bare, "without MACs": without_macs}
    against(ours, peers, 5, bytes=RECORDS * RECORD_BYTES, remote=scheme, direction=direction)


@pytest.fixture(scope="module")
def payloads() -> list[np.ndarray]:
    """A prompt's payloads: as many different ones as records, each after room for a header."""
    return [np.random.default_rng(i).integers(0, 256, HEADER_BYTES + RECORD_BYTES, np.uint8) for i in range(RECORDS)]


def test_get(against, remote, payloads):
    scheme, store, engines = remote
    keys = [key(i) for i in range(RECORDS)]
    store.put(keys, [payload[HEADER_BYTES:] for payload in payloads])
    assert all(by_all(engines, lambda engine, i: engine.write(f"bare-{i}", payloads[i].data, 0, False)))
    buffers = [np.ones(HEADER_BYTES + RECORD_BYTES, np.uint8) for _ in keys]

    def get() -> None:
        assert all(store.get_into(keys, [buffer[HEADER_BYTES:] for buffer in buffers]))

    def bare_get() -> None:
        sizes = by_all(engines, lambda engine, i: engine.read(f"bare-{i}", buffers[i].data))
        assert set(sizes) == {HEADER_BYTES + RECORD_BYTES}

    for read, begin in (get, HEADER_BYTES), (bare_get, 0):
        read()
        assert all(
            np.array_equal(buffer[begin:], payload[begin:]) for buffer, payload in zip(buffers, payloads, strict=True)
        )
    beside(against, scheme, "get", get, bare_get)


def test_put(against, remote, payloads):
    scheme, store, engines = remote
    keys = [key(i) for i in range(RECORDS)]
    names = [f"bare-{i}" for i in range(RECORDS)]

    # Each first removes its records of the round before, so that the server needs no room for all rounds.
    def put() -> None:
        store.delete(keys)
        puts = store.stats()["puts"]
        store.put(keys, [payload[HEADER_BYTES:] for payload in payloads])
        assert store.stats()["puts"] == puts + RECORDS

    def bare_put() -> None:
        engines[0].delete(names)
        assert all(by_all(engines, lambda engine, i: engine.write(names[i], payloads[i].data, 0, False)))

    beside(against, scheme, "put", put, bare_put)


def test_mac(benchmark):
    payload = np.random.default_rng(0).integers(0, 256, RECORD_BYTES, np.uint8)
    seal = Seal(b"a secret of a deployment")
    benchmark.pedantic(lambda: seal.mac(key(0), payload.data), rounds=50, warmup_rounds=5)
    benchmark.extra_info.update(mac_bytes=RECORD_BYTES)
