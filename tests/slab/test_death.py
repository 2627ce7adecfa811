"""Processes that die or stop while they have a shm: or file: store open."""

import os
import signal
import subprocess
import sys
import time
import uuid

import pytest

from lmcache_mm.commands.cli import main
from lmcache_mm.stores.local import slab, slab_files
from lmcache_mm.stores.local.file import FileStore
from slabs import IN_ANOTHER, MIB, REST_S, fill, no_room_is_lost, pinned, python
from test_stores import OWNER, get, key, payload


def test_what_a_dead_process_reserved_rests_and_what_it_pinned_is_free(store, monkeypatch):
    fill(store, first=0, count=2)
    victim = subprocess.Popen(
        [
            sys.executable,
            "-c",
            IN_ANOTHER + "store.reserve([key(50)], [300_000]); store.lend([key(0)], [100_000])\n"
            "print('held', flush=True); sys.stdin.read()",
            type(store).__name__,
            store.directory,
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
def test_a_process_that_ends_without_closing_ends_well(url, directory):
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
