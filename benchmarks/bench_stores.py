"""Stores that processes share: lookups with a concurrent writer, a disk's own speed, and several readers at once."""

from __future__ import annotations

import mmap
import multiprocessing
import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lmcache_mm.commands import cli
from lmcache_mm.stores import open_store
from lmcache_mm.stores.local import file
from lmcache_mm.stores.local.shm import ShmStore

RECORD_BYTES = 7 << 20  # 256 tokens of Qwen2-VL-2B
RECORDS = 32
FORK = multiprocessing.get_context("fork")


def key(i: int) -> bytes:
    return i.to_bytes(36, "little")


def aligned(size: int) -> np.ndarray:
    array = np.frombuffer(mmap.mmap(-1, size), dtype=np.uint8)
    array[:] = 1  # touches its pages
    return array


@pytest.fixture
def shm():
    url = f"shm:///bench-{os.getpid()}"
    store = open_store(f"{url}?capacity=1GiB")
    store._mapped.wait()
    yield store
    store.close()
    assert cli.main(["clear", url]) == 0


def write_for_ever(directory: Path) -> None:
    store = ShmStore.open(directory, None)
    payload = np.ones(RECORD_BYTES, np.uint8)
    i = 1000
    while True:
        store.put([key(i)], [payload])
        i += 1


@pytest.mark.parametrize("writer", [False, True], ids=["alone", "beside a writer"])
def test_match_of_128_keys(benchmark, shm, writer):
    keys = [key(i) for i in range(128)]
    shm.put(keys, [bytes([i]) * 1000 for i in range(128)])
    process = FORK.Process(target=write_for_ever, args=(shm.directory,), daemon=True)
    if writer:
        process.start()
        until = time.monotonic() + 2
        while time.monotonic() < until:
            shm.contains(keys)  # keeps these records from eviction
    times = []

    def match() -> None:
        begin = time.perf_counter()
        there = shm.contains(keys)
        times.append(time.perf_counter() - begin)
        assert sum(there) == 128

    benchmark.pedantic(match, rounds=5000, warmup_rounds=100)
    benchmark.extra_info.update(p99_s=float(np.quantile(times, 0.99)), writer=writer)
    if writer:
        process.kill()
        process.join()


@pytest.fixture(scope="module")
def disk(tmp_path_factory):
    """A file: store and a plain file with O_DIRECT, both overwritten once."""
    folder = Path(os.environ.get("LMCACHE_MM_BENCH_DIR", tmp_path_factory.mktemp("disk")))
    capacity = RECORDS * RECORD_BYTES
    store = open_store(f"file://{folder}/store?capacity={capacity}")
    plain = os.open(folder / "plain", os.O_RDWR | os.O_CREAT | os.O_DIRECT, 0o600)
    os.posix_fallocate(plain, 0, capacity)
    buffers = [aligned(RECORD_BYTES) for _ in range(RECORDS)]
    store.put([key(i) for i in range(RECORDS)], buffers)
    with ThreadPoolExecutor(file.IO_THREADS) as pool:
        yield store, plain, buffers, pool
    os.close(plain)
    (folder / "plain").unlink()
    store.close()
    assert cli.main(["clear", f"file://{folder}/store"]) == 0


def plain_io(call: Any, fd: int, buffers: list[np.ndarray], pool: ThreadPoolExecutor) -> None:
    """preadv or pwritev of all records, with the store's piece size and number of threads."""
    jobs = []
    for i, buffer in enumerate(buffers):
        for begin in range(0, RECORD_BYTES, file.PIECE_BYTES):
            piece = buffer[begin : begin + file.PIECE_BYTES]
            jobs.append(pool.submit(call, fd, [piece.data], i * RECORD_BYTES + begin))
    assert sum(job.result() for job in jobs) == len(buffers) * RECORD_BYTES


def test_file_read(against, disk):
    store, plain, buffers, pool = disk
    plain_io(os.pwritev, plain, buffers, pool)
    keys = [key(i) for i in range(RECORDS)]
    store.put(keys, buffers)

    def read() -> None:
        assert all(store.get_into(keys, buffers))

    peers = {"plain O_DIRECT": lambda: plain_io(os.preadv, plain, buffers, pool)}
    against(read, peers, 8, bytes=RECORDS * RECORD_BYTES, disk="cold read")


def test_file_rewrite(against, disk):
    store, plain, buffers, pool = disk
    numbers = iter(range(1000, 10**6))

    def rewrite() -> None:
        store.put([key(next(numbers)) for _ in range(RECORDS)], buffers)

    peers = {"plain O_DIRECT": lambda: plain_io(os.pwritev, plain, buffers, pool)}
    puts = store.stats()["puts"]
    against(rewrite, peers, 8, bytes=RECORDS * RECORD_BYTES, disk="rewrite")
    assert store.stats()["puts"] == puts + 10 * RECORDS  # 2 rounds are warm-up


def read_all(directory: Path, ready: Any, go: Any, done: Any, rounds: int) -> None:
    store = ShmStore.open(directory, None)
    store._mapped.wait()
    buffers = [np.ones(RECORD_BYTES, np.uint8) for _ in range(4)]
    ready.release()
    go.wait()
    for i in range(rounds):
        keys = [key((4 * i + k) % RECORDS) for k in range(4)]
        assert all(store.get_into(keys, buffers))
    done.release()
    store.close()


@pytest.mark.parametrize("processes", [1, 2, 4, 8])
def test_processes_that_read_at_once(benchmark, shm, processes):
    shm.put([key(i) for i in range(RECORDS)], [np.full(RECORD_BYTES, i, np.uint8) for i in range(RECORDS)])
    rounds = 96 // processes
    go, done = FORK.Event(), FORK.Semaphore(0)
    started: list[Any] = []

    def stop() -> None:
        for process in started:
            process.join()
            assert process.exitcode == 0

    def start() -> None:
        stop()
        go.clear()
        ready = FORK.Semaphore(0)
        arguments = (shm.directory, ready, go, done, rounds)
        started[:] = [FORK.Process(target=read_all, args=arguments) for _ in range(processes)]
        for process in started:
            process.start()
        for _ in started:
            ready.acquire()

    def read() -> None:
        go.set()
        for _ in started:
            done.acquire()

    benchmark.pedantic(read, setup=start, rounds=5)
    stop()
    benchmark.extra_info.update(processes=processes, bytes=processes * rounds * 4 * RECORD_BYTES)
