"""A remote store's connections, each with a thread of its own, and the calls that they share."""

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
    """A client's connection to a server that keeps bytes under names. Any exception means that the server cannot be
    used now. An engine that several lanes share is called by several threads at once."""

    def exists(self, names: Sequence[str], peek: bool) -> list[bool]:
        """Of at most `names_at_once` names, as in `heads` and `delete`."""
        ...

    @property
    def expires(self) -> bool:
        """Whether records vanish by themselves after the `ttl_s` that they were written with."""
        ...

    def read(self, name: str, into: memoryview) -> int | None:
        """Fills `into` from its beginning; how long the record is, or any larger number than `into` has bytes if it
        does not fit; None: there is none."""
        ...

    def heads(self, names: Sequence[str], size: int) -> list[bytes | None]:
        """The first `size` bytes of each record; None: there is none."""
        ...

    def write(self, name: str, record: memoryview, ttl_s: float, replace: bool) -> bool:
        """False: there is no room for it. Without `replace`, a record that is there may stay. ttl_s: after which it may
        be gone; 0: never."""
        ...

    def delete(self, names: Sequence[str]) -> None: ...

    def names(self, prefix: str) -> Iterator[list[str]]:
        """All that begin with it, some at a time; those that are deleted or added meanwhile may be among them."""
        ...

    def close(self) -> None: ...


class Call:
    """What a caller waits for: `items` pieces of work that the lanes share, and what came of each."""

    def __init__(self, work: Callable[[Hand, Call, int], Any], items: int, patience_s: float) -> None:
        self.work = work
        self.results: list[Any] = [None] * items
        self.error: BaseException | None = None
        self.over = False
        self._next = 0
        self._left = items
        self._patience_s = patience_s
        self._deadline = time.monotonic() + patience_s
        self._changed = threading.Condition()  # guards all of it, and the caller's buffers

    def take(self) -> int | None:
        """An item that nobody else does, if there is one."""
        with self._changed:
            if self.over or self._next == len(self.results):
                return None
            self._next += 1
            return self._next - 1

    def touch(self, move: Callable[[], Any]) -> bool:
        """Lets `move` read or write a buffer of the caller's; False, without doing so, if the caller has gone."""
        with self._changed:
            if not self.over:
                move()
            return not self.over

    def extend(self) -> None:
        """There is progress: the caller waits for as long again."""
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
        """Whether anything was done."""
        return self._left < len(self.results)

    def wait(self) -> bool:
        """Whether all is done; what is not by the deadline will leave the caller's buffers alone."""
        with self._changed:
            while not self.over and self._left and (rest_s := self._deadline - time.monotonic()) > 0:
                self._changed.wait(rest_s)
            self.over = True
            return not self._left and self.error is None


class Hand:
    """A lane with its connection and memory of its own, where records arrive and leave from."""

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
            # It is passed over several times, and what a network card writes to must not become a child's. Kernels
            # may have neither.
            for advice in (mmap.MADV_HUGEPAGE, mmap.MADV_DONTFORK):
                with suppress(OSError):
                    memory.madvise(advice)
            self._memory = np.frombuffer(memory, np.uint8)
        return self._memory[:size]
