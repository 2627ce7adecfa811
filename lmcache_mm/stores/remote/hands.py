"""A remote store's connections, each with its own thread, and the calls that they share."""

from __future__ import annotations

import mmap
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from typing import Any, Protocol

import numpy as np

from lmcache_mm.lane import Lane


class Engine(Protocol):
    """A client's connection to a server that keeps bytes under names. Any exception means that the server is unusable
    now. If several lanes share an engine, several threads call it at once."""

    def exists(self, names: Sequence[str], peek: bool) -> list[bool]:
        """Which records exist. Gets at most `names_at_once` names, as do `heads` and `delete`."""
        ...

    @property
    def expires(self) -> bool:
        """Whether records vanish by themselves after the `ttl_s` that they were written with."""
        ...

    def read(self, name: str, into: memoryview) -> int | None:
        """Fills `into` from its beginning. Returns the record's length, or any number larger than `into` if the record
        does not fit; None if there is none."""
        ...

    def heads(self, names: Sequence[str], size: int) -> list[bytes | None]:
        """The first `size` bytes of each record; None if there is none."""
        ...

    def write(self, name: str, record: memoryview, ttl_s: float, replace: bool) -> bool:
        """Returns False if there is no room. Without `replace`, an existing record may stay. ttl_s: the record may
        expire after that; 0: never."""
        ...

    def delete(self, names: Sequence[str]) -> None: ...

    def names(self, prefix: str) -> Iterator[list[str]]:
        """All names with this prefix, some at a time, perhaps with names that are added or deleted meanwhile."""
        ...

    def close(self) -> None: ...


class Call:
    """A call that a caller waits for: `items` pieces of work that the lanes share, and their results."""

    def __init__(self, work: Callable[[Hand, Call, int], Any], items: int, patience_s: float) -> None:
        self.work = work
        self.results: list[Any] = [None] * items
        self.error: BaseException | None = None
        self.over = False
        self._next = 0
        self._left = items
        self._patience_s = patience_s
        self._deadline = time.monotonic() + patience_s
        self._changed = threading.Condition()  # guards all fields and the caller's buffers

    def take(self) -> int | None:
        """Takes an item that is still to be done; None if there is none."""
        with self._changed:
            if self.over or self._next == len(self.results):
                return None
            self._next += 1
            return self._next - 1

    def touch(self, move: Callable[[], Any]) -> bool:
        """Lets `move` read or write a buffer of the caller's; returns False without calling it if the call is over."""
        with self._changed:
            if not self.over:
                move()
            return not self.over

    def extend(self) -> None:
        """Reports progress: restarts the caller's wait."""
        with self._changed:
            self._deadline = time.monotonic() + self._patience_s

    def finish(self, item: int, result: Any = None, error: BaseException | None = None) -> None:
        with self._changed:
            if self.over:
                return
            self.results[item] = result
            self._left -= 1
            if error is not None:
                self.error, self.over = error, True
            if self.over or not self._left:
                self._changed.notify_all()

    @property
    def moved(self) -> bool:
        """Whether any item was done."""
        return self._left < len(self.results)

    def wait(self) -> bool:
        """Waits and returns whether all items are done. Items not done by the deadline never touch the caller's buffers
        after it."""
        with self._changed:
            while not self.over and self._left and (rest_s := self._deadline - time.monotonic()) > 0:
                self._changed.wait(rest_s)
            self.over = True
            return not self._left and self.error is None


class Hand:
    """A lane with its own connection and its own memory, through which all its records pass."""

    def __init__(self, name: str, connect: Callable[[], Engine]) -> None:
        self.lane = Lane(name)
        self.busy = 0
        self._connect = connect
        self.connected: Engine | None = None
        self._memory = np.empty(0, np.uint8)

    @property
    def engine(self) -> Engine:
        if self.connected is None:
            self.connected = self._connect()
        return self.connected

    def memory(self, size: int) -> np.ndarray:
        if size > len(self._memory):
            memory = mmap.mmap(-1, 1 << (size - 1).bit_length(), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            # Huge pages, since each record is read several times; not for children, since a network card may write
            # here. The kernel may support neither.
            for advice in (mmap.MADV_HUGEPAGE, mmap.MADV_DONTFORK):
                with suppress(OSError):
                    memory.madvise(advice)
            self._memory = np.frombuffer(memory, np.uint8)
        return self._memory[:size]
