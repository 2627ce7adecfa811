"""shm: and file: stores among processes: what is lent, evicted and forgotten."""

import contextlib
import gc
import os
import random
import subprocess
import sys
import time

import numpy as np
import pytest

from lmcache_mm.stores.local import slab
from lmcache_mm.stores.local.file import FileStore
from lmcache_mm.stores.local.shm import ShmStore
from slabs import IN_ANOTHER, MIB, fill, in_another_process, no_room_is_lost, pinned
from test_stores import OTHER_OWNER, OWNER, get, key, payload

# --- Processes


def test_processes_see_each_others_records_at_once(store):
    store.put([key(1)], [payload(1, 70_000)])
    assert in_another_process(store, "print(get(store, 1, 70_000) == payload(1, 70_000))") == "True"
    in_another_process(store, "store.put([key(2)], [payload(2)])")
    assert get(store, 2) == payload(2)


def test_records_outlive_the_processes(kind, directory):
    with contextlib.closing(kind.open(directory, MIB)) as store:
        store.put([key(1)], [payload(1)])
    store = kind.open(directory, None)
    assert get(store, 1) == payload(1)
    assert store.stats()["hits"] == 1


def test_one_directory_is_one_store_of_a_process_and_every_open_asks_for_a_close(kind, directory):
    first, second = kind.open(directory, MIB), kind.open(directory / ".." / "store", MIB)
    assert first is second
    first.close()
    second.put([key(1)], [payload(1)])
    second.close()
    with pytest.raises(RuntimeError, match="it is closed"):
        first.contains([key(1)])
    first.close()


def test_another_capacity_or_other_options_are_refused(kind, directory):
    store = kind.open(directory, MIB)
    for capacity, quota in ((2 * MIB, 0), (MIB, 5)):
        with pytest.raises(ValueError, match="open in this process with other options"):
            kind.open(directory, capacity, quota)
    store.close()
    with pytest.raises(ValueError, match=f"has capacity={MIB}, got {2 * MIB}: open it with its own, or remove"):
        kind.open(directory, 2 * MIB)
    kind.open(directory, MIB)


def test_a_store_is_not_carried_over_a_fork(store):
    store.put([key(1)], [payload(1)])
    child = os.fork()
    if child == 0:
        status = 1
        try:
            with pytest.raises(RuntimeError, match="open it again after a fork"):
                store.contains([key(1)])
            store.close()
            again = type(store).open(store.directory, None)
            assert again is not store
            assert get(again, 1) == payload(1)
            again.put([key(2)], [payload(2)])
            again.close()
            gc.collect()
            status = 0
        finally:
            os._exit(status)
    assert os.waitpid(child, 0)[1] == 0
    assert get(store, 2) == payload(2)
    assert in_another_process(store, "print(store.stats()['processes'])") == "2"


def test_at_most_64_processes_have_it_open(store):
    fd = store._lock_fd
    holder = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import fcntl, os, sys\nfd = os.open(sys.argv[1], os.O_RDWR)\n"
            "[fcntl.lockf(fd, fcntl.LOCK_EX, 1, row) for row in range(64) if row != int(sys.argv[2])]\n"
            "print('held', flush=True)\nsys.stdin.read()",
            str(store.directory / "lock"),
            str(store._row),
        ],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert holder.stdout.readline() == b"held\n"
    done = subprocess.run(
        [sys.executable, "-c", IN_ANOTHER, type(store).__name__, store.directory],
        check=False,
        capture_output=True,
        text=True,
    )
    assert "is open in 64 processes, the most that it allows" in done.stderr
    holder.communicate()
    assert slab.locked_by_another(fd, (store._row + 1) % 64) is False


# --- Pins, eviction, room


def test_what_is_lent_is_neither_evicted_nor_overwritten(kind, store):
    store.put([key(1)], [payload(1, 100_000)])
    (slot,) = store.lend([key(1)], [100_000])
    fill(store, count=40)
    assert get(store, 1, 100_000) == payload(1, 100_000)
    store.delete([key(1)])
    assert store.contains([key(1)]) == [False]
    fill(store, first=200, count=40)
    if kind is ShmStore:
        assert bytes(store.view(slot)) == payload(1, 100_000)
    assert store.stats()["pending"] == 1
    store.release([slot])
    store.put([key(2)], [payload(2)])
    assert no_room_is_lost(store)


def test_another_process_does_not_evict_what_is_lent_here(store):
    store.put([key(1)], [payload(1, 100_000)])
    (slot,) = store.lend([key(1)], [100_000])
    in_another_process(store, "for i in range(100, 140): store.put([key(i)], [payload(i, 100_000)])")
    assert get(store, 1, 100_000) == payload(1, 100_000)
    store.release([slot])


def test_a_store_whose_slots_are_all_held_drops_puts_and_recovers(store):
    fill(store, count=9)
    keys = [key(i) for i in range(100, 109)]
    held = [slot for slot in store.lend(keys, [100_000] * 9) if slot]
    store.put([key(1)], [payload(1, 500_000)])
    assert store.contains([key(1)]) == [False]
    assert store.stats()["dropped_puts"] == 1
    store.release(held)
    store.put([key(1)], [payload(1, 500_000)])
    assert get(store, 1, 500_000) == payload(1, 500_000)


def test_a_slot_that_was_lent_twice_is_held_until_both_are_released(store):
    store.put([key(1)], [payload(1)])
    slots = [store.lend([key(1)], [100])[0] for _ in range(2)]
    store.release(slots[:1])
    assert pinned(store, 1)
    store.release(slots[1:])
    assert not pinned(store, 1)
    assert store.lend([key(1), key(2)], [99, 100]) == [None, None]
    assert not pinned(store, 1)


def test_records_that_are_asked_for_stay_and_the_head_of_a_prefix_goes_last(store):
    fill(store, first=0, size=60_000, count=4)
    prefix = [key(i) for i in range(10, 16)]
    store.put(prefix, [payload(i, 60_000) for i in range(10, 16)])
    for i in range(100, 130):
        assert get(store, 0, 60_000) == payload(0, 60_000)
        store.put([key(i)], [payload(i, 60_000)])
        there = store.contains(prefix)
        assert there == sorted(there, reverse=True)
    assert get(store, 0, 60_000) == payload(0, 60_000)


def test_two_writers_of_one_key_leave_one_record(store):
    slots = [store.reserve([key(1)], [100])[0] for _ in range(2)]
    for slot in slots:
        store.publish([slot], store._write([slot], [np.frombuffer(payload(1), np.uint8)], None))
    assert get(store, 1) == payload(1)
    assert store.stats()["puts"] == store.stats()["records"] == 1
    assert no_room_is_lost(store)


def test_abandoned_slots_are_free_again(store):
    store.abandon([slot for slot in store.reserve([key(1), key(2)], [300_000, 5]) if slot])
    assert no_room_is_lost(store)
    store.publish(store.reserve([key(3)], [10]), [0])
    assert get(store, 3, 10) is None  # its checksum is wrong


def test_slots_never_cross_the_end_of_a_segment(kind, directory, monkeypatch):
    monkeypatch.setattr(slab, "SEGMENT_BYTES", 256 << 10)
    store = kind.open(directory, MIB)
    random.seed(5)
    for i in range(300):
        size = random.randrange(1, 256 << 10)
        slots = store.reserve([key(i)], [size])
        for slot in slots:
            begin = slot.start * store._granule_bytes
            assert begin // (256 << 10) == (begin + size - 1) // (256 << 10)
        store.publish(slots, [0])
    store.put([key(1000)], [bytes((256 << 10) + 1)])
    assert store.contains([key(1000)]) == [False]
    assert no_room_is_lost(store)


def test_waste_is_at_most_a_tenth_on_a_mix_of_chunks_and_tails(directory):
    """Qwen2-VL-2B: 7 MiB per chunk of 256 tokens, tails of whole pages of 16."""
    page = 28 * 2 * 16 * 2 * 128 * 2
    store = FileStore.open(directory, 1200 * MIB)
    random.seed(2)
    shares = []
    for i in range(1500):
        pages = 16 if random.random() < 0.6 else random.randrange(1, 16)
        store.publish(store.reserve([key(i)], [pages * page]), [0])
        store.contains([key(int(i * random.random() ** 0.5)) for _ in range(3)])
        if i > 500:
            stats = store.stats()
            shares.append(stats["used_bytes"] / stats["capacity_bytes"])
    assert store.stats()["evictions"] > 500
    assert np.mean(shares) >= 0.9, np.mean(shares)


def test_the_slab_is_registered_once_in_pieces_of_a_segment(directory, monkeypatch):
    """With a stand-in for the driver; not tried on a GPU."""
    calls = []

    def registered(device, address, size, piece):
        calls.append((device, address, size, piece))
        if len(calls) == 1:
            raise RuntimeError("register_host: cudaErrorMemoryAllocation: out of memory")

    monkeypatch.setattr(slab._C, "cuda_register_host", registered, raising=False)
    monkeypatch.setattr(slab._C, "cuda_unregister_host", lambda *call: calls.append(call), raising=False)
    store = ShmStore.open(directory, MIB)
    with pytest.warns(UserWarning, match="cannot be pinned, transfers are slower: register_host: .*out of memory"):
        store.register(3)
    store.register(3)
    store.register(3)
    store.close()
    assert len(calls) == 3
    assert calls[0] == calls[1] == calls[2]
    assert calls[1][0] == 3
    assert calls[1][2:] == (MIB, 1 << 30)


def test_a_put_that_raises_gives_its_slots_back(store, monkeypatch):
    def out_of_memory(*_):
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(store, "_write", out_of_memory)
        with pytest.raises(MemoryError):
            store.put([key(1)], [payload(1)])
    assert no_room_is_lost(store)


def test_a_put_that_cannot_fit_does_not_evict_everything_first(kind, directory):
    store = kind.open(directory, 64 * MIB)
    for i in range(315):
        store.put([key(i)], [bytes(200_000)])
    held = [slot for slot in store.lend([key(i) for i in range(0, 315, 8)], [200_000] * 40) if slot]
    store.put([key(1000)], [bytes(3 << 20)])
    assert store.contains([key(1000)]) == [False]
    assert store.stats()["dropped_puts"] == 1
    assert store.stats()["records"] > 100
    store.release(held)


def test_a_pin_ends_once(kind, store):
    store.put([key(1)], [payload(1)])
    (slot,) = store.lend([key(1)], [100])
    release = store.hold([key(1)])
    release()
    release()
    assert pinned(store, 1)  # by the lent slot
    again = store.hold([key(1)])
    child = os.fork()
    if child == 0:
        again()
        os._exit(0)
    os.waitpid(child, 0)
    store.release([slot])
    assert pinned(store, 1)
    directory = store.directory
    store.close()
    store = kind.open(directory, None)
    store.hold([key(1)])
    again()
    assert pinned(store, 1)


@pytest.mark.parametrize("checksums", [[], [1, 2], [2**64], [-(2**63) - 1]])
def test_checksums_that_are_none_are_refused_and_leak_nothing(store, checksums):
    with pytest.raises(ValueError, match=r"checksums(\[0\])?: expected"):
        store.put([key(1)], [payload(1)], checksums=checksums)
    assert store.stats()["pending"] == 0
    slots = store.reserve([key(1)], [100])
    with pytest.raises(ValueError, match=r"checksums(\[0\])?: expected"):
        store.publish(slots, checksums)
    store.abandon(slots)
    assert no_room_is_lost(store)


# --- Owners


def test_a_quota_evicts_the_owners_own_oldest_records(kind, directory):
    store = kind.open(directory, MIB, quota=250_000)
    store.put([key(9)], [payload(9, 100_000)], owner=OTHER_OWNER)
    for i in range(5):
        store.put([key(i)], [payload(i, 100_000)], owner=OWNER)
    assert store.contains([key(i) for i in (0, 1, 2, 3, 4, 9)]) == [False, False, False, True, True, True]
    store.put([key(5)], [payload(5, 250_001)], owner=OWNER)
    assert store.contains([key(5), key(4)]) == [False, True]
    many = [key(i) for i in range(20, 25)]
    store.put(many, [payload(7, 100_000)] * 5, owner=OWNER)  # in one call
    assert sum(store.contains(many)) <= 2
    store.put([key(6)], [payload(6, 300_000)])  # without an owner
    assert store.contains([key(6)]) == [True]
    assert no_room_is_lost(store)


def test_records_past_their_time_are_gone_whatever_the_wall_clock_says(kind, directory, monkeypatch):
    now = slab.boot_clock()
    monkeypatch.setattr(slab, "boot_clock", lambda: now)
    store = kind.open(directory, MIB, ttl_s=60)
    store.put([key(1)], [payload(1)])
    monkeypatch.setattr(time, "time", lambda: 0.0)
    now += 59
    assert get(store, 1) == payload(1)
    now += 2
    assert store.contains([key(1)]) == [False]
    assert get(store, 1) is None
    store.put([key(1)], [payload(2)])
    assert get(store, 1) == payload(2)
    assert store.stats()["records"] == 1
