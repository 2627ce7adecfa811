"""shm: and file: stores: payloads in one preallocated file that all processes of a user share, without a daemon.

The store's directory holds `slab`, the payloads; `table`, the index (see csrc/slab_index.h) and the pins and
generations of all slots (see csrc/slab_table.h); and `lock`: each process that has the store open keeps one byte of it
locked, its row. A slot is reserved, filled, and then published; if a process dies in between, its slot rests for a
while and is then free again.
"""

from __future__ import annotations

import atexit
import errno
import os
import shutil
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, TypeVar

import numpy as np

from lmcache_mm import _C
from lmcache_mm.stores.arguments import (
    check_forgotten,
    check_keys,
    check_process,
    checked_checksums,
    checked_owner,
    checked_records,
    writable,
)
from lmcache_mm.stores.local.slab_files import (
    LEAST_GRANULE_BYTES,
    ROWS,
    SEGMENT_BYTES,
    WRITING,
    boot_clock,
    boot_id,
    check_version,
    granules_of,
    locked_by_another,
    map_file,
    no_store,
    opening,
    remove_files,
    try_lock,
    unlock,
)

if TYPE_CHECKING:
    from lmcache_mm.stores.arguments import Buffer

T = TypeVar("T")
Terms = tuple[float, float, float, float, int]  # see _C.SlabIndex

PUT_WAIT_S = 0.25  # how long a put waits for another process's change before it is dropped
CHANGE_WAIT_S = 5.0  # how long a call that must change the index waits before it raises


@dataclass(frozen=True, slots=True)
class Slot:
    """A place in the slab, reserved for writing or lent for reading. Its bytes stay there until it is given back."""

    key: bytes
    start: int  # its first granule
    generation: int
    payload_bytes: int
    checksum: int  # if it is lent
    owner: bytes
    as_of: int = 0  # if it is reserved, see `Store.put`
    age_s: float = 0.0


# Stores that this process has open, by directory.
_open: dict[str, SlabStore] = {}
_inherited: list[SlabStore] = []  # the parent's stores, kept so that this process does not close them
_registry = threading.RLock()


def _after_fork_in_child() -> None:
    global _registry  # noqa: PLW0603
    _registry = threading.RLock()  # another thread of the parent may have held it
    _inherited.extend(_open.values())
    _open.clear()


os.register_at_fork(after_in_child=_after_fork_in_child)


@atexit.register
def _close_all() -> None:
    """Threads that return from C++ during interpreter exit would end the process."""
    for store in list(_open.values()):
        store._opened = 1
        store.close()


class SlabStore:
    """The common part of shm: and file: stores; see `Store` and `open`. Each process has one instance per directory,
    with a reference count: every open needs a close."""

    scheme: ClassVar[str]
    local = True
    read_only = False
    outlives_restarts = False  # restarts of the machine

    @classmethod
    def open(cls, directory: Path, capacity: int | None, quota: int = 0, ttl_s: float = 0) -> SlabStore:
        """Opens the store in `directory`; creates it if there is none and `capacity` is given.

        quota: the most payload bytes per owner. ttl_s: how long a record may be used. Both apply to this process's puts
        and gets. Raises ValueError if the store has another capacity or version, PermissionError if other users can
        access the directory or files, RuntimeError if the store is open in 64 processes, OSError if there is no room,
        TimeoutError, naming the process, if another process blocks the opening.
        """
        path = os.path.realpath(directory)
        with _registry:
            store = _open.get(path)
            if store is None:
                store = _open[path] = cls(Path(path), capacity, quota, ttl_s)
            elif not isinstance(store, cls):
                raise ValueError(f"store: {path} is open in this process as {store.scheme}:")
            elif not store._fits(capacity) or (quota, ttl_s) != (store._quota, store._ttl_s):
                raise ValueError(f"store: {path} is open in this process with other options")
            store._opened += 1
            return store

    def __init__(self, directory: Path, capacity: int | None, quota: int, ttl_s: float) -> None:
        self.directory = directory
        self._quota, self._ttl_s = quota, ttl_s
        self._pid = os.getpid()
        self._opened = 0
        names = ("hits", "misses", "corrupt", "puts", "dropped_puts", "evictions", "errors")
        self._counts: Counter[str] = Counter(dict.fromkeys(names, 0))
        self._counts_lock = threading.Lock()
        self._burying = threading.Lock()
        self._looked_for_dead = 0.0
        self._unreturned: list[Slot] = []  # reserved slots that could not be given back
        self._waits = True  # for other processes' changes; False while one of them is stuck
        if capacity is not None and capacity < LEAST_GRANULE_BYTES:
            raise ValueError(f"capacity: expected at least {LEAST_GRANULE_BYTES} bytes, got {capacity}")
        if capacity is None and not os.path.lexists(directory):
            raise no_store(directory)
        new = not os.path.lexists(directory)
        with opening(directory) as self._lock_fd:
            if any(store._lock_fd == self._lock_fd for store in _open.values()):
                raise ValueError(f"store: {directory} is open in this process under another name")
            try:
                self._take_over(capacity)
            except OSError:
                if new and not (directory / "slab").exists():  # nothing of it stays, as after `remove`
                    with suppress(OSError):
                        _remove_directory(directory)
                raise
        try:
            self._open_slab()
        except BaseException:
            self._leave()
            raise

    # --- Opening and closing

    def _take_over(self, capacity: int | None) -> None:
        known = check_version(self.directory)
        if not (self.directory / "slab").exists():
            if capacity is None:
                raise no_store(self.directory)
            self._make(capacity)
        self.capacity = (self.directory / "slab").stat().st_size
        self._granules, self._granule_bytes = known[:2] if known else granules_of(self.capacity)
        if self.capacity != self._granules * self._granule_bytes or not self.capacity:
            raise ValueError(f"store: {self.directory / 'slab'} has changed its size; remove the store")
        if not self._fits(capacity):
            raise ValueError(
                f"store: {self.directory} has capacity={self.capacity}, got {capacity}: open it with its own, or "
                "remove it with `lmcache-mm clear`"
            )
        used = [row for row in range(ROWS) if locked_by_another(self._lock_fd, row)]
        if used and known and known[2] != boot_id():
            raise RuntimeError(
                f"store: {self.directory} is open on another machine, whose shared memory is not this one's"
            )
        row = next((row for row in range(ROWS) if row not in used and try_lock(self._lock_fd, row)), None)
        if row is None:
            raise RuntimeError(f"store: {self.directory} is open in {ROWS} processes, the most that it allows")
        self._row = row
        try:
            shape = (self._granules, self._granule_bytes, SEGMENT_BYTES // self._granule_bytes)
            table = self.directory / "table"
            if used and not table.exists():
                raise RuntimeError(f"store: {table} is gone, and other processes have it open: end them first")
            try:
                self._table = map_file(table, _C.slab_table_bytes(*shape), make=not table.exists())
            except OSError as error:
                raise self._no_room(error, self.capacity) from None
            address = np.frombuffer(self._table, dtype=np.uint8).ctypes.data
            pages = _C.SlabPages(address, len(self._table))
            self._index = _C.SlabIndex(address, pages, *shape, self._lock_fd, WRITING, row)
            try:
                self._index.open(boot_id(), self.outlives_restarts, self._terms(CHANGE_WAIT_S))
            except TimeoutError as error:
                raise TimeoutError(f"store: {self.directory} cannot be opened: {error}") from None
        except BaseException:
            unlock(self._lock_fd, row)
            raise

    def _fits(self, capacity: int | None) -> bool:
        return capacity is None or granules_of(capacity) == (self._granules, self._granule_bytes)

    def _make(self, capacity: int) -> None:
        """Makes new files. The slab comes last: without it there is no store."""
        granules, granule_bytes = granules_of(capacity)
        shape = (granules, granule_bytes, SEGMENT_BYTES // granule_bytes)
        remove_files(self.directory)
        try:
            map_file(self.directory / "table", _C.slab_table_bytes(*shape), make=True).close()
            map_file(self.directory / "slab.new", granules * granule_bytes, make=True).close()
        except OSError as error:
            remove_files(self.directory)
            raise self._no_room(error, capacity) from None
        os.rename(self.directory / "slab.new", self.directory / "slab")

    def _no_room(self, error: OSError, capacity: int) -> OSError:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            return error
        free = shutil.disk_usage(self.directory).free
        text = f"no room for {capacity} bytes in {self.directory}, where {free} bytes are free: lower capacity="
        return OSError(error.errno, text)

    def _open_slab(self) -> None:
        raise NotImplementedError

    def _close_slab(self) -> None:
        raise NotImplementedError

    def close(self) -> None:
        """The last close of the process gives back everything: pins, reserved slots, its row."""
        with _registry:
            if self._opened == 0 or os.getpid() != self._pid:
                return
            self._opened -= 1
            if self._opened:
                return
            del _open[str(self.directory)]
            self._close_slab()
            self._leave()

    def _leave(self) -> None:
        with suppress(OSError):  # then the next process cleans up
            self._index.close(self._terms(PUT_WAIT_S))
        unlock(self._lock_fd, self._row)

    def _check(self) -> None:
        check_process(self._pid)
        if not self._opened:
            raise RuntimeError("store: it is closed")

    # --- The dead

    def _look_for_dead(self) -> None:
        """Takes back what dead processes held."""
        # One thread at a time: rows that one thread has locked would look free to another.
        if not self._burying.acquire(blocking=False):
            return
        try:
            self._looked_for_dead = time.monotonic()
            taken = self._index.rows_taken()
            rows = [row for row in range(ROWS) if taken >> row & 1 and row != self._row]
            dead = [row for row in rows if try_lock(self._lock_fd, row)]
            try:
                if dead:
                    self._change(lambda terms: self._index.bury(sum(1 << row for row in dead), terms))
            finally:
                for row in dead:
                    unlock(self._lock_fd, row)
        finally:
            self._burying.release()

    # --- Changes

    def _terms(self, wait_s: float) -> Terms:
        return boot_clock(), time.time(), wait_s, self._ttl_s, self._quota

    def _change(self, work: Callable[[Terms], T], drops: int = 0) -> T | None:
        """Returns work's result; None if another process blocks changes of the index for too long: then `drops` puts
        are counted as dropped, and later calls do not wait until a change succeeds again."""
        try:
            result = work(self._terms(PUT_WAIT_S if self._waits else 0.0))
        except OSError:
            self._waits = False
            self._count("errors")
            self._count("dropped_puts", drops)
            return None
        self._waits = True
        return result

    def _must_change(self, what: str, work: Callable[[Terms], T]) -> T:
        """Returns work's result; after CHANGE_WAIT_S raises RuntimeError, naming the process that blocks it."""
        try:
            return work(self._terms(CHANGE_WAIT_S))
        except OSError as error:
            self._count("errors")
            raise RuntimeError(f"{what}: the index in {self.directory} cannot be changed: {error}") from None

    # --- Records

    def contains(self, keys: Sequence[bytes], peek: bool = False) -> list[bool]:
        self._check()
        return self._index.contains(keys, peek, boot_clock(), self._ttl_s)

    def lend(
        self, keys: Sequence[bytes], sizes: Sequence[int], owner: bytes = b"", peek: bool = False
    ) -> list[Slot | None]:
        """Pins the records of `keys` that have these sizes: their bytes stay in place until `release`. They are not
        verified: the reader must compare the checksum, and call `discard` if it differs."""
        self._check()
        found = self._index.lend(keys, sizes, peek, boot_clock(), self._ttl_s)
        slots = [
            Slot(key, one[0], one[1], size, one[2], one[3]) if one else None
            for key, size, one in zip(keys, sizes, found, strict=True)
        ]
        self._count("misses", slots.count(None))
        self._count("hits", len(slots) - slots.count(None))
        return slots

    def hold(self, keys: Sequence[bytes]) -> Callable[[], None]:
        self._check()
        held = self._index.hold(keys, boot_clock(), self._ttl_s)

        def release() -> None:
            if os.getpid() != self._pid:
                return  # a forked child has no pins
            with self._counts_lock:
                starts, held[:] = held[:], []
            self._index.unpin(starts)  # does nothing after the store was closed

        return release

    def release(self, slots: Sequence[Slot]) -> None:
        """Gives lent slots back. Nothing may read them after that, including transfers by a device."""
        self._check()
        self._index.unpin([slot.start for slot in slots])

    def discard(self, slot: Slot) -> None:
        """Removes the record of a lent slot whose checksum is wrong, and no longer counts it as a hit. The slot stays
        lent."""
        self._count("corrupt")
        self._count("hits", -1)
        self._change(lambda terms: self._index.discard(slot.key, slot.start, slot.generation, terms))

    def reserve(
        self,
        keys: Sequence[bytes],
        sizes: Sequence[int],
        owner: bytes = b"",
        as_of: int | None = None,
        age_s: float = 0.0,
    ) -> list[Slot | None]:
        """Slots to write payloads to; None for keys that are there already, and where there is no room (counted). Pass
        each slot to `publish` or `abandon`. `as_of`, `age_s`: see `Store.put`."""
        self._check()
        check_keys(keys)
        owner = checked_owner(owner)
        if time.monotonic() - self._looked_for_dead > 1:
            self._look_for_dead()
        with self._counts_lock:
            given_back, self._unreturned = self._unreturned, []
        places = [(slot.start, slot.generation) for slot in given_back]
        reserved = self._change(lambda terms: self._index.reserve(keys, sizes, owner, places, terms), drops=len(keys))
        if reserved is None:
            self._return_later(given_back)
            return [None] * len(keys)
        found, moment, dropped, evictions = reserved
        self._count("evictions", evictions)
        self._count("dropped_puts", dropped)
        moment = moment if as_of is None else as_of
        return [
            Slot(key, *place, size, 0, owner, moment, age_s) if place else None
            for key, size, place in zip(keys, sizes, found, strict=True)
        ]

    def publish(self, slots: Sequence[Slot], checksums: Sequence[int]) -> None:
        """Makes reserved slots visible to all processes, once they are filled with payloads of these checksums."""
        self._check()
        checksums = checked_checksums(checksums, len(slots))
        puts = [
            (slot.key, slot.start, slot.generation, checksum, slot.as_of, slot.age_s)
            for slot, checksum in zip(slots, checksums, strict=True)
        ]
        published = self._change(lambda terms: self._index.publish(puts, terms), drops=len(slots))
        if published is None:
            self._return_later(slots)
        else:
            self._count("puts", published)

    def abandon(self, slots: Sequence[Slot]) -> None:
        """Gives reserved slots back. Nothing may write to them after that."""
        self._check()
        places = [(slot.start, slot.generation) for slot in slots]
        if self._change(lambda terms: self._index.abandon(places, terms)) is None:
            self._return_later(slots)

    def _return_later(self, slots: Sequence[Slot]) -> None:
        with self._counts_lock:
            self._unreturned += slots

    def get_into(
        self, keys: Sequence[bytes], buffers: Sequence[Buffer], owner: bytes = b"", peek: bool = False
    ) -> list[bool]:
        arrays = writable(buffers, len(keys))
        slots = self.lend(keys, [array.nbytes for array in arrays], owner, peek)
        lent = [(slot, array) for slot, array in zip(slots, arrays, strict=True) if slot]
        try:
            good = iter(self._read([slot for slot, _ in lent], [array for _, array in lent]))
        finally:
            self.release([slot for slot, _ in lent])
        return [slot is not None and next(good) for slot in slots]

    def put(
        self,
        keys: Sequence[bytes],
        buffers: Sequence[Buffer],
        owner: bytes = b"",
        checksums: Sequence[int] | None = None,
        as_of: int | None = None,
        age_s: float = 0.0,
    ) -> None:
        arrays, checksums = checked_records(keys, buffers, owner, checksums)
        slots = self.reserve(keys, [array.nbytes for array in arrays], owner, as_of, age_s)
        places = [i for i, slot in enumerate(slots) if slot]
        reserved = [slot for slot in slots if slot]
        if not reserved:
            return
        given = None if checksums is None else [checksums[i] for i in places]
        try:
            sums = self._write(reserved, [arrays[i] for i in places], given)
        except BaseException as error:
            self._count("errors")
            self._count("dropped_puts", len(reserved))
            self.abandon(reserved)
            if not isinstance(error, OSError):
                raise
        else:
            self.publish(reserved, sums)

    def _read(self, slots: Sequence[Slot], arrays: Sequence[np.ndarray]) -> list[bool]:
        """Fills arrays from slots. Returns which match their checksum; discards the others."""
        raise NotImplementedError

    def _write(
        self, slots: Sequence[Slot], arrays: Sequence[np.ndarray], checksums: Sequence[int] | None
    ) -> Sequence[int]:
        """Fills slots from arrays. Returns their checksums: the given ones, else computed."""
        raise NotImplementedError

    def delete(self, keys: Sequence[bytes]) -> None:
        self._check()
        self._must_change("delete", lambda terms: self._index.remove(keys, terms))

    def forget(self, owner: bytes) -> int:
        """Removes all records of an owner (16 bytes); returns their number."""
        self._check()
        check_forgotten(owner)
        return self._must_change("forget", lambda terms: self._index.forget(owner, terms))

    def moment(self) -> int:
        self._check()
        return self._index.moment()

    def ages(self, keys: Sequence[bytes]) -> list[float]:
        self._check()
        return self._index.ages(keys, boot_clock(), self._ttl_s)

    def clear(self) -> int:
        """Removes all records; returns their number."""
        self._check()
        return self._must_change("clear", self._index.clear)

    def flush(self) -> None:
        """Every put is visible when it returns."""
        self._check()

    def stats(self) -> Mapping[str, int]:
        self._check()
        processes = 1 + sum(locked_by_another(self._lock_fd, row) for row in range(ROWS))
        with self._counts_lock:
            return {**self._counts, **self._index.sizes(), "processes": processes}

    def _count(self, name: str, by: int = 1) -> None:
        with self._counts_lock:
            self._counts[name] += by


def remove(directory: Path) -> bool:
    """Removes the store in `directory`, and the directory; does nothing and returns False if a process has it open."""
    with _registry:
        if os.path.realpath(directory) in _open:
            return False
        with opening(directory) as fd:
            if any(store._lock_fd == fd for store in _open.values()):
                return False
            if any(locked_by_another(fd, row) for row in range(ROWS)):
                return False
            remove_files(directory)
            _remove_directory(directory)
    return True


def _remove_directory(directory: Path) -> None:
    """Removes the lock and the directory of a store without other files. The caller holds the lock."""
    (directory / "lock").unlink()
    directory.rmdir()
