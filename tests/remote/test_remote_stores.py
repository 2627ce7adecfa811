"""Stores on other hosts: damaged records, deployments and processes, owners and ages."""

import math
import os
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

import servers
from lmcache_mm import ops
from lmcache_mm.stores import open_store, write_behind
from lmcache_mm.stores.remote import remote
from lmcache_mm.stores.remote.record import HEADER_BYTES
from remotes import engine_of, read_record, write_record
from test_stores import OTHER_OWNER, OWNER, REMOTE, get, key, new_store, payload, remote_url, server

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
    store._behind.add([write_behind.Waiting(key(1), 100, OWNER, np.zeros(100, np.uint8), moments)])
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
