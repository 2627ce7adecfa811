"""WriteBehind: records that wait to be written to slower stores, and the thread that writes them."""

from __future__ import annotations

import logging
import mmap
import threading
from collections import deque
from collections.abc import Callable, Iterable
from typing import NamedTuple

import numpy as np

MOST_WAITING = 1 << 16  # records
MOST_COPIED_BYTES = 256 << 20  # of waiting payloads that the first store did not take
BATCH_BYTES = 16 << 20

logger = logging.getLogger("lmcache_mm")


class Waiting(NamedTuple):
    key: bytes
    payload_bytes: int
    owner: bytes
    payload: np.ndarray | None  # None: read it from the first tier
    as_of: tuple[int, ...]  # each tier's moment when the record began to wait


class WriteBehind:
    """See the module. write: writes a batch of one owner and moment, given memory for payloads that are to be read.
    drop: takes how many records are not written. Raises RuntimeError if no thread can be started."""

    def __init__(self, write: Callable[[list[Waiting], np.ndarray], None], drop: Callable[[int], None]) -> None:
        self._write, self._drop = write, drop
        self._state = threading.Condition()  # guards the fields below
        self._waiting: deque[Waiting] = deque()
        self._copied_bytes = 0
        self._writing = 0  # records
        self._batches = 0  # that are finished
        self._closing = False
        self.given_up = False  # `end` has not waited for all records
        self._thread = threading.Thread(target=self._run, name="lmcache_mm tiers", daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> int:
        """How many records wait."""
        return len(self._waiting)

    def add(self, records: Iterable[Waiting]) -> None:
        """Queues records; drops those beyond the bounds."""
        for record in records:
            with self._state:
                copied = 0 if record.payload is None else record.payload_bytes
                if len(self._waiting) >= MOST_WAITING or self._copied_bytes + copied > MOST_COPIED_BYTES:
                    self._drop(1)
                    continue
                try:
                    kept = record if record.payload is None else record._replace(payload=record.payload.copy())
                    self._waiting.append(kept)
                except MemoryError:
                    self._drop(1)
                    continue
                self._copied_bytes += copied
                self._state.notify_all()

    def _run(self) -> None:
        staging: np.ndarray | None = None
        while True:
            with self._state:
                self._writing = 0
                self._batches += 1
                self._state.notify_all()
                self._state.wait_for(lambda: self._waiting or self._closing)
                if not self._waiting or self.given_up:
                    return
                self._writing = 1
                batch = [self._waiting.popleft()]
                room = BATCH_BYTES - batch[0].payload_bytes
                while self._waiting and self._waiting[0][2::2] == batch[0][2::2]:  # owner and as_of
                    room -= self._waiting[0].payload_bytes
                    if room < 0:
                        break
                    batch.append(self._waiting.popleft())
                    self._writing += 1
            try:
                if staging is None or batch[0].payload_bytes > len(staging):
                    size = max(BATCH_BYTES, batch[0].payload_bytes)
                    staging = np.frombuffer(mmap.mmap(-1, size), dtype=np.uint8)
                self._write(batch, staging)
            except Exception:  # such as out of memory: the next batch may fit
                logger.warning("%d records were not written to slower tiers", len(batch), exc_info=True)
                self._drop(len(batch))
            with self._state:
                self._copied_bytes -= sum(record.payload_bytes for record in batch if record.payload is not None)

    def settle(self, forgotten: Callable[[Waiting], bool]) -> None:
        """Makes sure that forgotten records do not come back: drops those that wait, and waits for those being
        written."""
        with self._state:
            for record in [record for record in self._waiting if forgotten(record)]:
                self._waiting.remove(record)
                self._copied_bytes -= 0 if record.payload is None else record.payload_bytes
            batches = self._batches
            self._state.wait_for(lambda: not self._writing or self._batches > batches)

    def flush(self) -> None:
        """Waits until all records are written."""
        with self._state:
            self._state.wait_for(lambda: not self._waiting and not self._writing)

    def end(self, patience_s: float | None) -> bool:
        """Ends the thread once it has written all records. Returns whether it has, within `patience_s` if given; if
        not, the records count as dropped, and the thread may still be writing."""
        with self._state:
            self._closing = True
            self._state.notify_all()
        self._thread.join(patience_s)
        with self._state:
            self.given_up = self._thread.is_alive()
            if self.given_up:
                dropped = len(self._waiting) + self._writing
                self._drop(dropped)
                logger.warning("%d records were not written to slower tiers within %.3g s", dropped, patience_s)
        return not self.given_up
