"""Jobs in several steps through staging memory."""

import threading
import time

import pytest

from jobs import PAGE_TOKENS, Gate, are_equal, chunks_of, layers, layout_of
from lmcache_mm.lane import Abandoned
from lmcache_mm.stores import open_store
from lmcache_mm.transfer import Transfer


@pytest.fixture
def in_steps(monkeypatch):
    """A transfer in steps of one chunk through staging memory, its store, and what happened in both, in order."""
    monkeypatch.setattr("lmcache_mm.transfer.STAGING_BYTES", 1)
    gate, happened, changed = Gate(open_store("mem://?capacity=1MiB")), [], threading.Condition()
    kv = layers(row=4)
    transfer = Transfer(layout_of(kv), gate, 1)

    def tell(what):
        with changed:
            happened.append(what)
            changed.notify_all()

    def wait_for(what, count):
        with changed:
            return changed.wait_for(lambda: happened.count(what) >= count, 10)

    yield kv, transfer, gate, happened, tell, wait_for
    gate.open.set()
    transfer.close()


def test_a_step_is_read_while_the_one_before_is_scattered(in_steps, at_each_copy):
    kv, transfer, gate, happened, tell, wait_for = in_steps
    chunks = chunks_of([3, 1], [0, 4], [11, 2], [5, 6])
    want = kv.clone()
    assert transfer.store(chunks, b"").result() == 4 * 2 * PAGE_TOKENS
    kv.zero_()

    def read(*arguments):
        tell("read")
        return gate.store.get_into(*arguments)

    def is_read_ahead():
        assert wait_for("read", min(len(chunks), happened.count("scatter") + 1))

    gate.get_into = read
    at_each_copy(lambda: tell("scatter"), is_read_ahead)
    assert transfer.load(chunks, b"").result() == len(chunks)
    assert are_equal(kv, want, chunks)
    gate.store.delete([chunks[1].key])
    del happened[:]
    at_each_copy()
    assert transfer.load(chunks, b"").result() == 1
    assert happened == ["read", "read"]  # nothing is read behind what is missing


def test_a_step_is_put_while_the_next_one_is_gathered(in_steps, at_each_copy):
    kv, transfer, gate, happened, tell, wait_for = in_steps
    chunks = chunks_of([3, 1], [0, 4], [11, 2], [5, 6])
    want = kv.clone()

    def put_late(*arguments):
        tell("put")
        assert wait_for("gather", min(len(chunks), happened.count("put") + 1))
        gate.store.put(*arguments)

    gate.put = put_late
    at_each_copy(lambda: tell("gather"))
    assert transfer.store(chunks, b"").result() == 4 * 2 * PAGE_TOKENS
    kv.zero_()
    assert transfer.load(chunks, b"").result() == len(chunks)
    assert are_equal(kv, want, chunks)


@pytest.mark.parametrize("direction", ["load", "store"])
def test_a_job_that_fails_keeps_its_memory_while_the_store_uses_it(in_steps, direction, at_each_copy):
    """The next job would fill or read the same memory."""
    _, transfer, gate, happened, tell, wait_for = in_steps
    chunks = chunks_of([3, 1], [0, 4], [11, 2])
    transfer.store(chunks, b"").result()
    if direction == "store":
        gate.store.delete([chunk.key for chunk in chunks])
    name = "get_into" if direction == "load" else "put"
    method, copied = getattr(gate.store, name), []
    hangs_at = 2 if direction == "load" else 1

    def hang(*arguments):
        tell(name)
        assert happened.count(name) < hangs_at or gate.open.wait(30)
        return method(*arguments)

    def fail():
        copied.append(1)
        if len(copied) == 3 - hangs_at:
            assert wait_for(name, hangs_at)
            raise OSError("it fails here")

    setattr(gate, name, hang)
    at_each_copy(fail)
    job = getattr(transfer, direction)(chunks, b"")
    assert wait_for(name, hangs_at)
    time.sleep(0.05)
    assert not job.done()
    gate.open.set()
    with pytest.raises(OSError, match="it fails here"):
        job.result(10)


def test_nothing_is_read_ahead_for_a_load_that_was_given_up(in_steps):
    _, transfer, gate, happened, tell, wait_for = in_steps
    chunks = chunks_of([3, 1], [0, 4], [11, 2])
    transfer.store(chunks, b"").result()

    def hang(*arguments):
        tell("read")
        assert gate.open.wait(30)
        return gate.store.get_into(*arguments)

    gate.get_into = hang
    job = transfer.load(chunks, b"")
    assert wait_for("read", 1)
    assert job.abandon()
    gate.open.set()
    with pytest.raises(Abandoned):
        job.result(10)
    assert happened == ["read"]


@pytest.mark.parametrize("direction", ["load", "store"])
def test_an_error_of_the_store_in_any_step_is_the_jobs(in_steps, direction):
    _, transfer, gate, happened, tell, _ = in_steps
    chunks = chunks_of([3, 1], [0, 4], [11, 2], [5, 6])
    if direction == "load":
        transfer.store(chunks, b"").result()
    name = "get_into" if direction == "load" else "put"
    method = getattr(gate.store, name)

    def fail(*arguments):
        tell(name)
        if happened.count(name) == 2:
            raise OSError("it fails here")
        return method(*arguments)

    setattr(gate, name, fail)
    with pytest.raises(OSError, match="it fails here"):
        getattr(transfer, direction)(chunks, b"").result(10)
    assert happened.count(name) == 2
