"""The index of a slab: which records there are, where there is room, and who goes next when there is none.

An LMDB environment that all processes of a slab share. What changes it is one transaction of one process at a time, and
a process that dies in one has changed nothing. Room is counted in granules; an extent is a run of them that never
crosses a segment's end, so that segments can be registered with a device one by one.
"""

from __future__ import annotations

import math
import struct
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import lmdb

from lmcache_mm._C import SlabTable
from lmcache_mm.stores.arguments import NO_OWNER

SEGMENT_BYTES = 1 << 30
QUARANTINE_S = 10.0  # a dead process's transfers into its unpublished slots may trail
MOST_EVICTED = 8  # times what is needed; what does not fit then would not be worth it
NOBODY = 0xFFFFFFFF

_RECORD = struct.Struct("<IIQqQd16s")
_PLACE = struct.Struct("<II")  # what a record begins with
_PENDING = struct.Struct("<IIdQ16s")  # granules, row, when it is free, payload bytes, owner
_EXTENT = struct.Struct(">II")  # (granules, start): in the order of size
_START = struct.Struct(">I")
_SEQUENCE = struct.Struct(">Q")
_COUNTERS = struct.Struct("<QQQ")  # the hand, the next sequence, payload bytes of all records
_COUNTERS_KEY = b"counters"


class Record(NamedTuple):
    """A published payload, from granule `start` on, as long as that slot's generation is this one."""

    start: int
    generation: int
    payload_bytes: int
    checksum: int
    sequence: int  # its place in the queue of eviction
    stored_at: float  # seconds of `boot_clock`
    owner: bytes  # 16 bytes; zeros for nobody


def boot_clock() -> float:
    """Seconds since the machine's start, suspension included: nobody sets this clock."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def _unpack(value: Any) -> Record:
    return Record._make(_RECORD.unpack(value))


class Index:
    """`granules` of `granule_bytes` each. quota: most bytes of an owner, 0 for no limit. ttl_s: seconds after which a
    record counts as gone, 0 for never."""

    def __init__(
        self,
        env: lmdb.Environment,
        table: SlabTable,
        granules: int,
        granule_bytes: int,
        quota: int = 0,
        ttl_s: float = 0,
    ) -> None:
        self._env, self.table = env, table
        self._granules, self._granule_bytes = granules, granule_bytes
        self._quota, self._ttl_s = quota, ttl_s
        # A fork must not happen within a transaction, whose other half the child would be: see `pause`.
        self._reading, self._writing, self._saving = threading.Lock(), threading.Lock(), threading.Lock()
        names = ("records", "queue", "free", "sizes", "pending", "owners", "owned", "forgotten", "counters")
        self._db = {name: env.open_db(name.encode()) for name in names}

    def find(self, keys: Sequence[bytes]) -> list[Record | None]:
        """The records that were there, most likely: pin one before its payload is touched."""
        oldest = boot_clock() - self._ttl_s if self._ttl_s else float("-inf")
        found = {key: _unpack(value) for key, value in self._values(keys)}
        records = map(found.get, keys)
        return [record if record and record.stored_at >= oldest else None for record in records]

    def places(self, keys: Sequence[bytes]) -> list[tuple[int, int] | None]:
        """(start, generation) of the records that were there, most likely. As `find`, for many keys."""
        if self._ttl_s:
            return [record and record[:2] for record in self.find(keys)]
        found = {key: _PLACE.unpack_from(value) for key, value in self._values(keys)}
        return list(map(found.get, keys))

    def _values(self, keys: Sequence[bytes]) -> Sequence[tuple[bytes, bytes]]:
        with self._reading, self._env.begin() as txn, txn.cursor(self._db["records"]) as cursor:
            return cursor.getmulti(keys)

    def moment(self) -> int:
        with self._reading, self._env.begin() as txn:
            stored = txn.get(_COUNTERS_KEY, db=self._db["counters"])
            moment: int = _COUNTERS.unpack(stored)[1] if stored else 0
            return moment

    def ages(self, keys: Sequence[bytes]) -> list[float]:
        """Seconds since the records were stored; math.inf for what is not there."""
        now = boot_clock()
        return [now - record.stored_at if record else math.inf for record in self.find(keys)]

    def sizes(self) -> dict[str, int]:
        with self._reading, self._env.begin() as txn:
            used = _COUNTERS.unpack(txn.get(_COUNTERS_KEY, default=bytes(_COUNTERS.size), db=self._db["counters"]))[2]
            free = sum(_EXTENT.unpack(key)[0] for key, _ in txn.cursor(self._db["sizes"]))
            return {
                "capacity_bytes": self._granules * self._granule_bytes,
                "used_bytes": used,
                "free_bytes": free * self._granule_bytes,
                "records": txn.stat(self._db["records"])["entries"],
                "pending": txn.stat(self._db["pending"])["entries"],
                "owners": txn.stat(self._db["owners"])["entries"],
            }

    @contextmanager
    def change(self) -> Iterator[Change]:
        """One transaction; nothing has happened if its body raises. May raise lmdb.Error, as when there is no room
        for the index itself."""
        with self._writing, self._env.begin(write=True) as txn:
            change = Change(self, txn)
            yield change
            change.finish()

    def make(self) -> None:
        """Everything free and nothing recorded, if that has not been done before."""
        with self.change() as change:
            if change.made:
                return
            segment = SEGMENT_BYTES // self._granule_bytes
            for start in range(0, self._granules, segment):
                change.add_extent(start, min(segment, self._granules - start))

    def save(self, fd: int) -> None:
        """Writes the index as it is now to a file."""
        with self._saving:
            self._env.copyfd(fd, compact=True)

    def pause(self) -> None:
        """Returns when no transaction is under way; none begins before `resume`."""
        for lock in (self._writing, self._reading, self._saving):
            lock.acquire()

    def resume(self) -> None:
        for lock in (self._saving, self._reading, self._writing):
            lock.release()

    def recover(self, shift_s: float) -> None:
        """After a restart of the machine: every record gets its generation back and has been stored `shift_s` later by
        the clock of now; nothing is under way."""
        with self.change() as change:
            change.restart(shift_s)


class Change:
    """A transaction of `Index.change`; counts what it evicted and dropped."""

    def __init__(self, index: Index, txn: lmdb.Transaction) -> None:
        self._index, self._txn, self._db, self._table = index, txn, index._db, index.table
        self._now = boot_clock()
        self._expired_before = self._now - index._ttl_s if index._ttl_s else float("-inf")
        stored = txn.get(_COUNTERS_KEY, db=self._db["counters"])
        self.made = stored is not None
        self._hand, self._sequence, self._used = _COUNTERS.unpack(stored) if stored else (0, 0, 0)
        self.evictions = 0
        self.dropped = 0  # counted by whoever drops

    def finish(self) -> None:
        self._txn.put(_COUNTERS_KEY, _COUNTERS.pack(self._hand, self._sequence, self._used), db=self._db["counters"])

    # --- Records

    def get(self, key: bytes) -> Record | None:
        """The record that is there now. One whose slot has other contents, or that is too old, is removed."""
        value = self._txn.get(key, db=self._db["records"])
        if value is None:
            return None
        record = _unpack(value)
        if self._table.generation(record.start) == record.generation and record.stored_at >= self._expired_before:
            return record
        self.remove(key, record)
        return None

    def reserve(self, size: int, owner: bytes, row: int) -> tuple[int, int] | None:
        """A slot for `size` bytes, (start, generation), pending under the process's row; None if there is no room."""
        granules = self._granules_of(size)
        if granules > min(self._index._granules, SEGMENT_BYTES // self._index._granule_bytes):
            return None
        if owner != NO_OWNER and self._index._quota and not self._make_room_of(owner, size):
            return None
        patience = MOST_EVICTED * granules
        while (start := self._take_extent(granules)) is None:
            freed = self._evict_next() if patience > 0 else 0
            patience -= freed
            if not freed:
                return None
        self._txn.put(_START.pack(start), _PENDING.pack(granules, row, 0.0, size, owner), db=self._db["pending"])
        self._add_used(owner, size)
        return start, self._table.generation(start)

    def moment(self) -> int:
        """A number that grows with every record that is published and every owner that is forgotten."""
        return int(self._sequence)

    def publish(
        self,
        key: bytes,
        start: int,
        generation: int,
        size: int,
        checksum: int,
        owner: bytes,
        row: int,
        as_of: int,
        age_s: float,
    ) -> bool:
        """Makes a reserved slot a record. False if the key has one by now, the slot was taken back, or the owner was
        forgotten after the moment `as_of`."""
        if self._pending_of(start, row) is None:
            return False
        if self.get(key) or self._forgotten(owner) > as_of:
            self.abandon(start, row)
            return False
        self._txn.delete(_START.pack(start), db=self._db["pending"])
        self._table.take_visited(start)  # of what was there before
        sequence = self._sequence
        self._sequence += 1
        value = _RECORD.pack(start, generation, size, checksum, sequence, self._now - age_s, owner)
        self._txn.put(key, value, db=self._db["records"])
        self._txn.put(_SEQUENCE.pack(sequence), key, db=self._db["queue"])
        self._used += size
        if owner != NO_OWNER:
            self._txn.put(owner + _SEQUENCE.pack(sequence), key, db=self._db["owned"])
        return True

    def abandon(self, start: int, row: int) -> None:
        """Gives a reserved slot back that nothing writes into any more."""
        granules = self._pending_of(start, row)
        if granules is not None:
            self._discharge(start)
            self._txn.delete(_START.pack(start), db=self._db["pending"])
            self._table.retire(start)
            self.add_extent(start, granules)

    def _discharge(self, start: int) -> None:
        """A pending slot no longer counts as its owner's."""
        value = self._txn.get(_START.pack(start), db=self._db["pending"])
        assert value is not None
        *_, size, owner = _PENDING.unpack(value)
        self._add_used(owner, -size)

    def _forgotten(self, owner: bytes) -> int:
        return int.from_bytes(self._txn.get(owner, default=b"", db=self._db["forgotten"]), "little")

    def _pending_of(self, start: int, row: int) -> int | None:
        value = self._txn.get(_START.pack(start), db=self._db["pending"])
        if value is None:
            return None
        granules, its_row, *_ = _PENDING.unpack(value)
        return granules if its_row == row else None

    def remove(self, key: bytes, record: Record) -> None:
        """The key is gone at once, its slot as soon as nobody has it pinned."""
        if self._table.generation(record.start) == record.generation:
            self._table.retire(record.start)
        self._unlist(key, record)
        granules = self._granules_of(record.payload_bytes)
        if self._table.pinned(record.start):
            value = _PENDING.pack(granules, NOBODY, self._now, 0, NO_OWNER)
            self._txn.put(_START.pack(record.start), value, db=self._db["pending"])
        else:
            self.add_extent(record.start, granules)

    def forget(self, owner: bytes) -> int:
        """Removes all records of an owner, and what is under way of it when it arrives; returns their number."""
        self._sequence += 1
        self._txn.put(owner, self._sequence.to_bytes(8, "little"), db=self._db["forgotten"])
        keys = list(self._owned(owner))
        for key, record in keys:
            self.remove(key, record)
        return len(keys)

    def records(self) -> list[tuple[bytes, Record]]:
        with self._txn.cursor(self._db["records"]) as cursor:
            return [(bytes(key), _unpack(value)) for key, value in cursor]

    def _owned(self, owner: bytes) -> Iterator[tuple[bytes, Record]]:
        with self._txn.cursor(self._db["owned"]) as cursor:
            entries = []
            more = cursor.set_range(owner)
            while more and cursor.key()[: len(owner)] == owner:
                entries.append(bytes(cursor.value()))
                more = cursor.next()
        for key in entries:  # the oldest first
            yield key, _unpack(self._txn.get(key, db=self._db["records"]))

    def _unlist(self, key: bytes, record: Record) -> None:
        self._txn.delete(key, db=self._db["records"])
        sequence = _SEQUENCE.pack(record.sequence)
        self._txn.delete(sequence, db=self._db["queue"])
        self._used -= record.payload_bytes
        if record.owner != NO_OWNER:
            self._txn.delete(record.owner + sequence, db=self._db["owned"])
        self._add_used(record.owner, -record.payload_bytes)

    def _used_by(self, owner: bytes) -> int:
        return int.from_bytes(self._txn.get(owner, default=b"", db=self._db["owners"]), "little")

    def _add_used(self, owner: bytes, size: int) -> None:
        if owner == NO_OWNER:
            return
        used = self._used_by(owner) + size
        if used:
            self._txn.put(owner, used.to_bytes(8, "little"), db=self._db["owners"])
        else:
            self._txn.delete(owner, db=self._db["owners"])

    # --- Eviction

    def _evict(self, key: bytes, record: Record) -> bool:
        """Removes a record unless it is pinned."""
        if self._table.generation(record.start) == record.generation and not self._table.evict(record.start):
            return False
        self.remove(key, record)
        self.evictions += 1
        return True

    def _evict_next(self) -> int:
        """Evicts one record; how many granules it had, 0 if there is none that can go.

        SIEVE: from the hand on towards newer records, the first that nobody asked for since the hand was there last.
        Source: Zhang et al., "SIEVE is Simpler than LRU", NSDI 2024.
        """
        laps = 0
        with self._txn.cursor(self._db["queue"]) as cursor:
            found = cursor.set_range(_SEQUENCE.pack(self._hand))
            while True:
                if not found:
                    laps += 1
                    if laps > 2 or not cursor.first():
                        return 0
                sequence, key = map(bytes, cursor.item())
                record = _unpack(self._txn.get(key, db=self._db["records"]))
                spared = self._table.take_visited(record.start) and record.stored_at >= self._expired_before
                if not spared and self._evict(key, record):
                    self._hand = _SEQUENCE.unpack(sequence)[0] + 1
                    return self._granules_of(record.payload_bytes)
                found = cursor.next()

    def _make_room_of(self, owner: bytes, size: int) -> bool:
        """Evicts an owner's oldest records until `size` more bytes are within its quota."""
        quota = self._index._quota
        if size > quota:
            return False
        if self._used_by(owner) + size <= quota:
            return True
        for key, record in self._owned(owner):
            if self._evict(key, record) and self._used_by(owner) + size <= quota:
                return True
        return False

    # --- Room

    def _granules_of(self, size: int) -> int:
        return max(1, -(-size // self._index._granule_bytes))

    def _take_extent(self, granules: int) -> int | None:
        """The beginning of the smallest extent that suffices."""
        with self._txn.cursor(self._db["sizes"]) as cursor:
            if not cursor.set_range(_EXTENT.pack(granules, 0)):
                return None
            found: int
            start: int
            found, start = _EXTENT.unpack(cursor.key())
        self._drop_extent(start, found)
        if found > granules:
            self._put_extent(start + granules, found - granules)
        return start

    def add_extent(self, start: int, granules: int) -> None:
        """Frees an extent, joined with free neighbours of its segment."""
        segment = SEGMENT_BYTES // self._index._granule_bytes
        end = start + granules
        if end % segment and (following := self._txn.get(_START.pack(end), db=self._db["free"])):
            more = _START.unpack(following)[0]
            self._drop_extent(end, more)
            granules += more
        if start % segment:
            with self._txn.cursor(self._db["free"]) as cursor:
                if _at_or_before(cursor, _START.pack(start)):
                    before, size = _START.unpack(cursor.key())[0], _START.unpack(cursor.value())[0]
                    if before + size == start:
                        self._drop_extent(before, size)
                        start, granules = before, granules + size
        self._put_extent(start, granules)

    def _put_extent(self, start: int, granules: int) -> None:
        self._txn.put(_START.pack(start), _START.pack(granules), db=self._db["free"])
        self._txn.put(_EXTENT.pack(granules, start), b"", db=self._db["sizes"])

    def _drop_extent(self, start: int, granules: int) -> None:
        self._txn.delete(_START.pack(start), db=self._db["free"])
        self._txn.delete(_EXTENT.pack(granules, start), db=self._db["sizes"])

    # --- What the dead left

    def bury(self, rows: Iterable[int]) -> None:
        """The unpublished slots of dead processes are free after a while."""
        rows = set(rows)
        for start, granules, row, _ in self._pending():
            if row in rows:
                self._discharge(start)
                value = _PENDING.pack(granules, NOBODY, self._now + QUARANTINE_S, 0, NO_OWNER)
                self._txn.put(_START.pack(start), value, db=self._db["pending"])

    def reap(self) -> None:
        """Frees what waited long enough and is not pinned."""
        for start, granules, row, free_at in self._pending():
            if row == NOBODY and free_at <= self._now and not self._table.pinned(start):
                self._txn.delete(_START.pack(start), db=self._db["pending"])
                self.add_extent(start, granules)

    def _pending(self) -> list[tuple[int, int, int, float]]:
        """(start, granules, row, when it is free)"""
        with self._txn.cursor(self._db["pending"]) as cursor:
            return [(_START.unpack(key)[0], *_PENDING.unpack(value)[:3]) for key, value in cursor]

    def restart(self, shift_s: float) -> None:
        for start, granules, _, _ in self._pending():
            self._discharge(start)
            self._txn.delete(_START.pack(start), db=self._db["pending"])
            self.add_extent(start, granules)
        for key, record in self.records():
            self._table.set_generation(record.start, record.generation)
            moved = record._replace(stored_at=record.stored_at + shift_s)
            self._txn.put(key, _RECORD.pack(*moved), db=self._db["records"])


def _at_or_before(cursor: lmdb.Cursor, key: bytes) -> bool:
    """Moves to the last entry that is not behind `key`."""
    if not cursor.set_range(key):
        return bool(cursor.last())
    return cursor.key() == key or bool(cursor.prev())
