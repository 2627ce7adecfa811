"""Stores on other hosts under failures: servers that die, hang or lie, wrong credentials, forgotten owners."""

from __future__ import annotations

import errno
import itertools
import json
import math
import mmap
import os
import resource
import ssl
import subprocess
import sys
import threading
import time
import uuid
from contextlib import closing
from importlib import import_module

import numpy as np
import pytest
import trustme
from hypothesis import given, settings
from hypothesis import strategies as st

import servers
from lmcache_mm import ops
from lmcache_mm.commands import cli
from lmcache_mm.secret import Seal
from lmcache_mm.stores import open_store, tiered
from lmcache_mm.stores.remote import hands, record, remote
from lmcache_mm.stores.remote.record import HEADER_BYTES
from lmcache_mm.stores.remote.remote import RemoteStore
from test_stores import OTHER_OWNER, OWNER, REMOTE, get, key, new_store, payload, remote_url, server, stats_of

SLOW_S = 20.0  # how far a call may exceed its budget on a busy machine


@pytest.fixture
def environment(monkeypatch):
    for name, value in {**servers.AWS, "LMCACHE_MM_SECRET": uuid.uuid4().hex}.items():
        monkeypatch.setenv(name, value)
    for name in ("PASSWORD", "PASSWORD_FILE", "USERNAME"):
        monkeypatch.delenv(f"LMCACHE_MM_VALKEY_{name}", raising=False)
    return monkeypatch


@pytest.fixture(params=[*REMOTE, "cluster"])
def store(request, tmp_path):
    store, remove = new_store(request.param, tmp_path)
    yield store
    remove()


@pytest.fixture
def far(tmp_path):
    """A valkey: store."""
    store, remove = new_store("valkey", tmp_path)
    yield store
    remove()


@pytest.fixture
def own_server(tmp_path, environment):
    """A Valkey server that the test may stop."""
    started = servers.valkey(tmp_path)
    yield started
    started.stop()


def engine_of(store):
    """The bare client, next to the store."""
    return store._hands[0]._connect()


def read_record(store, i, size=100):
    record = bytearray(HEADER_BYTES + size)
    assert engine_of(store).read(store._name(key(i)), memoryview(record)) == len(record)
    return record


def write_record(store, i, record):
    engine = engine_of(store)
    engine.delete([store._name(key(i))])
    assert engine.write(store._name(key(i)), memoryview(bytearray(record)), 0.0, False)


# --- Records


@pytest.mark.parametrize("place", [0, 10, 12, 20, 30, 40, 70, 100, 120, HEADER_BYTES, HEADER_BYTES + 99])
def test_a_record_with_one_bit_changed_anywhere_is_a_miss_and_removed(store, place):
    store.put([key(1)], [payload(1)], OWNER)
    record = read_record(store, 1)
    record[place] ^= 1
    write_record(store, 1, record)
    assert get(store, 1) is None
    assert (store.stats()["corrupt"], store.stats()["misses"]) == (1, 1) or place == 10
    assert store.contains([key(1)]) == [place == 10]  # of another version: it may belong to somebody


def test_two_records_that_are_exchanged_are_misses(store):
    store.put([key(1), key(2)], [payload(1), payload(2)])
    one, other = read_record(store, 1), read_record(store, 2)
    write_record(store, 1, other)
    write_record(store, 2, one)
    assert get(store, 1) is get(store, 2) is None
    assert store.stats()["corrupt"] == 2


@pytest.mark.parametrize("size", [1, HEADER_BYTES - 1, HEADER_BYTES, HEADER_BYTES + 50])
def test_a_truncated_record_is_a_miss_and_removed(store, size):
    store.put([key(1)], [payload(1)])
    write_record(store, 1, read_record(store, 1)[:size])
    assert get(store, 1) is None
    assert store.stats()["corrupt"] == 1
    store.put([key(1)], [payload(1)])
    assert get(store, 1) == payload(1)


def test_a_record_of_another_length_stays_whatever_length_is_asked_for(store):
    store.put([key(1)], [payload(1)])
    for size in (0, 1, 99, 101, 5000):
        assert get(store, 1, size) is None
    assert get(store, 1) == payload(1)
    assert store.stats()["corrupt"] == 0


def test_every_other_one_of_many_keys_is_found(far):
    keys = [key(i) for i in range(10_000)]
    far.put(keys[::2], [payload(i, 10) for i in range(0, 10_000, 2)])
    assert far.contains(keys) == [True, False] * 5000
    assert far.stats()["puts"] == 5000
    assert far.sizes()["records"] == 5000
    assert far.clear() == 5000


def test_two_writers_of_one_key_leave_one_of_both_records(store):
    ready = threading.Barrier(2)

    def write(i):
        ready.wait()
        for k in range(20):
            store.put([key(k)], [payload(i)])

    threads = [threading.Thread(target=write, args=(i,)) for i in (1, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(get(store, k) in (payload(1), payload(2)) for k in range(20))
    assert store.stats()["corrupt"] == 0


def test_wrong_checksums_never_leave_this_host(far):
    right = ops.checksum(np.frombuffer(payload(2), np.uint8))
    far.put([key(1), key(2)], [payload(1), payload(2)], checksums=[1, right])
    assert far.contains([key(1), key(2)]) == [False, True]
    assert (far.stats()["corrupt"], far.stats()["dropped_puts"], far.stats()["puts"]) == (1, 1, 1)


def test_names_and_owners_outside_do_not_tell_keys_or_owners(far):
    far.put([key(1)], [payload(1)], OWNER)
    assert key(1).hex() not in far._name(key(1))
    assert OWNER not in read_record(far, 1)


# --- Deployments and processes


@pytest.mark.parametrize("scheme", REMOTE)
def test_deployments_with_different_secrets_share_nothing_on_one_server(scheme, tmp_path):
    (one, remove_one), (other, remove_other) = (new_store(scheme, tmp_path) for _ in range(2))
    one.put([key(1)], [payload(1)], OWNER)
    assert other.contains([key(1)]) == [False]
    assert get(other, 1) is None
    assert other.forget(OWNER) == other.clear() == other.sizes()["records"] == 0
    # Not even a record that is copied to the other's name.
    write_record(other, 1, read_record(one, 1))
    assert other.contains([key(1)]) == [True]
    assert get(other, 1) is None
    assert other.stats()["corrupt"] == 1
    assert get(one, 1) == payload(1)
    remove_one()
    remove_other()


WRITER = """
import sys
from lmcache_mm.stores import open_store
store = open_store(sys.argv[1])
key = (7).to_bytes(36, "little")
assert store.contains([(1).to_bytes(36, "little")]) == [True]
store.put([key], [b"from another process"], owner=b"tenant-seven....")
store.flush()
store.close()
"""


@pytest.mark.parametrize("scheme", ["valkey", "s3"])
def test_processes_share_what_they_put(scheme, environment):
    store = open_store(remote_url(scheme))
    store.put([key(1)], [payload(1)], OTHER_OWNER)
    subprocess.run([sys.executable, "-c", WRITER, remote_url(scheme)], check=True, timeout=120)
    assert get(store, 7, 20) == b"from another process"
    assert store.forget(OWNER) == 1
    assert store.contains([key(1), key(7)]) == [True, False]
    store.close()


def test_processes_share_the_memory_that_one_lends_to_mooncake(environment):
    servers.need_mooncake()
    store = open_store(remote_url("mooncake"))
    store.put([key(1)], [payload(1)])
    url = server("mooncake").url  # without capacity: it lends no memory, and leaves nothing behind
    subprocess.run([sys.executable, "-c", WRITER, url], check=True, timeout=120)
    assert get(store, 7, 20) == b"from another process"
    assert store.forget(OWNER) == 1
    store.close()


def test_a_store_is_not_carried_over_a_fork(far):
    far.put([key(1)], [payload(1)])
    child = os.fork()
    if child == 0:
        status = 1
        try:
            far.contains([key(1)])
        except RuntimeError as error:
            status = 0 if "open it again after a fork" in str(error) else 2
        far.close()  # nothing, at once
        os._exit(status)
    assert os.waitpid(child, 0)[1] == 0
    assert get(far, 1) == payload(1)


# --- Owners and ages


def test_what_is_put_while_its_owner_is_forgotten_does_not_come_back(store, monkeypatch):
    real = store._contains

    def contains_and_forget(*arguments):
        there = real(*arguments)
        monkeypatch.undo()
        store.forget(OWNER)
        return there

    monkeypatch.setattr(store, "_contains", contains_and_forget)
    store.put([key(1)], [payload(1)], OWNER)
    assert store.contains([key(1)]) == [False]
    store.put([key(1)], [payload(1)], OWNER)
    assert store.contains([key(1)]) == [True]


def test_what_comes_from_another_store_and_was_forgotten_meanwhile_does_not_come_back(store):
    moment = store.moment()
    store.forget(OWNER)
    store.put([key(1)], [payload(1)], OWNER, as_of=moment)
    store.put([key(2)], [payload(2)], OTHER_OWNER, as_of=moment)
    store.put([key(3)], [payload(3)], OWNER, as_of=store.moment())
    assert store.contains([key(1), key(2), key(3)]) == [False, True, True]


def test_what_is_promoted_while_it_is_forgotten_elsewhere_does_not_come_back(tmp_path, monkeypatch):
    store, remove = new_store("mem,valkey", tmp_path)
    store._tiers[1].put([key(1)], [payload(1)], OWNER)
    read = store._tiers[1].get_into

    def read_and_forget(*arguments):
        found = read(*arguments)
        store.forget(OWNER)
        return found

    monkeypatch.setattr(store._tiers[1], "get_into", read_and_forget)
    assert store.get_into([key(1)], [bytearray(100)], OWNER) == [True]
    assert store.contains([key(1)]) == [False]
    remove()


def test_what_waits_is_not_written_down_when_another_process_forgot_it(tmp_path):
    store, remove = new_store("mem,valkey", tmp_path)
    moments = store._moments()
    store._tiers[1].forget(OWNER)
    store._write_later([tiered.Waiting(key(1), 100, OWNER, np.zeros(100, np.uint8), moments)])
    store.flush()
    assert store._tiers[1].contains([key(1)]) == [False]
    remove()


@pytest.mark.parametrize("scheme", ["valkey", "s3"])
def test_ages_go_on_and_old_records_are_gone(scheme, environment, monkeypatch):
    store = open_store(remote_url(scheme) + "&ttl=100")
    store.put([key(1)], [payload(1)])
    store.put([key(2)], [payload(2)], age_s=90)
    one, other, none = store.ages([key(1), key(2), key(3)])
    assert 0 <= one < 50
    assert 90 <= other < 140
    assert none == math.inf
    assert get(store, 1) == payload(1)
    if scheme == "valkey":
        left = engine_of(store)._client.pttl(store._name(key(2)))
        assert 0 < left <= 10_000
    assert store.contains([key(1), key(2)]) == [True, True]
    now = time.time()
    monkeypatch.setattr(remote.time, "time", lambda: now + 150)
    if scheme == "s3":  # the other server does it by itself
        assert store.contains([key(1), key(2)]) == [False, False]
    assert get(store, 1) is None
    store.close()


def test_an_age_that_somebody_altered_is_not_believed(store):
    store.put([key(1)], [payload(1)], age_s=1000)
    record = read_record(store, 1)
    record[16:24] = store.moment().to_bytes(8, "little")
    write_record(store, 1, record)
    (age,) = store.ages([key(1)])
    assert age == math.inf


# --- Servers that fail


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
        with pytest.raises(RuntimeError, match="forget: not everything could be removed"):
            store.forget(OWNER)
        within(store.close)


def test_a_server_that_hangs_in_the_middle_is_tried_again_after_a_while(own_server, monkeypatch):
    store = opened(own_server.port)
    store.put([key(1)], [payload(1)])
    assert get(store, 1) == payload(1)
    own_server.process.send_signal(19)  # SIGSTOP
    assert within(get, store, 1) is None
    assert store.stats()["down"] == 1
    own_server.process.send_signal(18)
    assert get(store, 1) is None  # left alone
    later(monkeypatch, 11)
    until = time.perf_counter() + SLOW_S
    while get(store, 1) is None:
        assert time.perf_counter() < until
        later(monkeypatch, 11)
        time.sleep(0.1)
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
        until = time.perf_counter() + SLOW_S
        while not all(store.contains(keys)):  # it has restarted empty
            assert time.perf_counter() < until
            later(monkeypatch, 11)
            store.put(keys, [payload(i) for i in range(50)], OWNER)
            time.sleep(0.1)
        assert store.forget(OWNER) == 50
        store.close()
    finally:
        cluster.stop()


def test_a_buffer_is_left_alone_once_the_call_has_returned(environment, monkeypatch):
    """The client returns the data long after the deadline."""
    answer, asked = threading.Event(), threading.Event()
    released = []

    class Late:
        def exists(self, names, peek):
            return [False] * len(names)

        def read(self, name, into):
            asked.set()
            answer.wait(30)
            record = np.full(HEADER_BYTES + 100, ord("x"), np.uint8)
            store._headers.write(record, name, 0, b"")
            into[:] = record.data
            released.append(name)
            return len(into)

        def write(self, name, record, ttl_s, replace):
            return True

        def close(self):
            pass

    store = RemoteStore("late", Late, Seal(b"a secret of a deployment"), 0.2, 1, 10)
    buffer = bytearray(100)
    assert store.get_into([key(1)], [buffer]) == [False]
    assert asked.wait(10)
    answer.set()
    until = time.monotonic() + 10
    while not released or store._hands[0].busy:
        assert time.monotonic() < until
        time.sleep(0.01)
    assert buffer == bytes(100)
    later(monkeypatch, 11)
    assert store.get_into([key(1)], [buffer]) == [True]  # and data in time arrives
    assert buffer == b"x" * 100
    store.close()


@pytest.mark.parametrize("when", ["before", "after"])
def test_what_arrives_of_a_request_given_up_earlier_is_never_taken_for_a_payload(store, monkeypatch, when):
    """It arrives in the connection's memory before or after the payload is copied from there."""
    store.put([key(1)], [payload(1)])
    touch = hands.Call.touch

    def touch_and_late_arrival(call, move):
        (hand,) = (hand for hand in store._hands if len(hand._memory))
        if when == "before":
            hand._memory[HEADER_BYTES + 50] ^= 1
        done = touch(call, move)
        hand._memory[:] = 0
        return done

    monkeypatch.setattr(hands.Call, "touch", touch_and_late_arrival)
    buffer = bytearray(100)
    found = store.get_into([key(1)], [buffer])
    assert (found, buffer == payload(1)) == ([when == "after"], when == "after")


class Kept:
    """A client whose server is a dictionary."""

    expires = False

    def __init__(self, kept=None):
        self.kept = {} if kept is None else kept

    def exists(self, names, peek):
        return [name in self.kept for name in names]

    def heads(self, names, size):
        return [self.kept.get(name, b"")[:size] or None for name in names]

    def read(self, name, into):
        if name not in self.kept:
            return None
        if len(self.kept[name]) <= len(into):
            into[: len(self.kept[name])] = self.kept[name]
        return len(self.kept[name])

    def write(self, name, record, ttl_s, replace):
        self.kept[name] = bytes(record)
        return True

    def delete(self, names):
        for name in names:
            self.kept.pop(name, None)

    def names(self, prefix):
        yield [name for name in self.kept if name.startswith(prefix)]

    def close(self):
        pass


ANY_RECORD = st.one_of(
    st.binary(max_size=300),
    st.binary(max_size=300).map(lambda end: record.MAGIC + bytes([record.VERSION, 0, 0, 0, 0, 0]) + end),
    st.tuples(st.integers(0, HEADER_BYTES + 100), st.integers(0, HEADER_BYTES + 100), st.binary(max_size=20)),
)


@settings(max_examples=300, deadline=None)
@given(ANY_RECORD)
def test_whatever_a_server_holds_under_a_name_is_a_miss_unless_it_was_put(content):
    """`content`: bytes; or a range of a real record and its replacement."""
    kept = {}
    store = RemoteStore("kept", lambda: Kept(kept), Seal(b"a secret of a deployment"), 30, 1, 100)
    store.put([key(1)], [payload(1)], OWNER)
    (name,) = kept
    put = kept[name]
    kept[name] = content if isinstance(content, bytes) else put[: content[0]] + content[2] + put[content[1] :]
    same = kept[name] == put
    assert store.sizes()["records"] == (store.ages([key(1)]) != [math.inf])
    assert get(store, 1) == (payload(1) if same else None)
    assert store.forget(OWNER) in (0, 1)
    store.clear()
    assert not [left for left in kept if left.startswith(store._records)]
    assert (store.stats()["errors"], store.stats()["down"]) == (0, 0)
    store.close()


def test_a_put_that_arrives_after_its_time_is_removed_if_its_owner_was_forgotten_meanwhile():
    kept, arrive, arriving = {}, threading.Event(), threading.Event()

    class Slow(Kept):
        def write(self, *arguments):
            arriving.set()
            arrive.wait(30)
            return super().write(*arguments)

    seal = Seal(b"a secret of a deployment")
    slow, other = (RemoteStore("kept", lambda e=engine: e(kept), seal, 0.2, 1, 10) for engine in (Slow, Kept))
    for forgotten in (True, False):
        owner = OWNER if forgotten else OTHER_OWNER
        slow._breaker.tell(True)
        slow.put([key(1)], [payload(1)], owner)
        assert arriving.wait(10)
        assert other.forget(OWNER) == 0
        arrive.set()
        until = time.monotonic() + 10
        while slow._hands[0].busy:
            assert time.monotonic() < until
            time.sleep(0.01)
        assert other.contains([key(1)]) == [not forgotten]
        arrive.clear()
        arriving.clear()
    slow.close()
    other.close()


class Shared:
    """A client that all connections share; its calls take a while."""

    def __init__(self, asking_s):
        self.asking_s, self.asked_at_once, self.most_at_once, self.closed = asking_s, 0, 0, []
        self.lock = threading.Lock()

    def exists(self, names, peek):
        with self.lock:
            self.asked_at_once += 1
            self.most_at_once = max(self.most_at_once, self.asked_at_once)
        time.sleep(self.asking_s)
        with self.lock:
            self.asked_at_once -= 1
        return [True] * len(names)

    def close(self):
        self.closed.append(self.asked_at_once)


def test_calls_are_spread_over_the_connections_and_one_that_is_slow_with_much_is_not_down():
    client = Shared(0.05)
    store = RemoteStore("shared", lambda: client, Seal(b"a secret of a deployment"), 30, 4, 1)
    callers = [threading.Thread(target=store.contains, args=([key(i)],)) for i in range(16)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert client.most_at_once == 4
    assert [hand.busy for hand in store._hands] == [0] * 4
    store.close()
    slow = RemoteStore("slow", lambda: client, Seal(b"a secret of a deployment"), 0.5, 1, 1)
    found = slow.contains([key(i) for i in range(100)])
    assert 0 < sum(found) < 100
    assert slow.stats()["down"] == 0
    assert slow.stats()["timeouts"] == 1
    slow.close()


def test_a_client_is_closed_once_and_behind_what_it_does():
    client = Shared(0.3)
    store = RemoteStore("shared", lambda: client, Seal(b"a secret of a deployment"), 10, 4, 1)
    callers = [threading.Thread(target=store.contains, args=([key(i)],)) for i in range(4)]
    for caller in callers:
        caller.start()
    time.sleep(0.1)
    store.close()
    assert client.closed == [0]
    for caller in callers:
        caller.join()
    hangs = Shared(3)
    store = RemoteStore("hangs", lambda: hangs, Seal(b"a secret of a deployment"), 0.2, 2, 1)
    store.contains([key(1)])
    store.close()
    assert hangs.closed == []  # still in use: it is abandoned


def test_one_connection_that_hangs_does_not_hold_up_the_others(environment):
    hang = threading.Event()
    first = threading.Lock()

    class Sometimes:
        def exists(self, names, peek):
            if first.acquire(blocking=False):
                hang.wait(30)
            return [True] * len(names)

        def close(self):
            pass

    store = RemoteStore("sometimes", Sometimes, Seal(b"a secret of a deployment"), 2, 3, 10)
    assert store.contains([key(i) for i in range(5)]) == [False] * 5
    store._breaker.tell(True)
    for _ in range(10):
        assert store.contains([key(i) for i in range(50)]) == [True] * 50
    within(store.close)
    hang.set()


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
    later(monkeypatch, 11)
    until = time.perf_counter() + SLOW_S
    while not store.contains([key(1)])[0]:
        store.put([key(1)], [payload(1)])
        assert time.perf_counter() < until
        time.sleep(0.1)
        later(monkeypatch, 11)
    assert get(store, 1) == payload(1)
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


def test_a_kernel_without_huge_pages_is_good_enough(monkeypatch):
    class Plain(mmap.mmap):
        def madvise(self, *_):
            raise OSError(errno.EINVAL, "no such advice")

    monkeypatch.setattr(hands.mmap, "mmap", Plain)
    store = RemoteStore("kept", Kept, Seal(b"a secret of a deployment"), 30, 1, 100)
    store.put([key(1)], [payload(1)])
    assert get(store, 1) == payload(1)
    store.close()


@pytest.mark.parametrize("lack", [MemoryError(), OSError(errno.ENOMEM, "no memory")])
def test_memory_that_cannot_be_had_costs_a_call_and_is_not_held_against_the_server(lack, monkeypatch, caplog):
    store = RemoteStore("kept", Kept, Seal(b"a secret of a deployment"), 30, 1, 100)
    store.put([key(1)], [payload(1)])
    with monkeypatch.context() as patched:

        def fail(*_, **__):
            raise lack

        patched.setattr(hands.Hand, "memory", fail)
        assert get(store, 1) is None
        store.put([key(2)], [payload(2)])
        assert store.stats()["dropped_puts"] == 1
    store.put([key(2)], [payload(2)])
    assert get(store, 1) == payload(1)
    assert get(store, 2) == payload(2)
    assert not caplog.records
    store.close()


# --- Opening


def test_passwords_come_from_the_environment_or_a_private_file(environment, tmp_path):
    server = servers.valkey(tmp_path, "--requirepass", "the right one")
    url = f"valkey://127.0.0.1:{server.port}?timeout=20"
    for wrong in (None, "the wrong one"):
        if wrong:
            environment.setenv("LMCACHE_MM_VALKEY_PASSWORD", wrong)
        with pytest.raises(PermissionError, match="LMCACHE_MM_VALKEY_PASSWORD") as raised:
            open_store(url)
        assert "wrong" not in str(raised.value)
    environment.setenv("LMCACHE_MM_VALKEY_PASSWORD", "the right one")
    open_store(url).close()
    environment.delenv("LMCACHE_MM_VALKEY_PASSWORD")
    file = tmp_path / "password"
    file.write_text("the right one\n")
    file.chmod(0o600)
    environment.setenv("LMCACHE_MM_VALKEY_PASSWORD_FILE", str(file))
    store = open_store(url)
    store.put([key(1)], [payload(1)])
    assert get(store, 1) == payload(1)
    store.close()
    file.chmod(0o644)
    with pytest.raises(PermissionError, match="LMCACHE_MM_VALKEY_PASSWORD_FILE: expected mode 0600"):
        open_store(url)
    server.stop()


def test_wrong_keys_of_s3_and_buckets_that_are_not_there_are_errors(environment):
    environment.setenv("AWS_SECRET_ACCESS_KEY", "another")
    with pytest.raises(PermissionError, match="refuses the credentials of AWS_ACCESS_KEY_ID") as raised:
        open_store(remote_url("s3"))
    assert "another" not in str(raised.value)
    environment.setenv("AWS_SECRET_ACCESS_KEY", servers.AWS["AWS_SECRET_ACCESS_KEY"])
    with pytest.raises(ValueError, match="there is no bucket s3://none-such"):
        open_store(remote_url("s3").replace("bucket/", "none-such/"))


def test_tls_checks_the_servers_certificate(environment, tmp_path):
    authority = trustme.CA()
    (tmp_path / "ca.pem").write_bytes(authority.cert_pem.bytes())
    (tmp_path / "other.pem").write_bytes(trustme.CA().cert_pem.bytes())
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("localhost", "127.0.0.1").configure_cert(context)
    proxy = servers.TlsProxy(server("valkey").port, context)
    url = f"valkey://127.0.0.1:{proxy.port}?timeout=5&tls=1&ca={tmp_path}"
    store = open_store(f"{url}/ca.pem")
    store.put([key(1)], [payload(1, 1_000_000)])
    assert get(store, 1, 1_000_000) == payload(1, 1_000_000)
    store.close()
    store = open_store(f"{url}/other.pem")
    assert store.stats()["down"] == 1
    store.close()
    with pytest.raises(ValueError, match=rf"valkey://127.0.0.1:{proxy.port} speaks TLS: add \?tls=1"):
        open_store(f"valkey://127.0.0.1:{proxy.port}?timeout=20")
    proxy.close()
    with pytest.raises(ValueError, match=r"does not speak TLS: leave out \?tls=1"):
        open_store(f"{server('valkey').url}&tls=1")


def test_a_valkey_that_nobody_runs_is_said_at_once(environment, caplog):
    store = open_store(f"valkey://127.0.0.1:{servers.free_port()}?timeout=4")
    assert store.stats()["down"] == 1
    assert "Connection refused" in caplog.text
    store.close()


def test_without_the_secret_no_store_beyond_this_host_opens(environment):
    environment.delenv("LMCACHE_MM_SECRET")
    for url in ("valkey://127.0.0.1:1", "s3://bucket", "mooncake://127.0.0.1:1"):
        with pytest.raises(ValueError, match=r"store: \w+: needs the deployment's secret"):
            open_store(url)


@pytest.mark.parametrize(
    "url",
    [
        "valkey://user:hunter2@host:6379",
        "valkey:user:hunter2@host:6379",
        "s3://bucket?endpoint=https://user:hunter2@host",
        "tiered:mem://?capacity=1MiB,valkey://:hunter2@host:6379",
        "tiered:mem://?capacity=1MiB,valkey:hunter2@host:6379",
        "valkey://host:6379?password=hunter2",
    ],
)
def test_a_password_in_a_url_is_refused_and_not_repeated(url, environment):
    for one in (url, [url]):
        with pytest.raises(ValueError) as raised:
            open_store(one)
        assert "hunter2" not in str(raised.value)


@pytest.mark.parametrize("host, warned", [("127.0.0.1", 0), ("localhost", 0), ("[::1]", 0), ("10.0.0.7", 1)])
def test_an_endpoint_without_tls_beyond_this_host_is_warned_of(host, warned, recwarn, environment):
    connecting = import_module("lmcache_mm.stores.remote.s3").connecting
    for scheme in ("http", "https"):
        connecting("bucket", "", f"{scheme}://{host}:1", "r", 1.0)
    said = [str(warning.message) for warning in recwarn if "not encrypted" in str(warning.message)]
    assert len(said) == warned


@pytest.mark.parametrize(
    "url, text",
    [
        ("valkey://", "expected valkey://HOST:PORT, got valkey://"),
        ("valkey://host", "expected valkey://HOST:PORT"),
        ("valkey://host:70000", "expected valkey://HOST:PORT"),
        ("valkey://host:1/2", "expected valkey://HOST:PORT"),
        ("valkey://host:1?capacity=1GiB", "unknown option 'capacity'"),
        ("valkey://host:1?tls=yes", "tls: expected 0 or 1, got 'yes'"),
        ("valkey://host:1?ca=/x", "ca: expected with tls=1 only"),
        ("valkey://host:1?timeout=0", "timeout: expected more than 0 seconds"),
        ("valkey://host:1?timeout=soon", "timeout: expected seconds, got 'soon'"),
        ("valkey://host:1?connections=0", "connections: expected 1 to 999, got '0'"),
        ("s3://", "expected s3://BUCKET/PREFIX"),
        ("s3://bucket?endpoint=host", "endpoint: expected a URL that begins with http"),
        ("mooncake://host", "expected mooncake://HOST:PORT"),
        ("mooncake://host:1?ttl=5", "unknown option 'ttl'"),
    ],
)
def test_urls_of_stores_beyond_this_host_that_open_none_say_why(url, text, environment):
    with pytest.raises(ValueError, match=text):
        open_store(url)


@pytest.mark.parametrize(
    "scheme, package", [("valkey", "glide_sync"), ("s3", "obstore"), ("mooncake", "mooncake.store")]
)
def test_a_client_that_is_not_installed_is_named_with_its_extra(scheme, package, environment):
    environment.setitem(sys.modules, package, None)
    environment.delitem(sys.modules, f"lmcache_mm.stores.remote.{scheme}", raising=False)
    with pytest.raises(RuntimeError, match=rf"store: {scheme}: .*pip install '\.\[{scheme}\]'"):
        open_store({"s3": "s3://bucket"}.get(scheme, f"{scheme}://host:1"))


def test_stat_and_clear_work_on_stores_beyond_this_host(environment, capsys):
    url = remote_url("valkey")
    store = open_store(url)
    store.put([key(1), key(2)], [payload(1), payload(2)])
    assert cli.main(["stat", url]) == 0
    assert "records          2" in capsys.readouterr().out.splitlines()
    assert cli.main(["clear", url]) == 0
    assert "2 records removed" in capsys.readouterr().out
    assert stats_of(store)["records"] == 0
    store.close()
    with servers.mute() as port:
        assert cli.main(["stat", f"valkey://127.0.0.1:{port}?timeout=0.2"]) == 2
    assert "python -m lmcache_mm: valkey://127.0.0.1" in capsys.readouterr().err


def test_the_demo_starts_warm_from_what_an_earlier_run_left_on_a_server(environment, tmp_path, capsys):
    pytest.importorskip("transformers", reason="the demo needs its packages: pip install '.[demo]'")
    import demo  # noqa: PLC0415

    hits = []
    for run in ("first", "second"):
        report = tmp_path / f"{run}.json"
        options = ["--image-size", "112", "--max-new-tokens", "2", "--store", remote_url("valkey")]
        assert demo.main([*options, "--json", str(report)]) == 0
        rows = json.loads(report.read_text())["rows"]
        assert all(row["equal"] for row in rows)
        hits.append([row["total_tokens"] - row["kv_hits"] for row in rows])
    assert "Keys from content" in capsys.readouterr().out
    assert hits[0][0] > 1
    assert hits[1] == [1] * 8
