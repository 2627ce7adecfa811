"""What every store promises, and what mem:// does when it is full."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmcache_mm import ops
from lmcache_mm.stores import open_store


def key(i):
    return i.to_bytes(36, "little")


def payload(i, size=100):
    return bytes((i + k) % 251 for k in range(size))


@pytest.fixture
def store():
    store = open_store("mem://?capacity=1KiB")
    yield store
    store.close()


def get(store, i, size=100):
    buffer = bytearray(size)
    return bytes(buffer) if store.get_into([key(i)], [buffer]) == [True] else None


def test_what_was_put_is_contained_and_read_back(store):
    store.put([key(1), key(2)], [payload(1), memoryview(payload(2, 7))])
    assert store.contains([key(1), key(3), key(2)]) == [True, False, True]
    assert get(store, 1) == payload(1)
    assert get(store, 2, 7) == payload(2, 7)
    assert get(store, 3) is None


def test_a_record_of_another_length_is_a_miss_and_stays(store):
    store.put([key(1)], [payload(1)])
    assert get(store, 1, 99) is None
    assert get(store, 1) == payload(1)
    assert store.stats()["misses"] == 1


def test_a_key_that_is_there_keeps_its_record(store):
    store.put([key(1)], [payload(1)])
    store.put([key(1)], [payload(2)])
    assert get(store, 1) == payload(1)


def test_empty_payloads_and_no_keys_are_valid(store):
    store.put([], [])
    store.put([key(1)], [b""])
    assert store.contains([]) == []
    assert get(store, 1, 0) == b""


def test_deleted_records_are_gone_and_unknown_keys_are_ignored(store):
    store.put([key(1), key(2)], [payload(1), payload(2)])
    store.delete([key(1), key(9)])
    assert store.contains([key(1), key(2)]) == [False, True]
    store.flush()


def test_a_wrong_checksum_is_never_read_back(store):
    store.put([key(1)], [payload(1)], checksums=[ops.checksum(np.frombuffer(payload(1), np.uint8)) ^ 1])
    assert get(store, 1) is None
    assert store.stats()["corrupt"] == 1
    assert store.contains([key(1)]) == [False]


def test_a_record_larger_than_the_store_is_dropped_and_counted(store):
    store.put([key(1), key(2)], [payload(1, 2000), payload(2)])
    assert store.contains([key(1), key(2)]) == [False, True]
    assert store.stats()["dropped_puts"] == 1


def test_the_least_recently_used_record_goes_first_and_the_head_of_a_prefix_last(store):
    for i in range(8):
        store.put([key(i)], [payload(i)])
    assert store.stats()["used_bytes"] == 1024
    get(store, 0)
    store.put([key(8)], [payload(8)])
    assert store.contains([key(0), key(1), key(2), key(8)]) == [True, False, True, True]
    store.get_into([key(2), key(3)], [bytearray(100), bytearray(100)])
    for i in range(10, 16):
        store.put([key(i)], [payload(i)])
    store.put([key(16)], [payload(16)])
    assert store.contains([key(2), key(3)]) == [True, False]


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.sampled_from("pgd"), st.integers(0, 9), st.integers(0, 500)), max_size=60))
def test_any_sequence_of_calls_never_returns_a_wrong_payload(calls):
    store = open_store("mem://?capacity=1KiB")
    sizes = {}
    for call, i, size in calls:
        if call == "p":
            there = store.contains([key(i)])[0]
            store.put([key(i)], [payload(i + size, size)])
            sizes[i] = sizes[i] if there else size
        elif call == "d":
            store.delete([key(i)])
        elif store.contains([key(i)])[0]:
            assert get(store, i, sizes[i]) == payload(i + sizes[i], sizes[i])
        stats = store.stats()
        assert stats["used_bytes"] <= stats["capacity_bytes"] == 1024
        assert all(a[1] < b[0] for a, b in zip(store._gaps, store._gaps[1:], strict=False))
    store.delete([key(i) for i in range(10)])
    assert store._gaps == [(0, 1024)]


@pytest.mark.parametrize(
    "url, text",
    [
        ("mem://", "capacity is missing"),
        ("mem://?capacity=", "capacity: expected a size such as 512MiB or 8GiB, got ''"),
        ("mem://?capacity=0", "capacity: expected a size"),
        ("mem://?capacity=-1GiB", "capacity: expected a size"),
        ("mem://?capacity=1GiBs", "capacity: expected a size"),
        ("mem://?capacity=8", "capacity: expected at least 64 bytes, got 8"),
        ("mem://?capacity=1GiB&size=3", "unknown option 'size'"),
        ("mem://host?capacity=1GiB", "takes no host and no path"),
        ("memory://?capacity=1GiB", "expected a URL such as mem://"),
        ("/tmp/x", "expected a URL such as mem://"),
        ("", "expected a URL such as mem://"),
        ("mem://?capacity", "capacity"),
    ],
)
def test_urls_that_open_no_store_say_why(url, text):
    with pytest.raises(ValueError, match=text):
        open_store(url)
