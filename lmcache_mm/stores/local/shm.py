"""shm: a slab in memory, which every process maps."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Sequence
from contextlib import suppress

import numpy as np

from lmcache_mm import _C, operands
from lmcache_mm.stores.local.slab import SlabStore, Slot
from lmcache_mm.stores.local.slab_files import REGISTER_WAIT_S, REGISTERING, SEGMENT_BYTES, holding, map_file

MAP_BYTES = 64 << 20


class ShmStore(SlabStore):
    """shm: the slab is a file in memory, mapped by every process: slots are read and written in place."""

    scheme = "shm"

    def _open_slab(self) -> None:
        self._slab = np.frombuffer(map_file(self.directory / "slab", self.capacity), dtype=np.uint8)
        self._pages = _C.SlabPages(self._slab.ctypes.data, self.capacity)
        self._registered_on: int | None = None
        self._closing, self._mapped = threading.Event(), threading.Event()
        self._mapper = threading.Thread(target=self._map_pages, name="lmcache_mm shm", daemon=True)
        self._mapper.start()

    def _map_pages(self) -> None:
        """Reads every page once, in the background: a first read maps the neighboring pages too, while a first write
        costs one fault per page (measured: 65 against 380 ms per GiB)."""
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
            with suppress(RuntimeError):  # the device is gone, and its pins with it
                _C.cuda_unregister_host(self._registered_on, self._slab.ctypes.data, self.capacity, SEGMENT_BYTES)
        del self._slab, self._pages  # unmapped when the last view is gone

    def register(self, device: int) -> None:
        """Pins the slab for transfers to and from GPUs until the store is closed; once per process, however often it is
        called. Takes some seconds for tens of GiB. If pinning fails it warns, and transfers are slower."""
        self._check()
        if self._registered_on is not None:
            return
        what = f"has been pinning {self.directory}"
        try:
            with holding(
                self._lock_fd, REGISTERING, REGISTER_WAIT_S, what
            ):  # drivers run out of memory if more is pinned at once
                _C.cuda_register_host(device, self._slab.ctypes.data, self.capacity, SEGMENT_BYTES)
            self._registered_on = device
        except (RuntimeError, TimeoutError) as error:
            warnings.warn(f"{self.directory}: its memory cannot be pinned, transfers are slower: {error}", stacklevel=2)

    def offset(self, slot: Slot) -> int:
        """Where a slot begins in the slab, in bytes."""
        return slot.start * self._granule_bytes

    def view(self, slot: Slot) -> np.ndarray:
        """A slot's bytes in place, uint8; valid only while the slot is lent or reserved."""
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


def _copy(to: np.ndarray, source: np.ndarray) -> int:
    """Copies and returns the checksum."""
    return _C.copy(to.ctypes.data, source.ctypes.data, source.nbytes, operands.THREADS)
