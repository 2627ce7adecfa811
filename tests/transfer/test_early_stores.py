"""Stores that begin before their pages are written, and when the pages are no longer touched."""

import threading
import time

import pytest
import torch

from jobs import PAGE_TOKENS, PAGES, PATIENCE_S, are_equal, chunks_of, hangs, layers
from lmcache_mm.lane import Abandoned


def test_a_wait_that_ends_gives_nothing_up(make, store):
    kv = layers()
    chunks = chunks_of([3, 1, 7])
    gate, transfer = make(kv, hangs(store, "store"))
    job = transfer.store(chunks, b"", early=True)
    with pytest.raises(TimeoutError):
        job.result(PATIENCE_S)
    gate.open.set()
    assert job.result(10) == 12
    kv.zero_()
    assert transfer.load(chunks, b"").result() == 1


def test_an_early_store_is_read_once_whoever_waits(make, small_steps, at_each_copy):
    kv = layers()
    want = kv.clone()
    chunks = chunks_of(*([page] for page in range(PAGES)))
    _, transfer = make(kv, largest=1)
    at_each_copy(lambda: time.sleep(0.002))
    job = transfer.store(chunks, b"", early=True)
    threads = [threading.Thread(target=job.pages_free, args=(10,)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert job.result(10) == PAGES * PAGE_TOKENS
    kv.zero_()
    assert transfer.load(chunks, b"").result() == PAGES
    assert torch.equal(kv, want)


def test_the_pages_of_an_early_store_are_read_when_somebody_waits(make, store, small_steps, at_each_copy):
    """The waiting thread reads them, in several steps, one after another."""
    readers = []
    at_each_copy(lambda: readers.append(threading.current_thread()))
    kv = layers()
    kv.zero_()
    _, transfer = make(kv, largest=1)
    chunks = chunks_of([3, 1, 7], [0], [11, 2])
    job = transfer.store(chunks, b"", early=True)
    time.sleep(0.05)
    assert not readers
    kv.copy_(layers(seed=1))  # computed meanwhile
    want = kv.clone()
    assert job.pages_free(10)
    assert readers == [threading.current_thread()] * 3
    kv.zero_()
    assert job.result(10) == 24
    assert transfer.load(chunks, b"").result() == 3
    assert are_equal(kv, want, chunks)


def test_the_pages_of_an_early_store_are_read_by_its_own_thread_once_they_are_written(make, small_steps, at_each_copy):
    """In several steps; the caller continues at once, and waits only before it writes the pages again."""
    readers = []
    at_each_copy(lambda: readers.append(threading.current_thread()), lambda: time.sleep(0.02))
    kv = layers()
    kv.zero_()
    _, transfer = make(kv, largest=1)
    chunks = chunks_of([3, 1, 7], [0], [11, 2])
    job = transfer.store(chunks, b"", early=True)
    assert not job._leave_pages(time.monotonic() + 0.05)  # given up before they were written
    job = transfer.store(chunks, b"", early=True)
    time.sleep(0.05)
    assert not readers
    kv.copy_(layers(seed=1))  # computed meanwhile
    want = kv.clone()
    job.written()
    assert job._leave_pages(time.monotonic() + 10)
    kv.zero_()
    assert len(readers) == 3
    assert threading.current_thread() not in readers
    assert job.result(10) == 24
    assert transfer.load(chunks, b"").result() == 3
    assert are_equal(kv, want, chunks)


def test_a_store_that_is_late_is_given_up_between_its_steps(make, small_steps, at_each_copy):
    """It stores the pages that it has read, and touches no others."""
    reads = []
    at_each_copy(lambda: time.sleep(0.1), lambda: reads.append(kv.clone()))
    kv = layers()
    want = kv.clone()
    _, transfer = make(kv, largest=1)
    chunks = chunks_of(*([page] for page in range(12)))
    job = transfer.store(chunks, b"", early=True)
    job.written()
    assert not job._leave_pages(time.monotonic() + 0.05)
    kv.zero_()  # by the pages' new owner
    with pytest.raises(Abandoned):
        job.result(10)
    assert all(torch.equal(read, want) for read in reads)
    assert len(reads) < 12


def test_an_early_store_given_up_leaves_nothing_behind(make, store):
    kv = layers()
    _, transfer = make(kv)
    job = transfer.store(chunks_of([3, 1, 7]), b"", early=True)
    time.sleep(0.05)
    assert job.abandon()
    assert not job.pages_free(10)
    with pytest.raises(Abandoned):
        job.result(10)
    assert store.stats()["records"] == 0
    assert store.stats().get("pending", 0) == 0
    assert transfer.store(chunks_of([3, 1, 7]), b"").result(10) == 12
