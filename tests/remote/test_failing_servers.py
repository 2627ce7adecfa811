"""Servers that die, hang, lie, or are full."""

import itertools
import math
import resource
import threading
import time
from contextlib import closing
from types import SimpleNamespace

import pytest

import servers
from lmcache_mm.stores import open_store
from lmcache_mm.stores.remote.hands import Calls
from lmcache_mm.stores.remote.record import HEADER_BYTES
from remotes import SLOW_S, engine_of, later, opened, within
from servers import until
from test_stores import OWNER, REMOTE, get, key, payload


@pytest.mark.parametrize("scheme", REMOTE)
def test_a_server_that_never_answers_costs_its_budget_once(scheme, environment, caplog):
    if scheme == "mooncake":
        servers.need_mooncake()
    with servers.mute() as port:
        url = {
            "valkey": f"valkey://127.0.0.1:{port}?",
            "s3": f"s3://bucket?endpoint=http://127.0.0.1:{port}&",
            "mooncake": f"mooncake://127.0.0.1:{port}?admin=127.0.0.1:{port}&",
        }[scheme]
        begin = time.monotonic()
        store = open_store(f"{url}timeout=0.5")
        for _ in range(200):
            assert store.contains([key(1)]) == [False]
            assert store.get_into([key(1)], [bytearray(100)]) == [False]
            store.put([key(1)], [payload(1)])
        assert time.monotonic() - begin < 0.5 + SLOW_S
        stats = store.stats()
        assert stats["timeouts"] + stats["errors"] == 1
        assert (stats["misses"], stats["dropped_puts"], stats["down"]) == (200, 200, 1)
        assert len([r for r in caplog.records if "is left alone for 10 s" in r.message]) == 1
        with pytest.raises(RuntimeError, match=r"forget: not everything could be removed: .* since it failed: \w"):
            store.forget(OWNER)
        within(store.close)


def test_why_a_server_is_left_alone_is_remembered_when_this_host_runs_out_of_memory():
    def fails(*_):
        raise ConnectionError("refused")

    def lacks(*_):
        raise MemoryError

    calls = Calls("valkey://host", lambda: SimpleNamespace(close=lambda: None), 1.0, 1, 10)
    calls.do(fails, 1)
    calls.do(lacks, 1, even_if_down=True)
    assert str(calls.do(fails, 1)[1]).endswith("since it failed: refused")
    calls.close()


def test_a_server_that_hangs_in_the_middle_is_tried_again_after_a_while(own_server, monkeypatch):
    store = opened(own_server.port)
    store.put([key(1)], [payload(1)])
    assert get(store, 1) == payload(1)
    own_server.process.send_signal(19)  # SIGSTOP
    assert within(get, store, 1) is None
    assert store.stats()["down"] == 1
    own_server.process.send_signal(18)
    assert get(store, 1) is None  # left alone

    def back():
        later(monkeypatch, 11)
        return get(store, 1) == payload(1)

    until(back, "the server is not used again")
    assert store.stats()["down"] == 0
    store.close()


def test_a_cluster_that_loses_a_node_costs_misses_until_it_is_back(tmp_path, environment, monkeypatch):
    cluster = servers.ValkeyCluster(tmp_path)
    try:
        store = open_store(cluster.url.replace("timeout=20", "timeout=0.5"))
        keys = [key(i) for i in range(50)]
        store.put(keys, [payload(i) for i in range(50)], OWNER)
        assert store.contains(keys) == [True] * 50
        cluster.nodes[1].stop()
        for _ in range(3):
            buffers = [bytearray(100) for _ in keys]
            found = within(store.get_into, keys, buffers)
            assert all(buffer == payload(i) for i, buffer in enumerate(buffers) if found[i])
            assert not all(found)
            within(store.put, keys, buffers, OWNER, calls=3)
            later(monkeypatch, 11)
        cluster.nodes[1].start()

        def whole():  # the node has restarted empty
            later(monkeypatch, 11)
            store.put(keys, [payload(i) for i in range(50)], OWNER)
            return all(store.contains(keys))

        until(whole, "the node is not used again")
        assert store.forget(OWNER) == 50
        store.close()
    finally:
        cluster.stop()


def test_a_server_killed_in_the_middle_of_transfers_costs_misses_and_is_used_again(own_server, monkeypatch):
    store = opened(own_server.port, "2")
    payloads = [payload(i, 1000) * 4000 for i in range(8)]
    keys, length = [key(i) for i in range(8)], 4_000_000
    store.put(keys, payloads)
    assert store.stats()["puts"] == 8
    killed = threading.Timer(0.05, own_server.stop)
    killed.start()
    for _ in range(20):
        buffers = [bytearray(length) for _ in keys]
        found = store.get_into(keys, buffers)
        assert all(not hit or buffers[i] == payloads[i] for i, hit in enumerate(found))
    killed.join()
    assert get(store, 1, length) is None
    own_server.start()

    def back():
        later(monkeypatch, 11)
        store.put([key(1)], [payload(1)])
        return get(store, 1) == payload(1)

    until(back, "the server is not used again")
    assert get(store, 2, length) is None  # the server had kept nothing
    store.close()


def test_a_store_opens_while_its_server_is_down_and_is_used_once_it_is_there(own_server, monkeypatch, caplog):
    own_server.stop()
    store = within(opened, own_server.port)
    assert "is left alone for 10 s" in caplog.text
    store.put([key(1)], [payload(1)])
    assert store.stats()["dropped_puts"] == 1
    own_server.start()
    later(monkeypatch, 11)
    store.put([key(1)], [payload(1)])
    assert get(store, 1) == payload(1)
    store.close()


def test_a_full_server_drops_puts_and_is_not_taken_for_a_broken_one(own_server):
    store = opened(own_server.port, "20")
    engine_of(store)._client.config_set({"maxmemory": "10mb", "maxmemory-policy": "noeviction"})
    for i in range(20):
        store.put([key(i)], [bytes(1 << 20)])
    stats = store.stats()
    assert 0 < stats["puts"] < 20
    assert stats["puts"] + stats["dropped_puts"] == 20
    assert (stats["down"], stats["errors"]) == (0, 0)
    store.close()


def test_a_value_far_longer_than_the_record_is_not_brought_here(own_server):
    store = opened(own_server.port, "20")
    store.put([key(1)], [payload(1)])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    engine_of(store)._client.custom_command(["SETRANGE", store._name(key(1)), str(400 << 20), "x"])
    assert get(store, 1) is None
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200 << 10  # KiB
    assert (store.stats()["errors"], store.stats()["down"]) == (0, 0)
    store.close()


def test_a_server_that_says_more_than_it_was_asked_for_is_left_alone(far, monkeypatch):
    far.put([key(1)], [payload(1)])
    monkeypatch.setattr(type(engine_of(far)._client), "exec", lambda *_, **__: [bytes(1 << 20)])
    assert far.ages([key(1)]) == [math.inf]
    assert far.stats()["down"]


@pytest.mark.parametrize(
    "claim, parts",
    [(10**12, itertools.repeat(bytes(1 << 20))), (HEADER_BYTES + 100, [bytes(100)])],
    ids=["huge", "less"],
)
def test_a_server_that_lies_about_a_length_is_cut_off_at_the_budget(environment, claim, parts):
    """The client would keep receiving and storing data without end."""
    with closing(servers.LyingValkey(HEADER_BYTES + 100, claim, parts)) as server:
        store = opened(server.port)
        assert within(get, store, 1) is None
        assert server.lies == 1
        assert server.ended.wait(10)
        assert store.stats()["down"] == 1
        store.close()
