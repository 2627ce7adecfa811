"""peer: another host's store over the network: its promises."""

import os
import select
import threading
import time
import uuid
from contextlib import closing

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import test_stores
from lending import LARGE, large, opened, serving
from lmcache_mm import lane
from lmcache_mm.stores import open_store, slab_directory
from lmcache_mm.stores.local import slab
from lmcache_mm.stores.peers import channel, peer
from test_stores import OWNER, get, key, payload

for contract in (
    test_stores.test_what_was_put_is_contained_and_read_back,
    test_stores.test_payloads_of_any_size_at_any_address_are_read_back,
    test_stores.test_a_record_of_another_length_is_a_miss_and_stays,
    test_stores.test_a_key_that_is_there_keeps_its_record,
    test_stores.test_one_key_twice_in_a_call_is_one_record,
    test_stores.test_empty_payloads_and_no_keys_are_valid,
    test_stores.test_deleted_records_are_gone_and_unknown_keys_are_ignored,
    test_stores.test_keys_of_another_length_are_refused,
):
    globals()[contract.__name__] = contract


def test_a_peer_is_read_and_nothing_else(lent, reader):
    lent.put([key(1)], [payload(1)], owner=OWNER)
    reader.put([key(2)], [payload(2)])
    reader.delete([key(1)])
    reader.flush()
    with pytest.raises(RuntimeError, match="call it on its own host's store"):
        reader.forget(OWNER)
    with pytest.raises(ValueError, match="keys: expected 32 to 64 bytes"):
        reader.delete([b"key"])
    with pytest.raises(ValueError, match="buffers: expected 1, as many as keys, got 2"):
        reader.get_into([key(1)], [bytearray(1), bytearray(1)])
    reader.hold([key(1)])()
    assert reader.contains([key(1), key(2)]) == [True, False]
    stats = reader.stats()
    assert (stats["dropped_puts"], stats["capacity_bytes"], reader.moment()) == (1, 0, 0)
    assert (reader.local, reader.read_only) == (False, True)


def test_a_damaged_record_is_a_miss_and_is_removed_where_it_lies(lent, reader):
    lent.put([key(1), key(2)], [payload(1), payload(2)], checksums=[1, 2])
    lent.put([key(3)], [payload(3)])
    assert reader.get_into([key(i) for i in (1, 2, 3)], [bytearray(100) for _ in range(3)]) == [False, False, True]
    assert lent.contains([key(1), key(2), key(3)]) == [False, False, True]
    assert lent.stats()["corrupt"] == 2
    assert reader.stats()["errors"] == 0


def test_a_record_damaged_after_it_was_read_once_is_a_miss_and_the_peer_is_not_left_alone(lent, reader):
    """A cached MAC says nothing about the current bytes."""
    lent.put([key(1), key(2)], [payload(1), payload(2)])
    assert get(reader, 1) == payload(1)
    (slot,) = lent.lend([key(1)], [100])
    lent.view(slot)[50] ^= 1
    lent.release([slot])
    assert get(reader, 1) is None
    assert lent.contains([key(1)]) == [False]
    assert get(reader, 2) == payload(2)
    assert reader.stats()["corrupt"] == reader.stats()["errors"] == 0


def test_what_no_socket_says_is_a_miss_too(monkeypatch):
    with closing(open_store("peer://127.0.0.1:1?timeout=1")) as reader:

        def fails(deadline):
            raise UnicodeError("a label is too long")

        monkeypatch.setattr(reader, "_connect", fails)
        assert reader.contains([key(1)]) == [False]
        assert reader.stats()["errors"] == 1


def test_no_job_begins_after_its_call_has_ended():
    call, begun, go_on = lane.Call(), threading.Event(), threading.Event()
    running = threading.Thread(target=call.run, args=(lambda: begun.set() or go_on.wait(10),))
    running.start()
    assert begun.wait(10)
    ended = threading.Thread(target=call.end)
    ended.start()
    ended.join(0.1)
    assert ended.is_alive()  # it waits for calls that have begun
    go_on.set()
    ended.join(10)
    assert not ended.is_alive()
    ran = []
    call.run(ran.append, 1)
    assert not ran


def test_ten_thousand_keys_of_which_every_other_is_missing(lent, reader):
    there = range(0, 2000, 2)
    lent.put([key(i) for i in there], [payload(i, 40) for i in there])
    keys = [key(i) for i in range(10_000)]
    assert reader.contains(keys) == [i < 2000 and i % 2 == 0 for i in range(10_000)]
    buffers = [bytearray(40) for _ in keys]
    found = reader.get_into(keys, buffers)
    assert found == [i < 2000 and i % 2 == 0 for i in range(10_000)]
    assert all(buffers[i] == payload(i, 40) for i in there)
    assert reader.stats()["misses"] == 9000


def test_what_comes_over_several_connections_lies_where_it_belongs(lent, reader):
    sizes = [LARGE + i for i in range(24)]
    lent.put([key(i) for i in range(24)], [large(i, size) for i, size in enumerate(sizes)])
    buffers = [bytearray(size) for size in sizes]
    assert all(reader.get_into([key(i) for i in range(24)], buffers))
    assert all(buffer == large(i, sizes[i]) for i, buffer in enumerate(buffers))
    assert len(reader._idle) == 3


@given(st.lists(st.integers(0, 40 << 20), min_size=1, max_size=200), st.integers(1, 8))
def test_shares_are_runs_that_cover_all_records_once(sizes, connections):
    shares = peer._shares(sizes, connections)
    assert [i for share in shares for i in share] == list(range(len(sizes)))
    assert len(shares) <= connections
    assert all(shares)


def test_promoted_records_keep_their_age_and_a_peer_is_not_written_to(lent, server):
    lent.put([key(1)], [payload(1)], owner=OWNER, age_s=1000.0)
    local = f"shm:///test-{uuid.uuid4().hex}"
    tiers = open_store(f"tiered:{local}?capacity=1MiB,peer://127.0.0.1:{server.address[1]}?timeout=20")
    try:
        buffer = bytearray(100)
        assert tiers.get_into([key(1)], [buffer], owner=OWNER) == [True]
        assert buffer == payload(1)
        assert tiers._tiers[0].contains([key(1)]) == [True]
        assert tiers._tiers[0].ages([key(1)])[0] >= 1000
        tiers.put([key(2)], [payload(2)], owner=OWNER)
        (slot,) = tiers.reserve([key(3)], [100], OWNER)
        tiers.publish([slot], [0])
        tiers.flush()
        stats = tiers.stats()
        assert (stats["dropped_puts"], stats["tier1.dropped_puts"], stats["waiting"]) == (0, 0, 0)
        assert tiers.read_only is False
        with pytest.raises(RuntimeError, match=r"tier 1: .*call it on its own host's store"):
            tiers.forget(OWNER)
        assert tiers._tiers[0].contains([key(1), key(2)]) == [False, False]
        (slot,) = tiers.lend([key(1)], [100])  # into a slot of the first tier
        assert bytes(tiers.view(slot)) == payload(1)
        tiers.release([slot])
    finally:
        tiers.close()
        slab.remove(slab_directory(local)[1])


def test_a_record_whose_age_the_lender_does_not_know_counts_as_missing(lent, reader, monkeypatch):
    lent.put([key(1)], [payload(1)])
    monkeypatch.setattr(lent, "ages", lambda _: [float("inf")])  # evicted meanwhile
    assert reader.contains([key(1)]) == [False]
    assert reader.stats()["errors"] == 0


def test_records_older_than_the_ttl_that_serve_is_told_are_not_lent(url):
    with closing(open_store(f"{url}?capacity=32MiB&ttl=60")) as lent, serving(lent) as server:
        lent.put([key(1)], [payload(1)], age_s=50)
        lent.put([key(2)], [payload(2)], age_s=70)
        with opened(server.address[1]) as reader:
            assert reader.contains([key(1), key(2)]) == [True, False]
            assert get(reader, 2) is None


def test_records_that_are_evicted_while_they_are_read_are_never_wrong(lent, server):
    stop = threading.Event()

    def write():
        i = 0
        while not stop.is_set():
            lent.put([key(i % 100)], [large(i % 100)])
            i += 1

    thread = threading.Thread(target=write)
    thread.start()
    hits = 0
    try:
        with opened(server.address[1]) as reader:
            end = time.monotonic() + 2
            while time.monotonic() < end or not hits:
                ids = [int(i) for i in np.random.default_rng(hits).integers(0, 100, 12)]
                buffers = [bytearray(LARGE) for _ in ids]
                found = reader.get_into([key(i) for i in ids], buffers)
                assert all(b == large(i) for f, b, i in zip(found, buffers, ids, strict=True) if f)
                hits += sum(found)
            assert reader.stats()["corrupt"] == reader.stats()["errors"] == 0
    finally:
        stop.set()
        thread.join()
    assert lent.stats()["evictions"] > 0


def test_a_store_of_the_parent_is_refused_after_a_fork(reader):
    assert reader.contains([key(1)]) == [False]
    read, write = os.pipe()
    if os.fork() == 0:
        try:
            reader.contains([key(1)])
        except RuntimeError as error:
            os.write(write, str(error).encode())
        reader.close()
        os._exit(0)
    os.wait()
    assert select.select([read], [], [], 0)[0]
    assert b"open it again after a fork" in os.read(read, 1000)
    assert reader.contains([key(1)]) == [False]
    for fd in (read, write):
        os.close(fd)


@pytest.mark.parametrize(
    "url, text",
    [
        ("peer://", "expected HOST:PORT, got ''"),
        ("peer://127.0.0.1", "expected HOST:PORT"),
        ("peer://127.0.0.1:70000", "expected HOST:PORT"),
        ("peer://127.0.0.1:1/x", "expected HOST:PORT"),
        ("peer://127.0.0.1:1?connections=0", "connections: expected 1 to 999, got '0'"),
        ("peer://127.0.0.1:1?timeout=never", "timeout: expected seconds, got 'never'"),
        ("peer://127.0.0.1:1?timeout=nan", "timeout: expected seconds"),
        ("peer://127.0.0.1:1?tls=/none-such", "there is no /none-such/ca.pem"),
        ("peer://127.0.0.1:1?secret=x", "unknown option 'secret'"),
    ],
)
def test_urls_that_open_no_peer_say_why(url, text):
    with pytest.raises(ValueError, match=text):
        open_store(url)


def test_names_and_addresses_of_peers_are_parsed():
    assert channel.host_and_port("[::1]:7700") == ("::1", 7700)
    assert channel.host_and_port("host.example:7700") == ("host.example", 7700)
