"""mem://: records in one preallocated buffer of this process, the least recently used evicted first."""

from __future__ import annotations

import errno
import math
import os
import threading
import time
from bisect import bisect_left, insort
from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from lmcache_mm import _C
from lmcache_mm.operands import THREADS
from lmcache_mm.stores.arguments import (
    check_forgotten,
    check_keys,
    check_process,
    checked_owner,
    checked_records,
    writable,
)

if TYPE_CHECKING:
    from lmcache_mm.stores.arguments import Buffer

ALIGNMENT = 64  # each payload begins on a cache line
MOST_FORGOTTEN = 4096  # owners with a known time of the last `forget`


@dataclass(frozen=True, slots=True)
class _Record:
    begin: int
    payload_bytes: int
    checksum: int
    owner: bytes = b""
    stored_at: float = 0.0  # by time.monotonic()

    @property
    def end(self) -> int:
        """Where the next record may begin."""
        return self.begin + max(ALIGNMENT, -(-self.payload_bytes // ALIGNMENT) * ALIGNMENT)


class MemStore:
    """See `Store`. `capacity`: bytes of the buffer, rounded down to a multiple of 64."""

    local = True
    read_only = False

    def __init__(self, capacity: int) -> None:
        if capacity < ALIGNMENT:
            raise ValueError(f"capacity: expected at least {ALIGNMENT} bytes, got {capacity}")
        try:
            self._buffer = np.empty(capacity // ALIGNMENT * ALIGNMENT, np.uint8)
        except (MemoryError, ValueError):
            raise OSError(errno.ENOMEM, f"mem: not enough memory for {capacity} bytes: lower capacity=") from None
        self._records: OrderedDict[bytes, _Record] = OrderedDict()  # the next to be evicted first
        self._held: Counter[bytes] = Counter()
        self._gaps = [(0, len(self._buffer))]  # free (begin, end), ascending, never adjacent
        self._counts: Counter[str] = Counter(
            dict.fromkeys(("hits", "misses", "corrupt", "puts", "dropped_puts", "evictions"), 0)
        )
        self._lock = threading.Lock()
        self._moment = 0  # number of calls to `forget`
        self._forgotten: OrderedDict[bytes, int] = OrderedDict()  # each owner's last moment, the earliest first
        self._forgotten_before = 0  # the latest moment that was dropped from _forgotten
        self._pid = os.getpid()
        self._closed = False

    def _check(self) -> None:
        check_process(self._pid)
        if self._closed:
            raise RuntimeError("store: it is closed")

    def contains(self, keys: Sequence[bytes], peek: bool = False) -> list[bool]:
        self._check()
        check_keys(keys)
        with self._lock:
            return [key in self._records for key in keys]

    def hold(self, keys: Sequence[bytes]) -> Callable[[], None]:
        self._check()
        check_keys(keys)
        keys = list(keys)

        def add(by: int) -> None:
            with self._lock:
                for key in keys:
                    self._held[key] += by
                self._held = +self._held

        add(1)
        return lambda: add(-1)

    def get_into(
        self, keys: Sequence[bytes], buffers: Sequence[Buffer], owner: bytes = b"", peek: bool = False
    ) -> list[bool]:
        self._check()
        check_keys(keys)
        checked_owner(owner)
        arrays = writable(buffers, len(keys))
        with self._lock:
            found = [self._get(key, array) for key, array in zip(keys, arrays, strict=True)]
            if not peek:
                self._touch(keys)
        return found

    def _get(self, key: bytes, out: np.ndarray) -> bool:
        record = self._records.get(key)
        if record is None or record.payload_bytes != len(out):
            self._counts["misses"] += 1
            return False
        if _copy(out, self._buffer[record.begin : record.begin + record.payload_bytes]) != record.checksum:
            self._counts["corrupt"] += 1
            self._remove(key)
            return False
        self._counts["hits"] += 1
        return True

    def put(
        self,
        keys: Sequence[bytes],
        buffers: Sequence[Buffer],
        owner: bytes = b"",
        checksums: Sequence[int] | None = None,
        as_of: int | None = None,
        age_s: float = 0.0,
    ) -> None:
        self._check()
        arrays, given = checked_records(keys, buffers, owner, checksums)
        with self._lock:
            # An owner missing from _forgotten may have been dropped from it: assume the latest dropped moment.
            forgotten = owner and as_of is not None and self._forgotten.get(owner, self._forgotten_before) > as_of
            for i, (key, array) in enumerate(zip(keys, arrays, strict=True)):
                if key in self._records:
                    continue
                if forgotten:
                    self._counts["dropped_puts"] += 1
                    continue
                try:
                    self._put(key, array, None if given is None else given[i], owner, age_s)
                except MemoryError:
                    self._counts["dropped_puts"] += 1
            self._touch(keys)

    def _put(self, key: bytes, payload: np.ndarray, checksum: int | None, owner: bytes, age_s: float) -> None:
        size = _Record(0, len(payload), 0).end
        if size > len(self._buffer):
            self._counts["dropped_puts"] += 1
            return
        while (gap := next((gap for gap in self._gaps if gap[1] - gap[0] >= size), None)) is None:
            oldest = next((key for key in self._records if key not in self._held), None)
            if oldest is None:
                self._counts["dropped_puts"] += 1
                return
            self._remove(oldest)
            self._counts["evictions"] += 1
        computed = _copy(self._buffer[gap[0] : gap[0] + len(payload)], payload)
        stored_at = time.monotonic() - age_s
        rest = [(gap[0] + size, gap[1])] if gap[1] - gap[0] > size else []
        self._records[key] = _Record(gap[0], len(payload), computed if checksum is None else checksum, owner, stored_at)
        i = self._gaps.index(gap)
        self._gaps[i : i + 1] = rest  # needs no memory
        self._counts["puts"] += 1

    def _touch(self, keys: Sequence[bytes]) -> None:
        # Keys come as prefixes, shortest first. A chunk is useless without those before it, so it is evicted first.
        for key in reversed(keys):
            if key in self._records:
                self._records.move_to_end(key)

    def _remove(self, key: bytes) -> None:
        record = self._records.pop(key)
        begin, end = record.begin, record.end
        i = bisect_left(self._gaps, (begin, end))
        if i < len(self._gaps) and self._gaps[i][0] == end:
            end = self._gaps.pop(i)[1]
        if i and self._gaps[i - 1][1] == begin:
            begin = self._gaps.pop(i - 1)[0]
        insort(self._gaps, (begin, end))

    def moment(self) -> int:
        self._check()
        return self._moment

    def ages(self, keys: Sequence[bytes]) -> list[float]:
        self._check()
        check_keys(keys)
        now = time.monotonic()
        with self._lock:
            return [now - self._records[key].stored_at if key in self._records else math.inf for key in keys]

    def delete(self, keys: Sequence[bytes]) -> None:
        self._check()
        check_keys(keys)
        with self._lock:
            for key in keys:
                if key in self._records:
                    self._remove(key)

    def forget(self, owner: bytes) -> int:
        self._check()
        check_forgotten(owner)
        with self._lock:
            self._moment += 1
            self._forgotten[owner] = self._moment
            self._forgotten.move_to_end(owner)
            if len(self._forgotten) > MOST_FORGOTTEN:
                self._forgotten_before = self._forgotten.popitem(last=False)[1]
            keys = [key for key, record in self._records.items() if record.owner == owner]
            for key in keys:
                self._remove(key)
            return len(keys)

    def flush(self) -> None:
        """Every put is visible when it returns."""
        self._check()

    def stats(self) -> Mapping[str, int]:
        self._check()
        with self._lock:
            used = len(self._buffer) - sum(end - begin for begin, end in self._gaps)
            sizes = {"capacity_bytes": len(self._buffer), "used_bytes": used, "records": len(self._records)}
            return {**self._counts, **sizes}

    def close(self) -> None:
        if os.getpid() != self._pid:
            return
        with self._lock:
            self._closed = True
            self._records.clear()
            self._gaps = []
            self._buffer = np.empty(0, np.uint8)


def _copy(to: np.ndarray, source: np.ndarray) -> int:
    """Copies and returns the checksum."""
    return _C.copy(to.ctypes.data, source.ctypes.data, source.nbytes, THREADS)
