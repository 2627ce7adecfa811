"""shm: and file: stores after damage, a restart of the machine, and on disks that fail."""

import contextlib
import os
import random
import time
import warnings

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmcache_mm.stores.local import file, slab
from lmcache_mm.stores.local.file import FileStore
from lmcache_mm.stores.local.shm import ShmStore
from slabs import MIB, fill, no_room_is_lost, overwrite
from test_stores import OWNER, get, key, payload


def test_a_flipped_bit_is_a_miss_and_counted(store):
    store.put([key(1), key(2)], [payload(1, 50_000), payload(2, 50_000)])
    at = store._index.find(key(1), 0)[0] * store._granule_bytes + 49_999
    overwrite(store.directory / "slab", at, bytes([payload(1, 50_000)[-1] ^ 4]))
    assert get(store, 1, 50_000) is None
    assert get(store, 2, 50_000) == payload(2, 50_000)
    stats = store.stats()
    assert (stats["corrupt"], stats["hits"], stats["records"]) == (1, 1, 1)
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


def assert_takes_records(store):
    fill(store)
    assert get(store, 111, 100_000) == payload(111, 100_000)
    assert no_room_is_lost(store)


@pytest.mark.parametrize("size", [0, 100, 4096, 50_000, 10**7])
def test_an_index_of_another_length_is_made_as_long_as_it_has_to_be(kind, directory, size):
    store = kind.open(directory, MIB)
    fill(store, first=0, count=3)
    store.close()
    os.truncate(directory / "table", size)
    store = kind.open(directory, MIB)
    assert_takes_records(store)


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
        assert_takes_records(store)
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


# --- Restarts


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


# --- Disks


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


@settings(deadline=None)
@given(st.one_of(st.integers(0, 20 << 20), st.integers(-2, 2).map(lambda by: (8 << 20) + by)))
def test_pieces_on_a_disk_are_equal_but_for_a_page(size):
    piece = file._piece_bytes(size)
    assert piece % file.PAGE_BYTES == 0
    assert piece <= file.PIECE_BYTES
    pieces = max(1, -(-size // piece))
    assert pieces == max(1, -(-size // file.PIECE_BYTES))
    assert pieces * piece - size < (pieces + 1) * file.PAGE_BYTES
