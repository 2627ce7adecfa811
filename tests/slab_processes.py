"""The crash test: processes that work on a store and are killed. Arguments: kind, directory, seconds, workers, seed.

Prints how many were killed, how many of them had begun to work, and how many wrong payloads they saw.
"""

from __future__ import annotations

import mmap
import os
import random
import signal
import sys
import time
from pathlib import Path

import numpy as np

from lmcache_mm.stores.local.slab import FileStore, ShmStore, SlabStore, Slot

KEYS = 60
LARGEST = 90_000


def key(i: int) -> bytes:
    return i.to_bytes(36, "little")


def size(i: int) -> int:
    return 1 + i * 7919 % LARGEST


def payload(i: int) -> np.ndarray:
    """What is stored under key(i), always: whatever else comes back is wrong."""
    return ((np.arange(size(i)) * (2 * i + 1) + i) % 251).astype(np.uint8)


def payload_of(slot: Slot) -> np.ndarray:
    return payload(int.from_bytes(slot.key, "little"))


def open_store(kind: str, directory: Path) -> SlabStore:
    return {"shm": ShmStore, "file": FileStore}[kind].open(directory, None)


def work(store: SlabStore, wrong: np.ndarray) -> None:
    held: list[Slot] = []
    while True:
        ids = random.sample(range(KEYS), 4)
        keys, sizes = [key(i) for i in ids], [size(i) for i in ids]
        what = random.random()
        if what < 0.4:
            store.put(keys, [payload(i) for i in ids], owner=bytes([1 + ids[0] % 3]) * 16)
        elif what < 0.8:
            buffers = [np.zeros(n, np.uint8) for n in sizes]
            found = store.get_into(keys, buffers)
            wrong += sum(f and not np.array_equal(b, payload(i)) for f, b, i in zip(found, buffers, ids, strict=True))
        elif what < 0.85:
            store.delete(keys[:1])
        elif what < 0.87:
            store.forget(bytes([1 + ids[0] % 3]) * 16)
        elif what < 0.97:  # slots that are lent for a while
            held += [slot for slot in store.lend(keys, sizes) if slot]
            if isinstance(store, ShmStore):
                wrong += sum(not np.array_equal(store.view(slot), payload_of(slot)) for slot in held)
            if len(held) > 8:
                store.release(held)
                held = []
        else:  # slots that are reserved and never published, should the end come here
            slots = [slot for slot in store.reserve(keys, sizes) if slot]
            if random.random() < 0.5:
                store.abandon(slots)
            else:
                store.publish(slots, store._write(slots, [payload_of(slot) for slot in slots], None))


def main(kind: str, directory: Path, seconds: float, workers: int, seed: int) -> None:
    wrong = np.frombuffer(mmap.mmap(-1, 4096), dtype=np.uint64)[:1]  # outlives those that write to it
    begun = np.frombuffer(mmap.mmap(-1, 4096), dtype=np.uint64)[:1]
    random.seed(seed)

    def start() -> int:
        worker_seed = random.random()
        child = os.fork()
        if child == 0:
            try:
                random.seed(worker_seed)
                store = open_store(kind, directory)
                begun[:] += 1
                work(store, wrong)
            finally:
                wrong[:] += 1000  # no worker ends by itself
                os._exit(1)
        return child

    alive = [start() for _ in range(workers)]
    killed = 0
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        time.sleep(random.random() * 0.1)
        for _ in range(random.choice((1, 1, 1, 2, workers))):  # several at once
            victim = alive.pop(random.randrange(len(alive)))
            os.kill(victim, signal.SIGKILL)
            os.waitpid(victim, 0)
            killed += 1
        alive += [start() for _ in range(workers - len(alive))]
    for child in alive:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    print(killed + len(alive), int(begun[0]), int(wrong[0]))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), float(sys.argv[3]), int(sys.argv[4]), int(sys.argv[5]))
