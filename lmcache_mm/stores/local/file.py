"""file: a slab on a disk."""

from __future__ import annotations

import errno
import mmap
import os
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import suppress
from typing import Any

import numpy as np

from lmcache_mm import _C, ops
from lmcache_mm.lane import Call
from lmcache_mm.stores.local.slab import SlabStore, Slot
from lmcache_mm.stores.local.slab_files import check_file

PAGE_BYTES = 4096
PIECE_BYTES = 4 << 20  # most bytes per read or write on a disk
IO_THREADS = 8


class FileStore(SlabStore):
    """file: the slab is a file on a disk, read and written past the page cache, in pieces, by several threads.

    After a power cut, parts of the index may be older than others. Invalid parts are dropped, and a payload that was
    overwritten since does not match its checksum.
    """

    scheme = "file"
    local = False  # the index is a file
    outlives_restarts = True

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

    def _close_slab(self) -> None:
        self._pool.shutdown()
        with suppress(OSError):
            self._sync()
        os.close(self._fd)

    def _sync(self) -> None:
        os.fdatasync(self._fd)
        self._table.flush()

    def flush(self) -> None:
        """Every put is visible when it returns, and survives a power cut."""
        self._check()
        try:
            self._sync()
        except OSError:
            self._count("errors")

    def forget(self, owner: bytes) -> int:
        removed = super().forget(owner)
        self._sync_removal("forget")
        return removed

    def clear(self) -> int:
        removed = super().clear()
        self._sync_removal("clear")
        return removed

    def _sync_removal(self, what: str) -> None:
        try:
            self._table.flush()
        except OSError as error:  # a power cut would bring the records back
            raise RuntimeError(f"{what}: the index in {self.directory} cannot be written: {error}") from error

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
        """Calls work(slot, piece of its array, where the piece begins) for all pieces; returns the results per slot."""
        call = Call()

        def begin_piece(slot: Slot, array: np.ndarray, begin: int, size: int) -> Future[Any]:
            piece = (slot, array[begin : begin + size], begin)
            try:
                return self._pool.submit(call.run, work, *piece)
            except RuntimeError:  # no thread can be started, or the interpreter exits: do it here
                done: Future[Any] = Future()
                done.set_result(work(*piece))
                return done

        try:
            jobs = [
                [begin_piece(slot, array, begin, size) for begin in range(0, max(1, slot.payload_bytes), size)]
                for slot, array in zip(slots, arrays, strict=True)
                for size in [_piece_bytes(slot.payload_bytes)]
            ]
            wait([job for of_slot in jobs for job in of_slot])
            return [[job.result() for job in of_slot] for of_slot in jobs]
        finally:
            call.end()  # no thread touches the slots after this, even if this call raises

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
        """(part, where it begins, aligned buffer of whole pages): the part itself where it is aligned, else a bounce
        buffer."""
        direct = piece.nbytes // PAGE_BYTES * PAGE_BYTES if piece.ctypes.data % PAGE_BYTES == 0 else 0
        if direct:
            yield piece[:direct], 0, piece[:direct]
        if rest := piece.nbytes - direct:
            if not hasattr(self._bounce, "pages"):
                self._bounce.pages = np.frombuffer(mmap.mmap(-1, PIECE_BYTES), dtype=np.uint8)
            yield piece[direct:], direct, self._bounce.pages[: -(-rest // PAGE_BYTES) * PAGE_BYTES]


def _piece_bytes(payload_bytes: int) -> int:
    """The length of a payload's pieces. They are as equal as pages permit, since the longest one takes longest."""
    pieces = max(1, -(-payload_bytes // PIECE_BYTES))
    return max(1, -(-payload_bytes // (pieces * PAGE_BYTES))) * PAGE_BYTES


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
