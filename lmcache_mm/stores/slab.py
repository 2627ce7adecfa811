"""shm: and file: stores: payloads in one preallocated file that all processes of a user share, without a daemon.

In the store's directory: `slab`, the payloads; `index`, an LMDB environment (see slab_index.py); `table`, a header and
the pins and generations of all slots (see csrc/slab_table.h); `lock`, of which every process that has the store open
locks one byte, its row, for as long as it lives. A slot is allocated in one transaction, filled, and published in
another; whoever dies in between leaves a slot that rests for a while and is free again.
"""

from __future__ import annotations

import atexit
import errno
import math
import mmap
import os
import shutil
import struct
import threading
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import lmdb
import numpy as np
from blake3 import blake3

from lmcache_mm import _C, ops
from lmcache_mm.lane import Call
from lmcache_mm.stores.arguments import bytes_of, check_keys, check_process, checked_owner, writable
from lmcache_mm.stores.slab_files import (
    LEAST_GRANULE_BYTES,
    REGISTERING,
    ROWS,
    SAVING,
    allocate,
    boot_id,
    check_file,
    granules_of,
    holding,
    locked_by_another,
    map_file,
    no_store,
    open_env,
    opening,
    pid_namespace,
    read_header,
    remove_files,
    sync_directory,
    try_lock,
    unlock,
    write_header,
)
from lmcache_mm.stores.slab_index import SEGMENT_BYTES, Change, Index, boot_clock

if TYPE_CHECKING:
    from lmcache_mm.stores import Buffer

T = TypeVar("T")

SLOT_STATE_BYTES = 16
PAGE_BYTES = 4096
PIECE_BYTES = 4 << 20  # of one read or write on a disk
IO_THREADS = 8
CHECKPOINT_S = 60.0
MAP_BYTES = 64 << 20

_ROWS_AT = 128  # in the header: which rows have been taken and not given back, a byte each


@dataclass(frozen=True, slots=True)
class Slot:
    """A place in the slab: reserved to be filled, or lent to be read. Its bytes stay there until it is given back."""

    key: bytes
    start: int  # its first granule
    generation: int
    payload_bytes: int
    checksum: int  # of a record that is lent
    owner: bytes
    as_of: int = 0  # of one that is reserved, see `Store.put`
    age_s: float = 0.0


# Stores that this process has open, by directory.
_open: dict[str, SlabStore] = {}
_inherited: list[SlabStore] = []  # a parent's: kept, so that nothing of theirs is closed here
_registry = threading.RLock()


def _before_fork() -> None:
    _registry.acquire()
    for store in _open.values():
        store._index.pause()


def _after_fork_in_parent() -> None:
    for store in _open.values():
        store._index.resume()
    _registry.release()


def _after_fork_in_child() -> None:
    for store in _open.values():
        store._index.resume()
        store._env.close()  # the child's view of it: else lmdb takes it for open in this process
    _inherited.extend(_open.values())
    _open.clear()
    _registry.release()


os.register_at_fork(before=_before_fork, after_in_parent=_after_fork_in_parent, after_in_child=_after_fork_in_child)


@atexit.register
def _close_all() -> None:
    """Threads that come back from C++ while the interpreter ends would end the process."""
    for store in list(_open.values()):
        store._opened = 1
        store.close()


class SlabStore:
    """What shm: and file: stores have in common; see `Store` and `open`. One instance a process and directory, counted:
    each open asks for one close."""

    scheme: ClassVar[str]
    local = True
    read_only = False

    @classmethod
    def open(cls, directory: Path, capacity: int | None, quota: int = 0, ttl_s: float = 0) -> SlabStore:
        """Opens the store in `directory`, and makes it if there is none and `capacity` is given.

        quota: most payload bytes of one owner. ttl_s: how long a record may be used. Both hold for what this process
        puts and gets. Raises ValueError for another capacity than the store has or a store of another version,
        PermissionError where directory or files are not the user's alone, RuntimeError for a store that is open in
        another PID namespace or in 64 processes, OSError where there is no room.
        """
        path = os.path.realpath(directory)
        with _registry:
            store = _open.get(path)
            if store is None:
                try:
                    store = _open[path] = cls(Path(path), capacity, quota, ttl_s)
                except lmdb.Error as error:
                    raise RuntimeError(f"store: the index in {path} cannot be opened: {error}; remove it") from error
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
        if capacity is not None and capacity < LEAST_GRANULE_BYTES:
            raise ValueError(f"capacity: expected at least {LEAST_GRANULE_BYTES} bytes, got {capacity}")
        if capacity is None and not os.path.lexists(directory):
            raise no_store(directory)
        with opening(directory) as self._lock_fd:
            if any(store._lock_fd == self._lock_fd for store in _open.values()):
                raise ValueError(f"store: {directory} is open in this process under another name")
            self._take_over(capacity)
        try:
            self._open_slab()
        except BaseException:
            self._leave()
            raise

    # --- Opening and closing

    def _take_over(self, capacity: int | None) -> None:
        header = read_header(self.directory)
        if header is None:
            if capacity is None:
                raise no_store(self.directory)
            header = self._make(capacity)
        granule_bytes, granules, made_in_boot, made_in_namespace = header
        self.capacity = granules * granule_bytes
        self._granules, self._granule_bytes = granules, granule_bytes
        if not self._fits(capacity):
            raise ValueError(
                f"store: {self.directory} has capacity={self.capacity}, got {capacity}: open it with its own, or "
                "remove it with `python -m lmcache_mm clear`"
            )
        used = [row for row in range(ROWS) if locked_by_another(self._lock_fd, row)]
        if used and made_in_boot != boot_id():
            raise RuntimeError(
                f"store: {self.directory} is open on another machine, whose shared memory is not this one's"
            )
        if used and made_in_namespace != pid_namespace():
            raise RuntimeError(
                f"store: {self.directory} is open in another PID namespace, which its index does not stand"
            )
        if (self.directory / "slab").stat().st_size != self.capacity:
            raise ValueError(
                f"store: {self.directory / 'slab'} does not have its {self.capacity} bytes; remove the store"
            )
        self._table_map = map_file(self.directory / "table", PAGE_BYTES + granules * SLOT_STATE_BYTES)
        slots = np.frombuffer(self._table_map, dtype=np.uint8)[PAGE_BYTES:]
        restarted = made_in_boot != boot_id()
        if restarted:
            slots[:] = 0
            shift = self._restore_index()
        if not used:  # nobody else has it open: whatever LMDB keeps of processes is of dead ones
            (self.directory / "index" / "lock.mdb").unlink(missing_ok=True)
        row = next((row for row in range(ROWS) if row not in used and try_lock(self._lock_fd, row)), None)
        if row is None:
            raise RuntimeError(f"store: {self.directory} is open in {ROWS} processes, which is the most that it takes")
        self._row = row
        try:
            self._env = open_env(self.directory / "index", granules)
            self._env.reader_check()  # what dead readers keep of the index is not free for anybody
            self._table = _C.SlabTable(slots.ctypes.data, row)
            self._index = Index(self._env, self._table, granules, granule_bytes, self._quota, self._ttl_s)
            self._index.make()
            if restarted:
                self._index.recover(shift)
            self._bury([row])
            self._table_map[_ROWS_AT + row] = 1
            write_header(self.directory, granule_bytes, granules)
        except BaseException:
            if hasattr(self, "_env"):
                self._env.close()
            unlock(self._lock_fd, row)
            raise

    def _fits(self, capacity: int | None) -> bool:
        return capacity is None or granules_of(capacity) == (self._granules, self._granule_bytes)

    def _make(self, capacity: int) -> tuple[int, int, bytes, int]:
        """Makes the files anew. The header comes last: without it there is no store."""
        granules, granule_bytes = granules_of(capacity)
        remove_files(self.directory)
        try:
            allocate(self.directory / "table", PAGE_BYTES + granules * SLOT_STATE_BYTES)
            allocate(self.directory / "slab", granules * granule_bytes)
        except OSError as error:
            remove_files(self.directory)
            free = shutil.disk_usage(self.directory).free
            raise OSError(
                error.errno,
                f"no room for {capacity} bytes in {self.directory}, where {free} bytes are free: lower capacity=",
            ) from None
        (self.directory / "index").mkdir(mode=0o700)
        write_header(self.directory, granule_bytes, granules)
        return granule_bytes, granules, boot_id(), pid_namespace()

    def _restore_index(self) -> float:
        """After a restart of the machine, when the index may be torn: what of it was saved. Returns by how much the
        boot clock of now is ahead."""
        shutil.rmtree(self.directory / "index", ignore_errors=True)
        (self.directory / "index").mkdir(mode=0o700, exist_ok=True)
        return 0.0

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
        with suppress(lmdb.Error):
            self._bury([self._row])
        self._env.close()
        unlock(self._lock_fd, self._row)

    def _check(self) -> None:
        check_process(self._pid)
        if not self._opened:
            raise RuntimeError("store: it is closed")

    # --- The dead

    def _bury(self, rows: Sequence[int]) -> None:
        """Takes back what the processes of these rows held; nobody may take one of the rows meanwhile."""
        for row in rows:
            self._table.clear_row(row, self._granules)
        with self._index.change() as change:
            change.bury(rows)
        for row in rows:
            self._table_map[_ROWS_AT + row] = 0

    def _look_for_dead(self) -> None:
        """Takes back what processes held that are no more."""
        # One thread at a time: to a second one the rows that the first has locked look free too.
        if not self._burying.acquire(blocking=False):
            return
        try:
            self._looked_for_dead = time.monotonic()
            self._env.reader_check()
            taken = [row for row in range(ROWS) if self._table_map[_ROWS_AT + row] and row != self._row]
            dead = [row for row in taken if try_lock(self._lock_fd, row)]
            try:
                if dead:
                    self._bury(dead)
            finally:
                for row in dead:
                    unlock(self._lock_fd, row)
        except lmdb.Error:
            self._count("errors")
        finally:
            self._burying.release()

    # --- Records

    def contains(self, keys: Sequence[bytes], peek: bool = False) -> list[bool]:
        self._check()
        check_keys(keys)
        places = self._read_index(self._index.places, keys) or [None] * len(keys)
        there = [place for place in places if place]
        if peek:
            current = iter([self._table.generation(start) == generation for start, generation in there])
        else:
            current = iter(self._table.touch(there))
        return [place is not None and next(current) for place in places]

    def _read_index(self, look: Callable[..., T], *arguments: Any) -> T | None:
        """What `look` finds in the index; None, counted, where it cannot be read."""
        try:
            return look(*arguments)
        except lmdb.Error:
            self._count("errors")
            return None

    def lend(
        self, keys: Sequence[bytes], sizes: Sequence[int], owner: bytes = b"", peek: bool = False
    ) -> list[Slot | None]:
        """The records of `keys` that have these sizes, pinned: their bytes stay in place until `release`. What is lent
        has not been verified: whoever reads it compares its checksum, and calls `discard` if it is another."""
        self._check()
        check_keys(keys)
        records = self._read_index(self._index.find, keys) or [None] * len(keys)
        wanted = [r if r and r.payload_bytes == size else None for r, size in zip(records, sizes, strict=True)]
        pinned = iter(self._table.pin([(record.start, record.generation) for record in wanted if record]))
        slots = [
            Slot(key, record.start, record.generation, record.payload_bytes, record.checksum, record.owner)
            if record and next(pinned)
            else None
            for key, record in zip(keys, wanted, strict=True)
        ]
        if not peek:
            self._table.touch([(slot.start, slot.generation) for slot in slots if slot])
        self._count("misses", slots.count(None))
        self._count("hits", len(slots) - slots.count(None))
        return slots

    def hold(self, keys: Sequence[bytes]) -> Callable[[], None]:
        self._check()
        check_keys(keys)
        records = [record for record in self._read_index(self._index.find, keys) or () if record]
        pinned = self._table.pin([(record.start, record.generation) for record in records])
        starts = [record.start for record, held in zip(records, pinned, strict=True) if held]
        return lambda: self._table.unpin(starts)

    def release(self, slots: Sequence[Slot]) -> None:
        """Gives lent slots back. Nothing may read them any more, transfers by a device included."""
        self._check()
        self._table.unpin([slot.start for slot in slots])

    def discard(self, slot: Slot) -> None:
        """Removes the record of a lent slot that did not have its checksum, which is no hit then. The slot stays
        lent."""
        self._count("corrupt")
        self._count("hits", -1)

        def work(change: Change) -> None:
            record = change.get(slot.key)
            if record and (record.start, record.generation) == (slot.start, slot.generation):
                change.remove(slot.key, record)

        self._change(work)

    def reserve(
        self,
        keys: Sequence[bytes],
        sizes: Sequence[int],
        owner: bytes = b"",
        as_of: int | None = None,
        age_s: float = 0.0,
    ) -> list[Slot | None]:
        """Places to write payloads to, None for keys that are there already and where there is no room (counted).
        To be published or abandoned. `as_of`, `age_s`: see `Store.put`."""
        self._check()
        check_keys(keys)
        owner = checked_owner(owner)
        if time.monotonic() - self._looked_for_dead > 1:
            self._look_for_dead()
        with self._counts_lock:
            given_back, self._unreturned = self._unreturned, []

        def work(change: Change) -> list[Slot | None]:
            change.reap()
            for slot in given_back:
                change.abandon(slot.start, self._row)
            slots: list[Slot | None] = []
            for key, size in zip(keys, sizes, strict=True):
                place = None
                if not change.get(key):
                    place = change.reserve(size, owner, self._row)
                    if place is None:
                        change.dropped += 1
                moment = change.moment() if as_of is None else as_of
                slots.append(None if place is None else Slot(key, *place, size, 0, owner, moment, age_s))
            return slots

        slots = self._change(work, drops=len(keys))
        if slots is None:
            self._return_later(given_back)
            return [None] * len(keys)
        return slots

    def publish(self, slots: Sequence[Slot], checksums: Sequence[int]) -> None:
        """Makes reserved slots, filled with payloads of these checksums, visible to all processes."""
        self._check()

        def work(change: Change) -> int:
            # Records come as prefixes, shortest first, and a chunk is of no use without those before it: it goes first.
            return sum(
                change.publish(
                    *(slot.key, slot.start, slot.generation, slot.payload_bytes, checksum, slot.owner, self._row),
                    slot.as_of,
                    slot.age_s,
                )
                for slot, checksum in reversed(list(zip(slots, checksums, strict=True)))
            )

        published = self._change(work, drops=len(slots))
        if published is None:
            self._return_later(slots)
        else:
            self._count("puts", published)

    def abandon(self, slots: Sequence[Slot]) -> None:
        """Gives reserved slots back. Nothing may write to them any more."""
        self._check()

        def work(change: Change) -> bool:
            for slot in slots:
                change.abandon(slot.start, self._row)
            return True

        if not self._change(work):
            self._return_later(slots)

    def _return_later(self, slots: Sequence[Slot]) -> None:
        with self._counts_lock:
            self._unreturned += slots

    def _change(self, work: Callable[[Change], T], drops: int = 0) -> T | None:
        """work's result, in a transaction; None where the index cannot be written, `drops` puts being dropped then."""
        try:
            with self._index.change() as change:
                result = work(change)
        except lmdb.Error as error:
            if isinstance(error, lmdb.MapFullError):
                self._env.reader_check()  # for the next one
            self._count("errors")
            self._count("dropped_puts", drops)
            return None
        self._count("evictions", change.evictions)
        self._count("dropped_puts", change.dropped)
        return result

    def get_into(
        self, keys: Sequence[bytes], buffers: Sequence[Buffer], owner: bytes = b"", peek: bool = False
    ) -> list[bool]:
        arrays = writable(buffers)
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
        arrays = [bytes_of(buffer) for buffer in buffers]
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
        """Fills arrays from slots; which have their checksum. The others are discarded."""
        raise NotImplementedError

    def _write(
        self, slots: Sequence[Slot], arrays: Sequence[np.ndarray], checksums: Sequence[int] | None
    ) -> Sequence[int]:
        """Fills slots from arrays; their checksums, those given or else computed."""
        raise NotImplementedError

    def delete(self, keys: Sequence[bytes]) -> None:
        self._check()
        check_keys(keys)

        def work(change: Change) -> None:
            for key in keys:
                if record := change.get(key):
                    change.remove(key, record)

        self._change(work)

    def forget(self, owner: bytes) -> int:
        """Removes all records of an owner (16 bytes); returns their number."""
        self._check()
        if not owner:
            raise ValueError("owner: expected 16 bytes, got none")
        checked = checked_owner(owner)
        removed = self._change(lambda change: change.forget(checked))
        if removed is None:
            raise RuntimeError(f"forget: the index in {self.directory} cannot be written")
        return removed

    def moment(self) -> int:
        self._check()
        return self._read_index(self._index.moment) or 0

    def ages(self, keys: Sequence[bytes]) -> list[float]:
        self._check()
        return self._read_index(self._index.ages, keys) or [math.inf] * len(keys)

    def clear(self) -> int:
        """Removes all records; returns their number."""
        self._check()

        def work(change: Change) -> int:
            records = change.records()
            for key, record in records:
                change.remove(key, record)
            change.reap()
            return len(records)

        removed = self._change(work)
        if removed is None:
            raise RuntimeError(f"clear: the index in {self.directory} cannot be written")
        return removed

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


class ShmStore(SlabStore):
    """shm: the slab is a file in memory, mapped by every process: slots are read and written in place."""

    scheme = "shm"

    def _open_slab(self) -> None:
        self._slab = np.frombuffer(map_file(self.directory / "slab", self.capacity), dtype=np.uint8)
        self._registered_on: int | None = None
        self._closing, self._mapped = threading.Event(), threading.Event()
        self._mapper = threading.Thread(target=self._map_pages, name="lmcache_mm shm", daemon=True)
        self._mapper.start()

    def _map_pages(self) -> None:
        """Looks at every page once, in the background: a page that is first written to costs a fault of its own, one
        that is first read is mapped with its neighbours (380 ms a GiB against 65, measured)."""
        for begin in range(0, self.capacity, MAP_BYTES):
            if self._closing.is_set():
                return
            piece = self._slab[begin : begin + MAP_BYTES]
            _C.read_pages(piece.ctypes.data, piece.nbytes)
        self._mapped.set()

    def _close_slab(self) -> None:
        self._closing.set()
        self._mapper.join()
        if self._registered_on is not None:
            with suppress(RuntimeError):  # the device is gone, and with it what it had pinned
                _C.cuda_unregister_host(self._registered_on, self._slab.ctypes.data, self.capacity, SEGMENT_BYTES)
        del self._slab  # unmapped when the last view is gone

    def register(self, device: int) -> None:
        """Pins the slab for transfers to and from GPUs, until the store is closed; once a process, however often it is
        asked for. Takes long, some seconds for tens of GiB. Warns where it cannot be done: transfers are slower then.
        """
        self._check()
        if self._registered_on is not None:
            return
        with holding(self._lock_fd, REGISTERING):  # drivers run out of memory when processes pin at once
            try:
                _C.cuda_register_host(device, self._slab.ctypes.data, self.capacity, SEGMENT_BYTES)
                self._registered_on = device
            except RuntimeError as error:
                warnings.warn(
                    f"{self.directory}: its memory cannot be pinned, transfers are slower: {error}", stacklevel=2
                )

    def offset(self, slot: Slot) -> int:
        """Where a slot begins in the slab, in bytes."""
        return slot.start * self._granule_bytes

    def view(self, slot: Slot) -> np.ndarray:
        """The bytes of a slot, uint8, in place: to be used only while it is lent or reserved."""
        begin = self.offset(slot)
        view = self._slab[begin : begin + slot.payload_bytes]
        if not self._mapped.is_set():
            _C.read_pages(view.ctypes.data, view.nbytes)
        return view

    def _read(self, slots: Sequence[Slot], arrays: Sequence[np.ndarray]) -> list[bool]:
        good = []
        for slot, array in zip(slots, arrays, strict=True):
            good.append(_copy(array, self.view(slot)) == slot.checksum)
            if not good[-1]:
                self.discard(slot)
        return good

    def _write(
        self, slots: Sequence[Slot], arrays: Sequence[np.ndarray], checksums: Sequence[int] | None
    ) -> Sequence[int]:
        computed = [_copy(self.view(slot), array) for slot, array in zip(slots, arrays, strict=True)]
        return computed if checksums is None else checksums


class FileStore(SlabStore):
    """file: the slab is a file on a disk, read and written past the page cache, in pieces, by several threads.

    After a restart of the machine the index may be torn; what is used then is its last checkpoint. A payload that has
    been overwritten since does not have its checksum, and is a miss.
    """

    scheme = "file"
    local = False  # the index is a file

    def _open_slab(self) -> None:
        path = self.directory / "slab"
        flags = os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC
        try:
            self._fd = os.open(path, flags | os.O_DIRECT)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            self._fd = os.open(path, flags)
            warnings.warn(f"{path}: no O_DIRECT on this file system, so its pages are cached twice", stacklevel=4)
        check_file(path, os.fstat(self._fd))
        self._pool = ThreadPoolExecutor(IO_THREADS, "lmcache_mm file")
        self._bounce = threading.local()
        self._saving = threading.Lock()
        self._saved = time.monotonic()

    def _close_slab(self) -> None:
        self._pool.shutdown()
        self._save_index()
        os.close(self._fd)

    def flush(self) -> None:
        """Every put is visible when it returns, and outlives a power cut."""
        self._check()
        self._save_index()

    def publish(self, slots: Sequence[Slot], checksums: Sequence[int]) -> None:
        super().publish(slots, checksums)
        if time.monotonic() - self._saved > CHECKPOINT_S:
            self._save_index()

    def forget(self, owner: bytes) -> int:
        removed = super().forget(owner)
        if not self._save_index():  # a restart would bring them back
            raise RuntimeError(f"forget: the checkpoint in {self.directory} cannot be written")
        return removed

    def clear(self) -> int:
        removed = super().clear()
        if not self._save_index():
            raise RuntimeError(f"clear: the checkpoint in {self.directory} cannot be written")
        return removed

    def _save_index(self) -> bool:
        """Writes a checkpoint: a copy of the index, the clocks, and a digest of both."""
        self._saved = time.monotonic()
        temporary = self.directory / f"checkpoint.{os.getpid()}"
        try:
            with self._saving, holding(self._lock_fd, SAVING):
                os.fdatasync(self._fd)
                flags = os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW
                with open(os.open(temporary, flags, 0o600), "r+b") as file:
                    clocks = struct.pack("<dd", boot_clock(), time.time())
                    self._index.save(file.fileno())
                    file.seek(0, os.SEEK_END)
                    file.write(clocks)
                    file.seek(0)
                    file.write(blake3(file.read()).digest())
                    file.flush()
                    os.fsync(file.fileno())
                temporary.replace(self.directory / "checkpoint")
                sync_directory(self.directory)
        except (OSError, lmdb.Error):
            self._count("errors")
            with suppress(OSError):
                temporary.unlink(missing_ok=True)
            return False
        return True

    def _restore_index(self) -> float:
        super()._restore_index()
        try:
            content = (self.directory / "checkpoint").read_bytes()
        except FileNotFoundError:
            return 0.0
        body, digest = content[:-32], content[-32:]
        if len(body) < 16 or blake3(body).digest() != digest:
            return 0.0
        boot_then: float
        wall_then: float
        boot_then, wall_then = struct.unpack("<dd", body[-16:])
        (self.directory / "index" / "data.mdb").write_bytes(body[:-16])
        return boot_clock() - max(0.0, time.time() - wall_then) - boot_then

    def _read(self, slots: Sequence[Slot], arrays: Sequence[np.ndarray]) -> list[bool]:
        shares = self._in_pieces(self._read_piece, slots, arrays)
        good = []
        for slot, of_slot in zip(slots, shares, strict=True):
            failed = any(share is None for share in of_slot)
            good.append(not failed and ops.checksum_of_parts(of_slot) == slot.checksum)
            if failed:
                self._count("errors")
                self._count("hits", -1)
            elif not good[-1]:
                self.discard(slot)
        return good

    def _write(
        self, slots: Sequence[Slot], arrays: Sequence[np.ndarray], checksums: Sequence[int] | None
    ) -> Sequence[int]:
        shares = self._in_pieces(self._write_piece, slots, arrays)
        if any(share is None for of_slot in shares for share in of_slot):
            raise OSError(errno.EIO, "a write failed")
        return [ops.checksum_of_parts(of_slot) for of_slot in shares] if checksums is None else checksums

    def _in_pieces(
        self, work: Callable[[Slot, np.ndarray, int], int | None], slots: Sequence[Slot], arrays: Sequence[np.ndarray]
    ) -> list[list[Any]]:
        """work(slot, piece of its array, where the piece begins) for all pieces; what it returned, of each slot."""
        call = Call()

        def begin_piece(slot: Slot, array: np.ndarray, begin: int) -> Future[Any]:
            piece = (slot, array[begin : begin + PIECE_BYTES], begin)
            try:
                return self._pool.submit(call.run, work, *piece)
            except RuntimeError:  # no thread can be started, or the interpreter ends: it is done here
                done: Future[Any] = Future()
                done.set_result(work(*piece))
                return done

        try:
            jobs = [
                [begin_piece(slot, array, begin) for begin in range(0, max(1, slot.payload_bytes), PIECE_BYTES)]
                for slot, array in zip(slots, arrays, strict=True)
            ]
            wait([job for of_slot in jobs for job in of_slot])
            return [[job.result() for job in of_slot] for of_slot in jobs]
        finally:
            call.end()  # nothing touches the slots any more, whatever comes

    def _read_piece(self, slot: Slot, piece: np.ndarray, begin: int) -> int | None:
        """The piece's share of the checksum; None if it could not be read."""
        offset = slot.start * self._granule_bytes + begin
        try:
            for to, at, aligned in self._parts(piece):
                _read_fully(self._fd, aligned, offset + at)
                if to.ctypes.data != aligned.ctypes.data:
                    to[:] = aligned[: to.nbytes]
        except OSError:
            return None
        return _C.checksum_part(piece.ctypes.data, piece.nbytes, begin, slot.payload_bytes)

    def _write_piece(self, slot: Slot, piece: np.ndarray, begin: int) -> int | None:
        offset = slot.start * self._granule_bytes + begin
        share = _C.checksum_part(piece.ctypes.data, piece.nbytes, begin, slot.payload_bytes)
        try:
            for source, at, aligned in self._parts(piece):
                if source.ctypes.data != aligned.ctypes.data:
                    aligned[: source.nbytes] = source
                    aligned[source.nbytes :] = 0
                _write_fully(self._fd, aligned, offset + at)
        except OSError:
            return None
        return share

    def _parts(self, piece: np.ndarray) -> Iterator[tuple[np.ndarray, int, np.ndarray]]:
        """(part, where it begins, whole aligned pages to transfer it by): themselves where they are such pages."""
        direct = piece.nbytes // PAGE_BYTES * PAGE_BYTES if piece.ctypes.data % PAGE_BYTES == 0 else 0
        if direct:
            yield piece[:direct], 0, piece[:direct]
        if rest := piece.nbytes - direct:
            if not hasattr(self._bounce, "pages"):
                self._bounce.pages = np.frombuffer(mmap.mmap(-1, PIECE_BYTES), dtype=np.uint8)
            yield piece[direct:], direct, self._bounce.pages[: -(-rest // PAGE_BYTES) * PAGE_BYTES]


def remove(directory: Path) -> bool:
    """Removes the store in `directory`, and that; False, with nothing done, if a process has it open."""
    with _registry:
        if os.path.realpath(directory) in _open:
            return False
        with opening(directory) as fd:
            if any(store._lock_fd == fd for store in _open.values()):
                return False
            if any(locked_by_another(fd, row) for row in range(ROWS)):
                return False
            remove_files(directory)
            (directory / "lock").unlink()
            directory.rmdir()
    return True


# --- Bytes


def _copy(to: np.ndarray, source: np.ndarray) -> int:
    """Copies; returns the checksum."""
    return _C.copy(to.ctypes.data, source.ctypes.data, source.nbytes, ops.THREADS)


def _read_fully(fd: int, to: np.ndarray, offset: int) -> None:
    done = 0
    while done < to.nbytes:
        got = os.preadv(fd, [to[done:].data], offset + done)
        if got == 0:
            raise OSError(errno.EIO, "the slab ends early")
        done += got


def _write_fully(fd: int, source: np.ndarray, offset: int) -> None:
    done = 0
    while done < source.nbytes:
        done += os.pwritev(fd, [source[done:].data], offset + done)
