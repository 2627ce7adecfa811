"""tiered: stores: writes to slower tiers, promotion to faster ones, a tier that is down."""

from __future__ import annotations

import contextlib
import math
import os
import subprocess
import sys
import threading
import time
import uuid

import numpy as np
import pytest

from lmcache_mm import lane
from lmcache_mm.stores import SlotStore, open_store, slab_directory, tiered, write_behind
from lmcache_mm.stores.local import slab
from lmcache_mm.stores.local.mem import MemStore
from lmcache_mm.stores.tiered import TieredStore
from test_stores import OWNER, get, key, new_store, payload


class Gate(MemStore):
    """A store whose puts wait while the gate is shut, and that fails while it is broken."""

    def __init__(self, capacity=1 << 20):
        super().__init__(capacity)
        self.open = threading.Event()
        self.open.set()
        self.reached = threading.Event()
        self.broken = False

    def _look(self):
        if self.broken:
            raise ConnectionError("down")

    def contains(self, *arguments):
        self._look()
        return super().contains(*arguments)

    def get_into(self, *arguments):
        self._look()
        return super().get_into(*arguments)

    def put(self, *arguments):
        self.reached.set()
        self.open.wait(10)
        self._look()
        super().put(*arguments)

    def forget(self, owner):
        self._look()
        return super().forget(owner)


@pytest.fixture
def tiers():
    return [Gate(), Gate(4 << 20)]


@pytest.fixture
def store(tiers):
    store = TieredStore(tiers)
    yield store
    for tier in tiers:
        tier.open.set()
    store.close()


def test_a_put_returns_before_the_lower_tier_has_it(store, tiers):
    tiers[1].open.clear()
    store.put([key(1), key(2)], [payload(1), payload(2)])
    assert get(store, 1) == payload(1)
    assert store.stats()["tier1.records"] == 0
    tiers[1].open.set()
    store.flush()
    assert tiers[1].contains([key(1), key(2)]) == [True, True]
    assert get(tiers[1], 2) == payload(2)


def test_a_hit_below_is_promoted_with_its_owner(store, tiers):
    tiers[1].put([key(1)], [payload(1)])
    buffer = bytearray(100)
    assert store.contains([key(1)]) == [True]
    assert store.get_into([key(1)], [buffer], OWNER) == [True]
    assert buffer == payload(1)
    assert get(tiers[0], 1) == payload(1)
    assert store.stats()["promoted"] == 1
    assert tiers[0].forget(OWNER) == 1


def test_what_the_first_tier_evicted_is_found_below(store, tiers):
    for i in range(25):
        store.put([key(i)], [payload(i, 100_000)])
        store.flush()
    assert not all(tiers[0].contains([key(i) for i in range(25)]))
    for i in range(25):
        assert get(store, i, 100_000) == payload(i, 100_000)


def test_what_is_too_large_for_the_first_tier_goes_below(store, tiers):
    store.put([key(1)], [payload(1, 2 << 20)])
    store.flush()
    assert store.contains([key(1)]) == [True]
    assert get(store, 1, 2 << 20) == payload(1, 2 << 20)


def test_the_room_of_tiers_is_not_known_if_that_of_one_is_not(store, tiers, monkeypatch):
    assert store.stats()["capacity_bytes"] == 5 << 20
    monkeypatch.setattr(tiers[1], "stats", dict)  # as a server's
    assert "capacity_bytes" not in store.stats()


@pytest.mark.parametrize("down", [0, 1])
def test_a_tier_that_fails_is_left_alone_and_the_other_goes_on(store, tiers, down, monkeypatch, caplog):
    store.put([key(1)], [payload(1)])
    store.flush()
    tiers[down].broken = True
    assert get(store, 1) == payload(1) or down == 1
    store.put([key(2)], [payload(2)])
    store.flush()
    assert get(store, 2) == payload(2)
    assert get(store, 1) == payload(1)
    assert 1 <= store.stats()["errors"] <= 2
    assert len([r for r in caplog.records if "is left alone for 10 s" in r.message]) == store.stats()["errors"]
    tiers[down].broken = False
    now = tiered.time.monotonic()
    monkeypatch.setattr(tiered.time, "monotonic", lambda: now + 11)
    store.put([key(3)], [payload(3)])
    store.flush()
    assert get(tiers[0], 3) == get(tiers[1], 3) == payload(3)


def test_what_waits_is_bounded_and_what_is_dropped_is_counted(store, tiers, monkeypatch):
    monkeypatch.setattr(write_behind, "MOST_WAITING", 4)
    tiers[1].open.clear()
    store.put([key(0)], [payload(0)])
    assert tiers[1].reached.wait(10)
    for i in range(1, 10):
        store.put([key(i)], [payload(i)])
    stats = store.stats()
    assert (stats["waiting"], stats["dropped_puts"]) == (4, 5)
    tiers[1].open.set()
    store.flush()
    assert tiers[1].stats()["records"] == 5


def test_copies_that_wait_are_bounded(store, tiers, monkeypatch):
    monkeypatch.setattr(write_behind, "MOST_COPIED_BYTES", 5 << 20)
    tiers[1].open.clear()
    for i in range(4):
        store.put([key(i)], [payload(i, 2 << 20)])  # too large for the first tier
    assert store.stats()["dropped_puts"] == 2
    tiers[1].open.set()
    store.flush()
    store.put([key(5)], [payload(5, 2 << 20)])
    store.flush()
    assert store.contains([key(0), key(1), key(5)]) == [False, True, True]


def test_what_is_forgotten_or_deleted_does_not_come_back(store, tiers):
    tiers[1].open.clear()
    store.put([key(1), key(2)], [payload(1), payload(2)], OWNER)
    store.put([key(3)], [payload(3)], OWNER)
    store.put([key(4)], [payload(4)])
    threading.Timer(0.2, tiers[1].open.set).start()
    assert store.forget(OWNER) == 3
    store.delete([key(4)])
    store.flush()
    assert not any(store.contains([key(i) for i in range(1, 5)]))


def test_forget_says_so_when_a_tier_could_not_be_asked(store, tiers):
    store.put([key(1)], [payload(1)], OWNER)
    store.flush()
    tiers[1].broken = True
    with pytest.raises(RuntimeError, match="forget: not everything could be removed: tier 1: down"):
        store.forget(OWNER)
    assert tiers[0].contains([key(1)]) == [False]


def test_what_is_promoted_while_it_is_forgotten_does_not_come_back(store, tiers, monkeypatch):
    tiers[1].put([key(1)], [payload(1)], OWNER)
    read = tiers[1].get_into

    def read_and_forget(*arguments):
        found = read(*arguments)
        store.forget(OWNER)
        return found

    monkeypatch.setattr(tiers[1], "get_into", read_and_forget)
    assert store.get_into([key(1)], [bytearray(100)], OWNER) == [True]
    assert store.contains([key(1)]) == [False]


def test_slots_promoted_while_they_are_forgotten_do_not_come_back(tmp_path, monkeypatch):
    store, remove = new_store("shm,file", tmp_path)
    file = store._tiers[1]
    file.put([key(1)], [payload(1)], OWNER)
    read = file.get_into

    def read_and_forget(*arguments):
        found = read(*arguments)
        store.forget(OWNER)
        return found

    monkeypatch.setattr(file, "get_into", read_and_forget)
    assert store.lend([key(1)], [100], OWNER) == [None]
    assert store.contains([key(1)]) == [False]
    monkeypatch.undo()
    slots = store.reserve([key(2)], [100], OWNER)  # also for a put in progress when its owner is forgotten
    store.forget(OWNER)
    store.publish(slots, [0])
    assert store.contains([key(2)]) == [False]
    assert store._tiers[0].stats()["free_bytes"] == 1 << 20
    remove()


def test_what_waits_is_not_written_down_when_another_process_forgot_it(tmp_path):
    store, remove = new_store("shm,file", tmp_path)
    file = store._tiers[1]
    moments = store._moments()
    file.forget(OWNER)  # by anybody
    store._behind.add([write_behind.Waiting(key(1), 100, OWNER, np.zeros(100, np.uint8), moments)])
    store.flush()
    assert file.contains([key(1)]) == [False]
    remove()


def test_a_promoted_record_keeps_its_age(tmp_path, monkeypatch):
    now = 1000.0
    monkeypatch.setattr(slab, "boot_clock", lambda: now)
    store, remove = new_store("shm,file", tmp_path, options="&ttl=60")
    shm, file = store._tiers
    for i, promote in (
        (1, lambda: store.get_into([key(1)], [bytearray(100)])),
        (2, lambda: store.lend([key(2)], [100])),
    ):
        file.put([key(i)], [payload(i)])
        now += 59
        promote()
        assert shm.contains([key(i)]) == [True]
        now += 2
        assert store.contains([key(i)]) == [False]
    remove()


def test_what_is_not_known_to_have_an_age_is_not_promoted(store, tiers, monkeypatch):
    for ages in ([math.nan, 5.0], [math.inf, 5.0]):
        tiers[0].delete([key(2)])
        tiers[1].put([key(1), key(2)], [payload(1), payload(2)])
        with monkeypatch.context() as patch:
            patch.setattr(tiers[1], "ages", lambda keys, ages=ages: ages)
            assert store.get_into([key(1), key(2)], [bytearray(100), bytearray(100)]) == [True, True]
        assert tiers[0].contains([key(1), key(2)]) == [False, True]
    assert store.stats()["promoted"] == 2

    def down(_):
        raise ConnectionError("down")

    monkeypatch.setattr(tiers[1], "ages", down)  # after it was read
    assert get(store, 1) == payload(1)
    assert tiers[0].contains([key(1)]) == [False]
    assert store.ages([key(1), key(9)]) == [math.inf, math.inf]


def test_slots_of_what_is_not_known_to_have_an_age_are_not_promoted(tmp_path, monkeypatch):
    store, remove = new_store("shm,file", tmp_path)
    store._tiers[1].put([key(1), key(2)], [payload(1), payload(2)])
    monkeypatch.setattr(store._tiers[1], "ages", lambda _: [math.inf, 5.0])
    one, other = store.lend([key(1), key(2)], [100, 100])
    assert one is None
    assert store.contains([key(1)]) == [True]
    assert store._tiers[0].contains([key(1), key(2)]) == [False, True]
    store.release([other])
    remove()


@pytest.mark.parametrize("kind", ["mem", "shm", "file", "shm,file"])
def test_what_is_not_there_has_no_age(kind, tmp_path):
    store, remove = new_store(kind, tmp_path)
    store.put([key(1)], [payload(1)], age_s=10)
    there, missing = store.ages([key(1), key(2)])
    assert 10 <= there < math.inf
    assert missing == math.inf
    remove()


def test_looking_after_tiers_does_not_count_as_being_asked_for(tmp_path):
    store, remove = new_store("shm,file", tmp_path)
    store.put([key(i) for i in range(5)], [payload(i) for i in range(5)])
    store.flush()
    shm = store._tiers[0]
    starts = [shm._index.find(key(i), 0)[0] for i in range(5)]
    assert not any(shm._index.take_visited(start) for start in starts)
    store.contains([key(3)])
    assert [shm._index.take_visited(start) for start in starts] == [False, False, False, True, False]
    remove()


def test_a_batch_that_fails_does_not_end_the_writing(store, tiers, monkeypatch):
    def out_of_memory(*_):
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(store._behind, "_write", out_of_memory)
        store.put([key(1)], [payload(1)])
        store.flush()
    assert store.stats()["dropped_puts"] == 1
    store.put([key(2)], [payload(2)])
    store.flush()
    assert tiers[1].contains([key(1), key(2)]) == [False, True]
    assert store.forget(OWNER) == 0


def test_a_tier_that_is_down_is_closed_too(tiers):
    store = TieredStore(tiers)
    tiers[1].broken = True
    store.contains([key(1)])
    closed = []
    tiers[1].close = lambda: closed.append(1)
    store.close()
    assert closed == [1]


def test_misuse_is_the_callers_and_takes_no_tier_down(store):
    with pytest.raises(ValueError, match="owner: expected 16 bytes or none, got 3"):
        store.put([key(1)], [payload(1)], b"abc")
    with pytest.raises(ValueError, match=r"buffers\[0\]: expected a writable one"):
        store.get_into([key(1)], [bytes(100)])
    assert store.stats()["errors"] == 0


def test_closing_writes_what_waits(tiers):
    store = TieredStore(tiers)
    tiers[1].open.clear()
    store.put([key(1)], [payload(1)])
    threading.Timer(0.2, tiers[1].open.set).start()
    seen = []
    tiers[1].close = lambda: seen.append(get(tiers[1], 1))
    store.close()
    assert seen == [payload(1)]
    for call in (store.contains, store.ages):
        with pytest.raises(RuntimeError, match="it is closed"):
            call([key(1)])


def test_slots_of_the_first_tier_are_lent_promoted_and_written_down(tmp_path):
    store, remove = new_store("shm,file", tmp_path)
    assert isinstance(store, SlotStore)
    shm, file = store._tiers
    slots = store.reserve([key(1), key(2)], [5000, 70_000], OWNER)
    for i, slot in enumerate(slots, start=1):
        store.view(slot)[:] = np.frombuffer(payload(i, slot.payload_bytes), np.uint8)
    store.publish(slots, [0, 0])  # wrong checksums: never written down
    store.flush()
    assert file.contains([key(1), key(2)]) == [False, False]
    store.delete([key(1), key(2)])
    store.put([key(1), key(2)], [payload(1, 5000), payload(2, 70_000)], OWNER)
    store.flush()
    assert file.contains([key(1), key(2)]) == [True, True]
    shm.delete([key(1)])
    lent = store.lend([key(1), key(9), key(2)], [5000, 5000, 70_000], OWNER)
    assert bytes(store.view(lent[0])) == payload(1, 5000)
    assert lent[1] is None
    assert bytes(store.view(lent[2])) == payload(2, 70_000)
    assert store.stats()["promoted"] == 1
    store.release([slot for slot in lent if slot])
    assert shm.forget(OWNER) == 2
    assert file.forget(OWNER) == 2
    assert shm.stats()["pending"] == file.stats()["pending"] == 0
    remove()


def test_a_list_of_urls_is_tiers_and_one_that_does_not_open_leaves_none_open(tmp_path):
    with pytest.raises(ValueError, match="there is no store in"):
        open_store([f"file://{tmp_path}/a?capacity=1MiB", f"file://{tmp_path}/b"])
    store = open_store([f"file://{tmp_path}/a?capacity=1MiB", "mem://?capacity=1MiB"])
    assert store.stats()["tier0.processes"] == 1
    store.close()


def test_tiers_are_not_carried_over_a_fork(store):
    child = os.fork()
    if child == 0:
        status = 0
        for call in (store.contains, store._tiers[0].contains):
            try:
                call([key(1)])
                status = 1
            except RuntimeError as error:
                status |= 2 * ("open it again after a fork" not in str(error))
        store.close()  # nothing, at once
        os._exit(status)
    assert os.waitpid(child, 0)[1] == 0


# --- Promises that others break


def promoting(store, tiers, meanwhile):
    """Makes a hit in the second tier, and calls `meanwhile` after reading it there and before putting it into the
    first."""
    tiers[1].put([key(1), key(2)], [payload(1), payload(2)])
    ages = tiers[1].ages

    def read_and_wait(keys):
        tiers[1].ages = ages
        meanwhile()
        return ages(keys)

    tiers[1].ages = read_and_wait
    return store.get_into([key(1), key(2)], [bytearray(100), bytearray(100)])


def test_what_is_deleted_while_it_is_promoted_does_not_come_back(store, tiers):
    assert promoting(store, tiers, lambda: store.delete([key(1), key(9)])) == [True, True]
    assert store.contains([key(1), key(2)]) == [False, True]
    assert tiers[0].contains([key(1), key(2)]) == [False, True]
    assert store.stats()["promoted"] == 1


def test_slots_deleted_while_they_are_promoted_do_not_come_back(tmp_path, monkeypatch):
    store, remove = new_store("shm,mem", tmp_path)
    low = store.tiers[1]
    low.put([key(1)], [payload(1)])
    get_into = low.get_into

    def read_and_delete(*arguments):
        found = get_into(*arguments)
        store.delete([key(1)])
        return found

    monkeypatch.setattr(low, "get_into", read_and_delete)
    assert store.lend([key(1)], [100]) == [None]
    assert store.contains([key(1)]) == [False]
    store.put([key(1)], [payload(1)])  # its place is free again
    assert get(store, 1) == payload(1)
    remove()


def test_a_promotion_that_begins_while_its_record_is_deleted_does_not_bring_it_back(store, tiers, monkeypatch):
    tiers[1].put([key(1)], [payload(1)])
    delete = tiers[0].delete

    def delete_and_ask(keys):  # the first tier has done its part, the second has not
        delete(keys)
        assert get(store, 1) == payload(1)

    monkeypatch.setattr(tiers[0], "delete", delete_and_ask)
    store.delete([key(1)])
    assert store.contains([key(1)]) == [False]


def test_gets_and_deletes_of_many_threads_leave_nothing_that_was_deleted_last(store, tiers):
    back = 0
    for _ in range(100):
        tiers[1].put([key(1)], [payload(1)])
        readers = [threading.Thread(target=get, args=(store, 1)) for _ in range(3)]
        for reader in readers:
            reader.start()
        store.delete([key(1)])
        for reader in readers:
            reader.join()
        back += store.contains([key(1)]) == [True]
    assert not back


def test_what_was_forgotten_after_the_moment_of_a_put_does_not_come_back_in_any_tier(store, tiers):
    moment = store.moment()
    assert store.moment() == moment
    tiers[1].forget(OWNER)  # as another process might
    assert store.moment() > moment
    store.put([key(1), key(2)], [payload(1), payload(2)], OWNER, as_of=moment)
    store.put([key(3)], [payload(3)], as_of=moment)
    store.flush()
    assert tiers[1].contains([key(1), key(2), key(3)]) == [False, False, True]
    store.forget(OWNER)
    store.put([key(4)], [payload(4)], OWNER, as_of=moment)
    store.put([key(5)], [payload(5)], OWNER, as_of=store.moment())
    store.flush()
    assert [tier.contains([key(4), key(5)]) for tier in tiers] == [[False, True]] * 2


def test_a_moment_too_long_ago_counts_as_before_all_that_was_forgotten(store, tiers, monkeypatch):
    monkeypatch.setattr(tiered, "MOST_TOLD", 3)
    moment = store.moment()
    for i in range(5):
        store.forget(bytes([i + 1]) * 16)
        store.moment()
    store.put([key(1), key(2)], [payload(1), payload(2)], bytes([1]) * 16, as_of=moment)
    store.put([key(3)], [payload(3)], OWNER, as_of=moment)
    store.flush()
    assert store.contains([key(1), key(2), key(3)]) == [False, False, True]


def at_exit(code):
    """The output of a process that runs `code` and exits, and how many seconds that takes."""
    begin = "import sys, time; from lmcache_mm.stores import *; from lmcache_mm.stores.tiered import TieredStore\n"
    end = "\nprint(time.monotonic(), flush=True)"
    command = [sys.executable, "-c", begin + code + end]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)
    return done.stderr, time.monotonic() - float(done.stdout)


@pytest.mark.parametrize("first", ["mem://?capacity=16MiB", "shm:///NAME?capacity=16MiB"])
def test_what_a_store_has_accepted_is_written_when_the_process_ends(tmp_path, first):
    shm = f"test-{uuid.uuid4().hex}"
    url = f"file://{tmp_path}/store?capacity=64MiB"
    code = f"""
store = open_store("tiered:{first.replace("NAME", shm)},{url}")
for i in range(100):
    store.put([i.to_bytes(36, "little")], [bytes([i]) * 100_000])
"""
    said, _ = at_exit(code)
    assert said == ""
    with contextlib.closing(open_store(url)) as below:
        assert below.stats()["records"] == 100
        assert get(below, 7, 100_000) == bytes([7]) * 100_000
    if first.startswith("shm"):
        assert slab.remove(slab_directory(f"shm:///{shm}")[1])


def test_jobs_of_a_cache_are_done_before_its_store_is_closed_when_the_process_ends(tmp_path):
    url = f"file://{tmp_path}/store?capacity=64MiB"
    code = f"""
import torch, lmcache_mm as lmc
pages = torch.ones(64, 16, 4096)
layout = lmc.KVLayout.from_tensors([pages], page_tokens=16, page_dim=0, token_dim=1)
cache = lmc.KVCache(layout, ["mem://?capacity=32MiB", "{url}"], lmc.Namespace(model="m"))
jobs = [cache.store(lmc.Prompt([i] * 256), range(16)) for i in range(4)]
early = cache.store(lmc.Prompt([9] * 256), range(16), by_layer=True)  # whose layers are never written
"""
    said, _ = at_exit(code)
    assert said == ""
    with contextlib.closing(open_store(url)) as below:
        assert below.stats()["records"] == 4


def test_a_tier_that_hangs_holds_up_the_end_of_a_process_for_a_while_and_what_is_lost_is_said(tmp_path):
    code = """
class Hangs(type(open_store("mem://?capacity=1KiB"))):
    def put(self, *arguments):
        time.sleep(60)
store = TieredStore([open_store("mem://?capacity=1MiB"), Hangs(1 << 20)])
for i in range(10):
    store.put([i.to_bytes(36, "little")], [bytes(100)])
"""
    said, seconds = at_exit(code)
    assert "10 records were not written to slower tiers" in said
    assert said.count("records were not written") == 1
    assert "Traceback" not in said
    assert seconds < lane.EXIT_S + 20
