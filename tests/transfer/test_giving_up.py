"""Jobs are given up when a store hangs, and fail when it does."""

import gc
import threading
import time
from dataclasses import replace

import pytest
import torch

from jobs import PATIENCE_S, Gate, chunks_of, hangs, layers, layout_of
from lmcache_mm.copies import HostCopies
from lmcache_mm.lane import Abandoned, Lane
from lmcache_mm.transfer import Transfer


@pytest.mark.parametrize("direction", ["load", "store"])
def test_a_job_whose_store_hangs_is_abandoned_and_never_touches_its_pages(make, store, direction, monkeypatch):
    kv = layers()
    chunks = chunks_of([3, 1, 7])
    if direction == "load":
        make(kv)[1].store(chunks, b"").result()
    gate, transfer = make(kv, hangs(store, direction))
    job = getattr(transfer, direction)(chunks, b"")
    assert gate.reached.wait(10)
    assert not job.pages_free(PATIENCE_S)
    touched = []
    monkeypatch.setattr(HostCopies, "_copy", lambda *_: touched.append(1))
    gate.open.set()
    with pytest.raises(Abandoned):
        job.result(10)
    assert not touched
    assert store.stats()["records"] == (direction == "load")


def test_what_comes_behind_a_job_that_hangs_is_given_up_at_once(make, store):
    kv = layers()
    chunks = chunks_of([3, 1, 7])
    gate, transfer = make(kv, hangs(store, "load"))
    first = transfer.load(chunks, b"")
    assert gate.reached.wait(10)
    assert not first.pages_free(PATIENCE_S)
    transfer._loads.progress -= 1000
    begun = time.monotonic()
    second = transfer.load(chunks, b"")
    assert not second.pages_free(60)
    assert time.monotonic() - begun < 30
    gate.open.set()
    for job in (first, second):
        with pytest.raises(Abandoned):
            job.result(10)
    third = transfer.load(chunks, b"")  # the store is back
    assert third.pages_free(10)
    assert third.result() == 0


def test_a_store_that_hangs_after_the_pages_were_read_holds_nobody_up(make, store):
    kv = layers()
    want = kv.clone()
    chunks = chunks_of([3, 1, 7])
    gate, transfer = make(kv, "publish" if hasattr(store, "lend") else "put")
    job = transfer.store(chunks, b"")
    assert job.pages_free(10)
    assert not job.done()
    kv.zero_()  # the pages have a new owner by now
    gate.open.set()
    assert job.result(10) == 12
    assert transfer.load(chunks, b"").result() == 1
    assert torch.equal(kv[:, [3, 1, 7]], want[:, [3, 1, 7]])


def test_early_work_that_may_begin_behind_work_that_hangs_is_no_progress():
    """Otherwise an engine that keeps storing would never notice that its store hangs."""
    lane, gate, begun = Lane("test"), threading.Event(), threading.Event()
    lane.submit(lambda _: begun.set() or gate.wait(10))
    behind = lane.submit(lambda work: work.touch_pages(lambda _: True), early=True)
    assert begun.wait(10)
    since = time.monotonic()
    time.sleep(0.1)
    behind.be_late()
    hung_s = time.monotonic() - since
    assert lane.stalled_s() >= hung_s
    gate.set()
    assert lane.close(10)


def test_an_error_at_the_pages_is_the_jobs_too(make, store, monkeypatch):
    kv = layers()
    _, transfer = make(kv)

    def fails(*_, **__):
        raise ValueError("no room")

    monkeypatch.setattr(HostCopies, "_copy", fails)
    for early in (False, True):
        job = transfer.store(chunks_of([3, 1, 7]), b"", early=early)
        assert job.pages_free(10)
        with pytest.raises(ValueError, match="no room"):
            job.result(10)
    assert store.stats()["records"] == 0


def test_slow_steps_are_no_reason_to_give_up(make, store, small_steps):
    """Only a store without progress uses up the patience, however long the whole takes."""
    kv, patience_s = layers(), 2.0
    chunks = chunks_of(*([page] for page in range(10)))
    _, transfer = make(kv)
    transfer.store(chunks, b"").result()
    slow = Gate(store)
    read = getattr(store, hangs(store, "load"))

    def slowly(*arguments, **more):
        time.sleep(patience_s / 8)
        return read(*arguments, **more)

    setattr(slow, hangs(store, "load"), slowly)
    other = Transfer(replace(layout_of(kv)), slow, 1)
    job = other.load(chunks, b"")
    assert job.pages_free(patience_s)
    assert job.result() == 10
    other.close()


def test_an_error_of_the_store_is_the_jobs(make, store):
    kv = layers()
    gate, transfer = make(kv)

    def fails(*_, **__):
        raise ConnectionError("down")

    setattr(gate, hangs(store, "load"), fails)
    job = transfer.load(chunks_of([1]), b"")
    with pytest.raises(ConnectionError, match="down"):
        job.result(10)
    assert job.pages_free(1)


def test_a_transfer_closes_in_time_over_a_store_that_hangs(make, store):
    gate, transfer = make(layers(), hangs(store, "load"))
    transfer.load(chunks_of([1]), b"")
    assert gate.reached.wait(10)
    assert not transfer.close(PATIENCE_S)


def test_a_lane_that_is_gone_or_closed_leaves_no_thread():
    gone, closed = Lane("gone"), Lane("closed")
    assert gone.submit(lambda _: 1).future.result(10) == 1
    assert closed.submit(lambda _: 2).future.result(10) == 2
    closed.close()
    threads = [gone._thread, closed._thread]
    del gone
    gc.collect()
    for thread in threads:
        thread.join(10)
        assert not thread.is_alive()
    with pytest.raises(RuntimeError, match="closed: it is closed"):
        closed.submit(lambda _: 3)
