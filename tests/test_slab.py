"""shm: and file: stores among processes, and under failures."""

from __future__ import annotations

import contextlib
import gc
import os
import random
import shutil
import signal
import struct
import subprocess
import sys
import time
import uuid
import warnings
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmcache_mm.commands.cli import main
from lmcache_mm.stores.local import file, slab, slab_files
from lmcache_mm.stores.local.file import FileStore
from lmcache_mm.stores.local.shm import ShmStore
from test_host_cuda import CXX, REPO, must_run, run
from test_stores import OTHER_OWNER, OWNER, get, key, payload

MIB = 1 << 20
KINDS = [ShmStore, FileStore]
REST_S = 10  # how long a dead process's reserved slots rest


@pytest.fixture(params=KINDS, ids=lambda kind: kind.scheme)
def kind(request):
    return request.param


@pytest.fixture
def directory(tmp_path):
    """A store's directory; closes what is still open there at the end."""
    yield tmp_path / "store"
    for store in list(slab._open.values()):
        while store._opened:
            store.close()


@pytest.fixture
def store(kind, directory):
    return kind.open(directory, MIB)


def python(code, *arguments):
    """Runs code in another process; returns its output."""
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)], check=False, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


IN_ANOTHER = """
import sys, pathlib
sys.path.insert(0, sys.argv[3])
from test_stores import *
from lmcache_mm import stores
store = getattr(stores, sys.argv[1]).open(pathlib.Path(sys.argv[2]), None)
"""


LATE = """
import sys, pathlib
from lmcache_mm import stores
print("opening", flush=True)
store = getattr(stores, sys.argv[1]).open(pathlib.Path(sys.argv[2]), 1 << 20)
print("open", flush=True)
sys.stdin.read()
"""


def in_another_process(store, code):
    return python(IN_ANOTHER + code, type(store).__name__, store.directory, Path(__file__).parent)


def no_room_is_lost(store):
    """Asserts that the store is empty and all its room is free."""
    assert store._index.check(store._terms(1)) == ""
    store.clear()
    stats = store.stats()
    assert (stats["records"], stats["used_bytes"], stats["pending"], stats["owners"]) == (0, 0, 0, 0)
    return stats["free_bytes"] == stats["capacity_bytes"]


def pinned(store, i):
    return store._index.find(key(i), 0)[2]


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
        [sys.executable, "-c", IN_ANOTHER, type(store).__name__, store.directory, Path(__file__).parent],
        check=False,
        capture_output=True,
        text=True,
    )
    assert "is open in 64 processes, the most that it allows" in done.stderr
    holder.communicate()
    assert slab.locked_by_another(fd, (store._row + 1) % 64) is False


# --- Pins, eviction, room


def fill(store, first=100, size=100_000, count=12):
    for i in range(first, first + count):
        store.put([key(i)], [payload(i, size)])


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


# --- Death


def test_what_a_dead_process_reserved_rests_and_what_it_pinned_is_free(kind, store, monkeypatch):
    fill(store, first=0, count=2)
    victim = subprocess.Popen(
        [
            sys.executable,
            "-c",
            IN_ANOTHER + "store.reserve([key(50)], [300_000]); store.lend([key(0)], [100_000])\n"
            "print('held', flush=True); sys.stdin.read()",
            type(store).__name__,
            store.directory,
            Path(__file__).parent,
        ],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert victim.stdout.readline() == b"held\n"
    assert pinned(store, 0)
    store._look_for_dead()
    assert pinned(store, 0)
    victim.kill()
    victim.wait()
    store._look_for_dead()
    assert not pinned(store, 0)
    store.clear()
    store.put([key(60)], [payload(60)])
    assert store.stats()["free_bytes"] < MIB - 300_000  # it rests
    later = slab.boot_clock() + REST_S + 1
    monkeypatch.setattr(slab, "boot_clock", lambda: later)
    store.put([key(61)], [payload(61)])
    assert no_room_is_lost(store)


@pytest.mark.parametrize("url", ["shm", "file", "tiered"])
def test_a_process_that_ends_without_closing_ends_well(url, directory, tmp_path):
    places = {"shm": f"shm:///test-{uuid.uuid4().hex}?capacity=256MiB", "file": f"file://{directory}?capacity=16MiB"}
    places["tiered"] = f"tiered:{places['shm']},{places['file']}"
    code = """
import sys
from lmcache_mm.stores import open_store
store = open_store(sys.argv[1])
for i in range(20):
    store.put([i.to_bytes(36, "little")], [bytes(500_000)])
"""
    for _ in range(2):
        python(code, places[url])
    if url != "shm":
        store = FileStore.open(directory, None)
        assert store.stats()["processes"] == 1
        assert store.stats()["records"] > 0
    main(["clear", places["shm"].partition("?")[0]])


def test_two_threads_do_not_bury_a_row_that_a_new_process_took(store, monkeypatch):
    """The second one sees that the first is doing it."""
    calls = []
    dead = (store._row + 1) % 64

    class Index:
        def rows_taken(self):
            return 1 << store._row | 1 << dead

        def bury(self, rows, terms):
            calls.append(rows)
            store._look_for_dead()

    monkeypatch.setattr(store, "_index", Index())
    store._look_for_dead()
    assert calls == [1 << dead]


# --- Damage


def test_a_directory_that_holds_other_things_is_left_alone(kind, directory):
    directory.mkdir(mode=0o700)
    (directory / "index").mkdir()
    (directory / "index" / "precious").write_text("x")
    (directory / "checkpoint.pt").write_text("y")
    for refused in (lambda: kind.open(directory, MIB), lambda: slab.remove(directory)):
        with pytest.raises(ValueError, match=r"expected a directory of its own, .* also holds 'checkpoint.pt'"):
            refused()
    assert sorted(path.name for path in directory.rglob("*")) == ["checkpoint.pt", "index", "precious"]


def test_one_store_under_two_names_is_refused_and_the_first_lives_on(kind, directory, tmp_path):
    store = kind.open(directory, MIB)
    store.put([key(1)], [payload(1)])
    other = tmp_path / "other"
    directory.rename(other)
    with pytest.raises(ValueError, match="is open in this process under another name"):
        kind.open(other, MIB)
    assert slab.remove(other) is False
    assert slab.locked_by_another(store._lock_fd, store._row) is False
    assert python(IN_ANOTHER + "print(store.stats()['processes'])", kind.__name__, other, Path(__file__).parent) == "2"
    other.rename(directory)
    assert get(store, 1) == payload(1)


def test_an_open_that_fails_late_leaves_nothing_open(kind, directory, monkeypatch):
    def fail(self):
        raise OSError("no")

    with monkeypatch.context() as patch:
        patch.setattr(kind, "_open_slab", fail)
        with pytest.raises(OSError, match="no"):
            kind.open(directory, MIB)
    assert in_another_process(kind.open(directory, MIB), "print(store.stats()['processes'])") == "2"


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


def overwrite(path, offset, content):
    with open(path, "r+b") as file:
        file.seek(offset)
        file.write(content)


def test_a_flipped_bit_is_a_miss_and_counted(store):
    store.put([key(1), key(2)], [payload(1, 50_000), payload(2, 50_000)])
    at = store._index.find(key(1), 0)[0] * store._granule_bytes + 49_999
    overwrite(store.directory / "slab", at, bytes([payload(1, 50_000)[-1] ^ 4]))
    assert get(store, 1, 50_000) is None
    assert get(store, 2, 50_000) == payload(2, 50_000)
    stats = store.stats()
    assert (stats["corrupt"], stats["hits"], stats["records"]) == (1, 1, 1)
    assert no_room_is_lost(store)


@pytest.fixture
def restart_the_machine(monkeypatch):
    """Changes the boot id that the store sees."""

    def restart():
        boot = os.urandom(16)
        monkeypatch.setattr(slab, "boot_id", lambda: boot)

    return restart


def test_a_restart_of_the_machine_keeps_records_and_ends_what_was_under_way(directory, restart_the_machine):
    store = FileStore.open(directory, MIB, ttl_s=100)
    fill(store, first=0, count=5)
    store.reserve([key(50)], [100_000])
    table = (directory / "table").read_bytes()  # as after a power cut
    lent = store.lend([key(1)], [100_000])
    fill(store, first=10, count=8)
    overwritten = [not there for there in store.contains([key(i) for i in range(5)])]
    assert any(overwritten)
    store.release([slot for slot in lent if slot])
    store.close()
    (directory / "table").write_bytes(table)
    restart_the_machine()
    store = FileStore.open(directory, MIB, ttl_s=100)
    assert store.stats()["pending"] == 0
    assert store.contains([key(i) for i in range(5)]) == [True] * 5
    for i in range(5):
        assert get(store, i, 100_000) == (None if overwritten[i] else payload(i, 100_000))
    assert store.contains([key(i) for i in range(10, 18)]) == [False] * 8
    assert store.stats()["corrupt"] == sum(overwritten)
    assert no_room_is_lost(store)


def test_what_was_forgotten_or_cleared_is_on_the_disk_before_that_is_said(directory, monkeypatch):
    store = FileStore.open(directory, MIB)
    synced = []

    class Table:
        def flush(self):
            synced.append(store._index.sizes()["records"])

    class Full:
        def flush(self):
            raise OSError(5, "Input/output error")

    for call, records in ((lambda: store.forget(OWNER), 1), (store.clear, 0)):
        store.put([key(1)], [payload(1)], owner=OWNER)
        store.put([key(2)], [payload(2)])
        monkeypatch.setattr(store, "_table", Table())
        call()
        assert synced.pop() == records
        monkeypatch.setattr(store, "_table", Full())
        with pytest.raises(RuntimeError, match=r"(forget|clear): the index in .* cannot be written: .*Input/output"):
            call()
    monkeypatch.undo()


def test_records_age_over_a_restart(directory, monkeypatch, restart_the_machine):
    now = slab.boot_clock()
    wall = time.time()
    monkeypatch.setattr(slab, "boot_clock", lambda: now)
    monkeypatch.setattr(time, "time", lambda: wall)
    for elapsed, age in ((50, 60), (150, None), (-1000, 10)):
        store = FileStore.open(directory, MIB, ttl_s=100)
        store.clear()
        store.put([key(1)], [payload(1)])
        now += 10
        store.put([key(2)], [payload(2)])
        store.close()
        restart_the_machine()
        now = 5.0  # the new boot's clock
        wall += elapsed
        store = FileStore.open(directory, MIB, ttl_s=100)
        assert store.contains([key(1)]) == [age is not None]
        if age:
            assert store.ages([key(1)]) == pytest.approx([age], abs=1e-3)  # unchanged, whichever clock went back
        store.close()


def test_shared_memory_does_not_outlive_a_restart(directory, restart_the_machine):
    store = ShmStore.open(directory, MIB)
    fill(store)
    store.close()
    restart_the_machine()
    store = ShmStore.open(directory, MIB)
    assert store.stats()["records"] == 0
    assert no_room_is_lost(store)


def version_3(table):
    """Writes a later version's header: every version promises this check of the first 64 bytes."""
    words = bytearray(table.read_bytes()[:64])
    words[8] = 3
    check = 0x6C6D636D6D203200
    for word in struct.unpack("<8Q", words):
        check = (check ^ word) * 0x9E3779B97F4A7C15 % 2**64
        check ^= check >> 29
    overwrite(table, 0, bytes(words) + struct.pack("<Q", check))


@pytest.mark.parametrize(
    "damage, error, text",
    [
        (lambda d: os.truncate(d / "slab", MIB - 1), ValueError, "slab.* has changed its size"),
        (lambda d: (d / "index").mkdir(), ValueError, "has version 1, expected 2; remove it"),
        (lambda d: version_3(d / "table"), ValueError, "has version 3, expected 2; remove it"),
        (lambda d: os.chmod(d, 0o755), PermissionError, "expected a directory of user .* with mode 0700"),
        (lambda d: os.chmod(d / "slab", 0o644), PermissionError, "expected a file of this user with mode 0600"),
        (lambda d: os.chmod(d / "lock", 0o644), PermissionError, "expected a file of this user with mode 0600"),
        (lambda d: (d / "slab").symlink_to((d / "slab").rename(d.parent / "x")), OSError, "symbolic link"),
    ],
    ids=["slab", "version 1", "version 3", "directory mode", "slab mode", "lock mode", "link"],
)
def test_what_is_damaged_or_not_the_users_alone_is_refused_with_a_reason(kind, directory, damage, error, text):
    kind.open(directory, MIB).close()
    damage(directory)
    with pytest.raises(error, match=text):
        kind.open(directory, MIB)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
@pytest.mark.parametrize("name", [".", "table", "slab", "lock"])
def test_another_users_files_are_refused(kind, directory, name):
    kind.open(directory, MIB).close()
    os.chown(directory / name, 4242, 4242)
    with pytest.raises(PermissionError, match=r"expected a (file|directory) of"):
        kind.open(directory, MIB)


def test_a_store_whose_making_was_cut_short_is_made_anew(kind, directory, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", interrupted)
        with pytest.raises(KeyboardInterrupt):
            kind.open(directory, MIB)
    with pytest.raises(ValueError, match=r"there is no store in .* yet; add .capacity=8GiB"):
        kind.open(directory, None)
    store = kind.open(directory, MIB)
    fill(store)
    assert no_room_is_lost(store)


def test_a_store_is_removed_only_when_nobody_has_it_open(kind, directory):
    store = kind.open(directory, MIB)
    assert slab.remove(directory) is False
    store.close()
    assert slab.remove(directory) is True
    assert not directory.exists()
    kind.open(directory, 2 * MIB)


def test_whoever_waited_for_a_store_that_is_removed_makes_it_anew(kind, directory):
    kind.open(directory, MIB).close()
    with slab.opening(directory):
        late = subprocess.Popen(
            [sys.executable, "-c", LATE, kind.__name__, directory], stdout=subprocess.PIPE, stdin=subprocess.PIPE
        )
        assert late.stdout.readline() == b"opening\n"
        time.sleep(0.3)
        slab.remove_files(directory)
        (directory / "lock").unlink()
        directory.rmdir()
    assert late.stdout.readline() == b"open\n"
    assert kind.open(directory, MIB).stats()["processes"] == 2
    late.communicate()


@pytest.fixture
def small_tmpfs(tmp_path):
    """A tmpfs of 3 MiB."""
    folder = tmp_path / "tmpfs"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", folder], check=False, capture_output=True
    )
    if mounted.returncode:
        pytest.skip("a tmpfs cannot be mounted here")
    yield folder
    for store in list(slab._open.values()):
        while store._opened:
            store.close()
    gc.collect()
    subprocess.run(["umount", "-l", folder], check=True)


def test_full_shared_memory_is_an_error_when_a_store_is_made_and_no_signal_later(small_tmpfs):
    with pytest.raises(OSError, match="no room for 8388608 bytes"):
        ShmStore.open(small_tmpfs / "large", 8 * MIB)
    store = ShmStore.open(small_tmpfs / "store", 2 * MIB)
    with open(small_tmpfs / "rest", "wb", buffering=0) as rest, contextlib.suppress(OSError):
        while True:
            rest.write(bytes(4096))
    for i in range(3000):
        store.put([key(i)], [payload(i, 50)])
    assert get(store, 2999, 50) == payload(2999, 50)
    store.clear()
    store.put([key(1)], [payload(1, 1_900_000)])
    assert get(store, 1, 1_900_000) == payload(1, 1_900_000)
    stats = store.stats()
    assert (stats["errors"], stats["dropped_puts"]) == (0, 0)


@pytest.mark.parametrize("spare", [0, 12 << 10, 256 << 10])
def test_no_room_for_the_index_is_an_error_and_no_signal(small_tmpfs, spare):
    capacity = (3 << 20) - spare
    with pytest.raises(OSError, match=f"no room for {capacity} bytes"):
        ShmStore.open(small_tmpfs / "store", capacity)
    store = ShmStore.open(small_tmpfs / "store", 2 * MIB)
    store.close()
    os.truncate(small_tmpfs / "store" / "table", 4096)  # then what is left of it is reused
    with open(small_tmpfs / "rest", "wb", buffering=0) as rest, contextlib.suppress(OSError):
        while True:
            rest.write(bytes(4096))
    with pytest.raises(OSError, match="no room for 2097152 bytes"):
        ShmStore.open(small_tmpfs / "store", 2 * MIB)


def test_a_file_system_without_o_direct_is_used_and_said_so_once(directory, monkeypatch):
    opened = os.open

    def refuse(path, flags, *rest, **more):
        if flags & os.O_DIRECT:
            raise OSError(22, "Invalid argument")
        return opened(path, flags, *rest, **more)

    monkeypatch.setattr(os, "open", refuse)
    with pytest.warns(UserWarning, match="no O_DIRECT on this file system") as caught:
        store = FileStore.open(directory, MIB)
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        store.put([key(1)], [payload(1, 70_001)])
        assert get(store, 1, 70_001) == payload(1, 70_001)


@pytest.mark.parametrize("name", ["preadv", "pwritev"])
def test_failing_disks_are_misses_and_dropped_puts(name, directory, monkeypatch):
    store = FileStore.open(directory, MIB)
    store.put([key(1)], [payload(1)])

    def fail(*_):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, name, fail)
    assert get(store, 1) == (None if name == "preadv" else payload(1))
    store.put([key(2)], [payload(2)])
    monkeypatch.undo()
    assert get(store, 1) == payload(1)
    assert get(store, 2) == (None if name == "pwritev" else payload(2))
    assert store.stats()["errors"] == 1
    assert no_room_is_lost(store)


# --- Processes that stop, and damage


@pytest.fixture(scope="session")
def simulation(tmp_path_factory):
    """Builds tests/slab_simulation.cpp on request: with another slab_index.cpp, or other flags."""
    if shutil.which(CXX) is None:
        pytest.skip(f"no {CXX}")
    folder = tmp_path_factory.mktemp("simulation")

    def build(index=REPO / "csrc" / "slab_index.cpp", *flags):
        objects = []
        for source in (REPO / "tests" / "slab_simulation.cpp", index):
            name = "".join(c if c.isalnum() else "_" for c in f"{source}{flags}")
            objects.append(folder / f"{name}.o")
            if not objects[-1].exists():
                command = [CXX, "-std=c++17", "-O1", "-DLMC_SLAB_HOOK", f"-I{REPO / 'csrc'}", *flags]
                must_run([*command, "-c", source, "-o", objects[-1]])
        program = objects[-1].with_suffix("")
        if not program.exists():
            must_run([CXX, *flags, *objects, "-o", program])
        return program

    return build


STEPS = 300  # of a simulated run


@pytest.mark.parametrize(
    "arguments",
    [
        *(("points", "stop"), ("points", "kill"), ("forgets", 2_000_000)),
        *(("kills", 1, 20, 20_000), ("kills", 1, 1000, STEPS), ("cuts", 1, 1000, STEPS)),
    ],
    ids=lambda arguments: " ".join(map(str, arguments)),
)
def test_clients_stopped_and_killed_at_any_store_leave_the_index_whole(simulation, arguments):
    must_run([simulation(), *arguments])


def test_damage_of_any_bytes_beneath_clients_is_no_crash_and_no_wrong_payload(simulation):
    flags = ["-g", "-fsanitize=undefined", "-fno-sanitize-recover=all"]  # the file also lies between inaccessible pages
    done = run([simulation(REPO / "csrc" / "slab_index.cpp", *flags), "damage", 1, 500, STEPS])
    assert done.returncode == 0, done.stdout


MUTATIONS = {
    "no mark": ("  put(header_->dirty, u64{1});\n  if (opened_", "  if (opened_"),
    "what is pinned is free": ("  if (table_.pinned(start)) {\n    rest(", "  if (false) {\n    rest("),
    "no end for readers": (
        "  if (table_.generation(start) == content.generation) table_.retire(start);\n  hash",
        "  hash",
    ),
    "two records of a key": ("current(put.key) || forgotten_since", "forgotten_since"),
    "forgotten owners": ("current(put.key) || forgotten_since(content.owner, put.as_of)", "current(put.key)"),
    "nothing moves up": ("if (stays) continue;", "continue;"),
    "no neighbours": ("if (start % segment) {", "if (false) {"),
    "nothing of an entry that is overwritten": ("put(header_->old_place, u64{start} + 1);", ""),
    "a sequence that begins again": (
        "  set(kSequence, sequence);  //",
        "  set(kSequence, 0);\n  set(kSequence, sequence);  //",
    ),
    "one header": ("{&header_->spare, &header_->fixed}", "{&header_->fixed}"),
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_the_simulation_finds_what_is_taken_away(simulation, name, tmp_path):
    original, replacement = MUTATIONS[name]
    source = (REPO / "csrc" / "slab_index.cpp").read_text()
    assert source.count(original) == 1
    (tmp_path / "slab_index.cpp").write_text(source.replace(original, replacement))
    program = simulation(tmp_path / "slab_index.cpp")
    modes = [("points", "kill"), ("kills", 1, 1000, STEPS), ("cuts", 1, 1000, STEPS)]
    assert any(run([program, *mode]).returncode for mode in modes)


class Other:
    """Another process, which stops or kills itself at its n-th store to shared memory."""

    def __init__(self, program, store, number, stores):
        files = [store.directory / "table", store.directory / "lock"]
        command = [program, "process", *files, store._granules, number.value, stores]
        self.process = subprocess.Popen([str(word) for word in command], stdout=subprocess.PIPE, text=True)

    def wait(self):
        """Waits until it has stopped or ended."""
        os.waitid(os.P_PID, self.process.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)


def test_nobody_waits_for_a_process_that_is_stopped_in_a_change(kind, store, simulation, monkeypatch):
    monkeypatch.setattr(slab, "CHANGE_WAIT_S", 0.3)
    fill(store, first=0, count=3)
    other = Other(simulation(), store, signal.SIGSTOP, 30)
    other.wait()
    began = time.monotonic()
    for i in range(50):
        store.put([key(100 + i)], [payload(1)])
    assert time.monotonic() - began < 25 * slab.PUT_WAIT_S  # only one call has waited
    assert store.stats()["dropped_puts"] == 50
    assert get(store, 1, 100_000) == payload(1, 100_000)
    assert store.contains([key(0), key(100)]) == [True, False]
    who = f"cannot be changed: process {other.process.pid} has been changing the index for .* s; is it stopped?"
    for call in (lambda: store.forget(OWNER), lambda: store.delete([key(1)]), store.clear):
        began = time.monotonic()
        with pytest.raises(RuntimeError, match=who):
            call()
        assert time.monotonic() - began < 4
    child = os.fork()  # also after a fork and an open in the child
    if child == 0:
        try:
            kind.open(store.directory, None)
        except TimeoutError as error:
            os._exit(0 if str(other.process.pid) in str(error) else 2)
        os._exit(1)
    assert os.waitpid(child, 0)[1] == 0
    other.process.send_signal(signal.SIGCONT)
    assert other.process.wait(10) == 0
    store.put([key(100)], [payload(1)])
    assert get(store, 100) == payload(1)
    assert no_room_is_lost(store)


def test_nobody_waits_for_ever_for_a_process_that_is_stopped_while_it_opens(kind, directory, monkeypatch):
    monkeypatch.setattr(slab_files, "OPEN_WAIT_S", 0.3)
    kind.open(directory, MIB).close()
    child = os.fork()
    if child == 0:
        with slab.opening(directory):
            os.kill(os.getpid(), signal.SIGSTOP)
        os._exit(0)
    os.waitid(os.P_PID, child, os.WSTOPPED | os.WNOWAIT)
    with pytest.raises(TimeoutError, match=f"process {child} has been opening .* for more than 0.3 s; is it stopped?"):
        kind.open(directory, MIB)
    os.kill(child, signal.SIGCONT)
    os.waitpid(child, 0)
    kind.open(directory, MIB)


def test_a_writer_killed_at_any_store_leaves_a_store_that_works(store, simulation, monkeypatch):
    fill(store, first=0, count=3)
    now = slab.boot_clock()
    monkeypatch.setattr(slab, "boot_clock", lambda: now)
    for stores in range(1, 150, 7):
        other = Other(simulation(), store, signal.SIGKILL, stores)
        other.process.wait()
        assert get(store, 1, 100_000) == payload(1, 100_000)
        store._looked_for_dead = 0
        store.put([key(1000 + stores)], [payload(stores)])
        assert get(store, 1000 + stores) == payload(stores)
        assert store._index.check(store._terms(1)) == ""
        now += REST_S + 1
    store._looked_for_dead = 0
    store.put([key(1)], [payload(1)])
    store.put([key(2)], [payload(1)])
    assert no_room_is_lost(store)


def test_a_stopped_reader_is_in_nobodys_way(kind, store):
    store.put([key(1)], [payload(1)])
    reader = os.fork()
    if reader == 0:
        theirs = kind.open(store.directory, None)
        theirs.lend([key(1)], [100])
        os.kill(os.getpid(), signal.SIGSTOP)
        os._exit(0)
    os.waitid(os.P_PID, reader, os.WSTOPPED | os.WNOWAIT)
    for i in range(1000):
        slots = [slot for slot in store.reserve([key(100 * i + k + 10) for k in range(50)], [50] * 50) if slot]
        store.publish(slots, [0] * len(slots))
        store.delete([slot.key for slot in slots[:25]])
    stats = store.stats()
    assert (stats["errors"], stats["dropped_puts"], stats["puts"]) == (0, 0, 50_001)
    assert get(store, 1) == payload(1)
    os.kill(reader, signal.SIGKILL)
    os.waitpid(reader, 0)
    store._look_for_dead()
    assert no_room_is_lost(store)


def damages():
    """(name, function that changes the bytes of a table)"""
    rng = random.Random(7)

    def anything(content):
        content[:] = rng.randbytes(len(content))

    def nothing(content):
        content[:] = bytes(len(content))

    def header(content):
        content[:4096] = rng.randbytes(4096)

    def bits(content):
        for _ in range(200):
            content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)

    def pages(content):
        whole = len(content) // 4096
        order = rng.sample(range(whole), whole)
        content[: whole * 4096] = b"".join(bytes(content[p * 4096 : p * 4096 + 4096]) for p in order)

    return [anything, nothing, header, bits, pages]


@pytest.mark.parametrize("opened", [True, False], ids=["open", "closed"])
@pytest.mark.parametrize("damage", damages(), ids=lambda damage: damage.__name__)
def test_whatever_bytes_the_index_has_the_store_goes_on_and_serves_nothing_wrong(kind, directory, damage, opened):
    """In a child, to detect a crash, and while another process has it open."""
    payloads = [bytes([i + 1]) * 30_000 for i in range(60)]

    def serves(store):
        good = 0
        for i in range(60):
            buffer = bytearray(30_000)
            if store.get_into([key(i)], [buffer]) == [True]:
                assert buffer == payloads[i]
                good += 1
        return good

    child = os.fork()
    if child == 0:
        store = kind.open(directory, 2 * MIB)
        release, held = os.pipe(), os.pipe()
        beside = os.fork()
        if beside == 0:
            theirs = kind.open(directory, None)
            for _ in range(20):
                os.write(held[1], b".")
                os.read(release[0], 1)
                serves(theirs)
                theirs.put([key(59)], payloads[59:])
            os._exit(0)
        for _ in range(20):
            os.read(held[0], 1)
            if not opened:
                store.close()
            with open(directory / "table", "r+b") as file:
                content = bytearray(file.read())
                damage(content)
                file.seek(0)
                file.write(content)
            if not opened:
                store = kind.open(directory, None)
            os.write(release[1], b".")
            serves(store)
            store.put([key(i) for i in range(60)], payloads)
            assert serves(store) >= 15
        assert os.waitpid(beside, 0)[1] == 0
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0


def test_any_first_page_is_a_header_or_none_and_its_second_copy_is_as_good(store):
    page = (store.directory / "table").read_bytes()[:4096]
    header = slab._C.slab_header(page)
    assert header[1:3] == (store._granules, store._granule_bytes)
    assert slab._C.slab_header(bytes(72) + page[72:]) == header
    assert slab._C.slab_header(page[:72]) == header

    @given(st.binary(max_size=600), st.lists(st.tuples(st.integers(0, 600), st.integers(0, 255)), max_size=3))
    def run(junk, changes):
        slab._C.slab_header(junk)
        changed = bytearray(page)
        for place, byte in changes:
            changed[place] = byte
        assert slab._C.slab_header(bytes(changed)) in (header, None)

    run()


@pytest.mark.parametrize("size", [0, 100, 4096, 50_000, 10**7])
def test_an_index_of_another_length_is_made_as_long_as_it_has_to_be(kind, directory, size):
    store = kind.open(directory, MIB)
    fill(store, first=0, count=3)
    store.close()
    os.truncate(directory / "table", size)
    store = kind.open(directory, MIB)
    fill(store)
    assert get(store, 111, 100_000) == payload(111, 100_000)
    assert no_room_is_lost(store)


def test_files_cut_short_while_they_are_open_are_no_crash(kind, directory):
    child = os.fork()
    if child == 0:
        store = kind.open(directory, MIB)
        fill(store, first=0, count=9)
        os.truncate(directory / "table", 4096)
        if kind is ShmStore:
            os.truncate(directory / "slab", 0)
        for i in range(12):
            assert get(store, i, 100_000) is None
        store.put([key(50)], [payload(1)])
        assert store.contains([key(50)]) == [False]
        assert store.stats()["dropped_puts"] == 1
        with pytest.raises(RuntimeError, match="a part of its file is lost: close the store and open it again"):
            store.forget(OWNER)
        store.close()
        os.truncate(directory / "slab", MIB)
        store = kind.open(directory, MIB)
        fill(store)
        assert get(store, 111, 100_000) == payload(111, 100_000)
        assert no_room_is_lost(store)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0


def test_a_table_that_is_gone_is_made_anew_unless_others_have_it(kind, directory):
    store = kind.open(directory, MIB)
    (directory / "table").unlink()
    child = os.fork()
    if child == 0:
        with contextlib.suppress(RuntimeError):
            kind.open(directory, None)
            os._exit(1)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    store.close()
    store = kind.open(directory, MIB)
    fill(store)
    assert no_room_is_lost(store)


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


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give directories away")
def test_a_directory_that_another_user_made_first_keeps_nobody_out(tmp_path, monkeypatch):
    monkeypatch.setattr(slab_files, "SHM", str(tmp_path))
    first = tmp_path / f"lmcache_mm-{os.geteuid()}"
    first.mkdir()
    os.chown(first, 4242, 4242)
    second = slab_files.shm_directory("x")
    assert second.parent == tmp_path / f"lmcache_mm-{os.geteuid()}.1"
    first.rmdir()
    assert slab_files.shm_directory("x") == second
    monkeypatch.setattr(slab_files, "MOST_DIRECTORIES", 2)
    for path in (first, second.parent):
        path.mkdir(exist_ok=True)
        os.chown(path, 4242, 4242)
    with pytest.raises(PermissionError, match="it belongs to user 4242"):
        slab_files.shm_directory("x")


# --- The shared atomics


@pytest.mark.skipif(shutil.which(CXX) is None, reason=f"no {CXX}")
@pytest.mark.parametrize(
    "original, replacement",
    [
        ("", ""),
        ("if (state.pins.load() == 0) return true;", "return true;"),
        ("if (count == 0) slots_[slot].pins.fetch_or(bit_);", ""),
        ("if (slots_[slot].generation.load() == generation) {", "{"),
        ("--found->second == 0", "true"),
    ],
    ids=["as it is", "evict without a second look", "pin without a bit", "pin whatever is there", "unpin for others"],
)
def test_pins_and_evictions_that_meet_are_free_of_races(original, replacement, tmp_path):
    source = (REPO / "csrc" / "slab_table.h").read_text()
    assert original in source
    (tmp_path / "slab_table.h").write_text(source.replace(original, replacement, 1) if original else source)
    program = tmp_path / "driver"
    flags = ["-std=c++17", "-O1", "-g", "-fsanitize=thread", f"-I{tmp_path}"]
    must_run([CXX, *flags, REPO / "tests" / "slab_table_driver.cpp", "-o", program])
    runs = [run([program]) for _ in range(1 if not original else 5)]
    failed = [done.returncode != 0 for done in runs]
    assert any(failed) == bool(original), "\n".join(done.stdout for done in runs)


@settings(deadline=None)
@given(st.one_of(st.integers(0, 20 << 20), st.integers(-2, 2).map(lambda by: (8 << 20) + by)))
def test_pieces_on_a_disk_are_equal_but_for_a_page(size):
    piece = file._piece_bytes(size)
    assert piece % file.PAGE_BYTES == 0
    assert piece <= file.PIECE_BYTES
    pieces = max(1, -(-size // piece))
    assert pieces == max(1, -(-size // file.PIECE_BYTES))
    assert pieces * piece - size < (pieces + 1) * file.PAGE_BYTES
