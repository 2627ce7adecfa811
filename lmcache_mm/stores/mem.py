"""mem://: records in one preallocated buffer of this process, the least recently used evicted first."""

from __future__ import annotations

import math
import os
import threading
import time
from bisect import bisect_left, insort
from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from lmcache_mm.ops import checksum
from lmcache_mm.stores.arguments import bytes_of, check_keys, check_process, checked_owner, writable

if TYPE_CHECKING:
    from lmcache_mm.stores import Buffer

ALIGNMENT = 64  # a payload begins on a cache line


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
    """See `Store`. `capacity`: bytes of the buffer, a multiple of 64 of which is used."""

    local = True
    read_only = False

    def __init__(self, capacity: int) -> None:
        if capacity < ALIGNMENT:
            raise ValueError(f"capacity: expected at least {ALIGNMENT} bytes, got {capacity}")
        self._buffer = torch.empty(capacity // ALIGNMENT * ALIGNMENT, dtype=torch.uint8)
        self._records: OrderedDict[bytes, _Record] = OrderedDict()  # the next to be evicted first
        self._held: Counter[bytes] = Counter()
        self._gaps = [(0, len(self._buffer))]  # free (begin, end), ascending, never adjacent
        self._counts: Counter[str] = Counter(
            dict.fromkeys(("hits", "misses", "corrupt", "puts", "dropped_puts", "evictions"), 0)
        )
        self._lock = threading.Lock()
        self._forgotten: dict[bytes, int] = {}
        self._pid = os.getpid()

    def _check(self) -> None:
        check_process(self._pid)

    def contains(self, keys: Sequence[bytes], peek: bool = False) -> list[bool]:
        self._check()
        check_keys(keys)
        with self._lock:
            return [key in self._records for key in keys]

    def hold(self, keys: Sequence[bytes]) -> Callable[[], None]:
        self._check()
        check_keys(keys)

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
        arrays = writable(buffers)
        with self._lock:
            found = [self._get(key, torch.from_numpy(array)) for key, array in zip(keys, arrays, strict=True)]
            if not peek:
                self._touch(keys)
        return found

    def _get(self, key: bytes, out: torch.Tensor) -> bool:
        record = self._records.get(key)
        if record is None or record.payload_bytes != len(out):
            self._counts["misses"] += 1
            return False
        out.copy_(self._buffer[record.begin : record.begin + record.payload_bytes])
        if checksum(out) != record.checksum:
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
        check_keys(keys)
        checked_owner(owner)
        with self._lock:
            if as_of is not None and self._forgotten.get(owner, 0) > as_of:
                return
            for i, (key, buffer) in enumerate(zip(keys, buffers, strict=True)):
                payload = _bytes(buffer)
                if key not in self._records:
                    self._put(key, payload, checksum(payload) if checksums is None else checksums[i], owner, age_s)
            self._touch(keys)

    def _put(self, key: bytes, payload: torch.Tensor, payload_checksum: int, owner: bytes, age_s: float) -> None:
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
        self._gaps.remove(gap)
        if gap[1] - gap[0] > size:
            insort(self._gaps, (gap[0] + size, gap[1]))
        self._buffer[gap[0] : gap[0] + len(payload)] = payload
        self._records[key] = _Record(gap[0], len(payload), payload_checksum, owner, time.monotonic() - age_s)
        self._counts["puts"] += 1

    def _touch(self, keys: Sequence[bytes]) -> None:
        # Keys come as prefixes, shortest first, and a chunk is of no use without those before it: it goes first.
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
        return len(self._forgotten) and max(self._forgotten.values())

    def ages(self, keys: Sequence[bytes]) -> list[float]:
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
        with self._lock:
            self._forgotten[owner] = 1 + max(self._forgotten.values(), default=0)
            keys = [key for key, record in self._records.items() if owner and record.owner == owner]
            for key in keys:
                self._remove(key)
            return len(keys)

    def flush(self) -> None:
        """Every put is visible when it returns."""

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
            self._records.clear()
            self._gaps = []
            self._buffer = torch.empty(0, dtype=torch.uint8)


def _bytes(buffer: Buffer) -> torch.Tensor:
    view = bytes_of(buffer)
    return torch.from_numpy(view if view.flags.writeable else view.copy())
