"""A remote store's connections and the calls that they share, each with a time budget.

`Engine` hides the differences between servers. Its client may hang in native code for any time. So it runs on lanes,
the store's own threads, and accesses only their memory. Records are copied between that memory and the caller's buffers
under the call's lock, and never after the call has returned.
"""

from __future__ import annotations

import logging
import mmap
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from functools import partial
from typing import Any, Protocol

import numpy as np

from lmcache_mm.lane import Lane, Work
from lmcache_mm.stores.arguments import is_lack
from lmcache_mm.stores.breaker import PAUSE_S, Breaker

logger = logging.getLogger("lmcache_mm")


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


def first_line(error: BaseException | None) -> str:
    """What an error says: those of obstore go on with the structures of its program."""
    return str(error).strip().partition("\n")[0]


class LeftAlone(ConnectionError):
    """The server was not asked, because it failed a short while ago."""


class Calls:
    """A store's hands, which share its calls. See RemoteStore. counts: failed calls."""

    def __init__(
        self, name: str, connect: Callable[[], Engine], timeout_s: float, connections: int, names_at_once: int
    ) -> None:
        self._name, self._timeout_s, self._names_at_once = name, timeout_s, names_at_once
        self.breaker = Breaker()
        self._failure = ""  # why the server is left alone
        self.counts = {"errors": 0, "timeouts": 0}
        self._lock = threading.Lock()  # guards the counts and `busy` of the hands
        self.hands = [Hand(f"lmcache_mm {name.partition(':')[0]}", connect) for _ in range(connections)]

    def do(
        self,
        work: Callable[[Hand, Call, int], Any],
        items: int,
        until: float | None = None,
        even_if_down: bool = False,
    ) -> tuple[list[Any], BaseException | None]:
        """Runs work(hand, call, item) for all items on several hands. Returns the results, None for items not done, and
        the error if there was one. until: a deadline by the monotonic clock, for calls that share a budget.
        even_if_down: also during the pause after a failure."""
        if not items:
            return [], None
        if not even_if_down and not self.breaker.admit():
            return [None] * items, LeftAlone(f"is left alone for a while, since it failed: {self._failure}")
        call = Call(work, items, self._timeout_s if until is None else until - time.monotonic())
        with self._lock:
            hands = sorted(self.hands, key=lambda hand: hand.busy)[:items]
            for hand in hands:
                hand.busy += 1
        for hand in hands:
            hand.lane.submit(partial(self._work, call, hand))
        good = call.wait()
        error = call.error or (None if good else TimeoutError(f"no answer within {self._timeout_s:g} s"))
        if error is not None:
            with self._lock:
                self.counts["timeouts" if call.error is None else "errors"] += 1
        # A server that is slow with a large call is not down if some items arrived.
        healthy = good or (call.error is None and call.moved)
        if call.error is not None and is_lack(call.error):  # this host ran out, not the server
            healthy = not self.breaker.open
        elif not healthy:
            self._failure = first_line(error)
        if self.breaker.tell(healthy) and not healthy:
            logger.warning("%s failed and is left alone for %g s: %s", self._name, PAUSE_S, self._failure)
        return list(call.results), error

    def _work(self, call: Call, hand: Hand, _: Work) -> None:
        """Does one item, then queues itself again behind other calls."""
        item = call.take()
        if item is not None:
            try:
                result = call.work(hand, call, item)
            except BaseException as error:
                call.finish(item, error=error)
            else:
                call.finish(item, result)
                try:
                    hand.lane.submit(partial(self._work, call, hand))
                    return
                except (RuntimeError, MemoryError):  # the store is being closed, say
                    pass
        with self._lock:
            hand.busy -= 1

    def in_parts(
        self, of: Callable[[Engine, list[str]], Any], names: Sequence[str], otherwise: Any, until: float | None = None
    ) -> list[Any]:
        """Calls of(engine, names) for parts of the names. Returns its result per name, or `otherwise`."""
        parts = self.parts(names)
        results, _ = self.do(lambda hand, call, item: of(hand.engine, parts[item]), len(parts), until)
        pairs = zip(parts, results, strict=True)
        return [one for part, result in pairs for one in (result or [otherwise] * len(part))]

    def parts(self, names: Sequence[str]) -> list[list[str]]:
        return [list(names[i : i + self._names_at_once]) for i in range(0, len(names), self._names_at_once)]

    def close(self) -> None:
        """Returns within the time budget; abandons connections that hang."""
        until = time.monotonic() + self._timeout_s
        for hand in self.hands:
            hand.lane.close(0)  # tell all of them before waiting for any
        ended: dict[int, tuple[Engine, bool]] = {}  # connections, which hands may share, and whether they are unused
        for hand in self.hands:
            done = hand.lane.close(max(0.0, until - time.monotonic()))
            if (engine := hand.connected) is not None:
                ended[id(engine)] = (engine, done and ended.get(id(engine), (engine, True))[1])
        for engine, nobody_uses_it in ended.values():
            if nobody_uses_it:
                engine.close()
            else:
                _left.append(engine)


_left: list[Engine] = []  # still in use when their stores were closed: kept until the process ends
