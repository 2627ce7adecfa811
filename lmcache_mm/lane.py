"""Lanes: threads for work that may hang, and what those who wait for it can do about that."""

from __future__ import annotations

import atexit
import functools
import itertools
import logging
import queue
import threading
import time
import weakref
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

EXIT_S = 5.0  # how long work may hang when the interpreter ends
LEAST_EXIT_S = 0.1  # what is left of that to each of those that come behind work that hangs
ALL_PLANES = 1 << 62


logger = logging.getLogger("lmcache_mm")


class Abandoned(RuntimeError):
    """The work was given up before it had done with its pages."""


class Lane:
    """A thread that does one piece of work after the other, until the lane is closed or gone. Not one of an executor's,
    which the interpreter would wait for, whatever they wait for. at_exit: closed when the interpreter ends."""

    def __init__(self, name: str, at_exit: bool = True) -> None:
        self.progress = 0.0  # when a piece of work, or a step of one, last began or ended
        self._unfinished = 0
        self._closed = False
        self._lock = threading.Lock()
        self._queue: _Queue = queue.SimpleQueue()
        self._thread = threading.Thread(target=_work_off, args=(self._queue,), name=name, daemon=True)
        self._thread.start()
        # Not at the end of the interpreter, when those that were opened later may still need it.
        weakref.finalize(self, self._queue.put, None).atexit = False
        if at_exit:
            close_at_exit(self.close)

    def submit(self, run: Callable[[Work], Any], early: bool = False) -> Work:
        with self._lock:
            if self._closed:
                raise RuntimeError(f"{self._thread.name}: it is closed")
            work = Work(self, early)
            self._queue.put((work, run))
            if not self._unfinished:
                self.progress = time.monotonic()
            self._unfinished += 1
        return work

    def stalled_s(self) -> float:
        """For how long there has been work and nothing has moved."""
        with self._lock:
            return time.monotonic() - self.progress if self._unfinished else 0.0

    def close(self, patience_s: float | None = None) -> bool:
        """Finishes what was submitted; with a patience, what ends within it. Whether that is all."""
        with self._lock:
            self._closed = True
        self._queue.put(None)
        self._thread.join(patience_s)
        return not self._thread.is_alive()

    def _finished(self) -> None:
        with self._lock:
            self._unfinished -= 1


_Queue = queue.SimpleQueue["tuple[Work, Callable[[Work], Any]] | None"]


def _work_off(works: _Queue) -> None:
    while (item := works.get()) is not None:
        item[0].do(item[1])
        del item  # it holds the lane


_opened = itertools.count()
_open: dict[int, weakref.WeakMethod[Callable[[float], bool]]] = {}


def close_at_exit(close: Callable[[float], bool]) -> None:
    """`close`, a method, is called when the interpreter ends, before those of what was opened earlier and may be in use
    by it: what a store has accepted is still written then, and a thread that comes back from C++ later would end the
    process. It is told how many seconds it may take, and returns whether it has done all that was begun."""
    _register()
    number = next(_opened)
    _open[number] = weakref.WeakMethod(close, lambda _: _open.pop(number, None))


@functools.cache
def _register() -> None:
    """At the first use, and so behind the handlers of modules, which run later than this one."""
    atexit.register(_close_all)


def _close_all() -> None:
    until = time.monotonic() + EXIT_S
    unfinished = 0
    for _, reference in sorted(_open.items(), reverse=True):
        if close := reference():
            unfinished += not close(max(LEAST_EXIT_S, until - time.monotonic()))
    if unfinished:
        logger.warning("the process ends before %d threads have done their work, after %g s", unfinished, EXIT_S)


class Call:
    """The jobs of one call, on threads of an executor: none begins after its end, which waits for those that have
    begun."""

    def __init__(self) -> None:
        self._running, self._ended = 0, False
        self._changed = threading.Condition()

    def run(self, do: Callable[..., Any], *arguments: Any) -> Any:
        """What `do` returns; False, without doing it, after the end."""
        with self._changed:
            if self._ended:
                return False
            self._running += 1
        try:
            return do(*arguments)
        finally:
            with self._changed:
                self._running -= 1
                self._changed.notify_all()

    def end(self) -> None:
        with self._changed:
            self._ended = True
            self._changed.wait_for(lambda: not self._running)


class Work:
    """Something to be done, as its thread and those who wait for it share it.

    early: its pages are not to be touched before somebody waits for `leave_pages`, and then by that thread, or before
    `be_late`.
    """

    def __init__(self, lane: Lane, early: bool = False) -> None:
        self.future: Future[Any] = Future()
        self.abandoned = False
        self.left_pages = False
        self.written: Any = None  # on CUDA, an event: early work that is early no more touches pages behind it
        self.lane = lane
        self.early = early
        self._pages = threading.Lock()
        self._changed = threading.Condition()
        self._touch: Callable[[int], bool] | None = None  # for the thread that waits
        self._touch_is_last = False
        self._error: BaseException | None = None  # that it met

    def do(self, run: Callable[[Work], Any]) -> None:
        self.advance()
        try:
            if self.abandoned:
                raise Abandoned
            result = run(self)
            if self.abandoned:
                raise Abandoned
        except BaseException as error:
            self.advance()
            self.future.set_exception(error)
        else:
            self.advance()
            self.future.set_result(result)
        self.lane._finished()
        self.advance(left_pages=True)

    def advance(self, left_pages: bool = False) -> None:
        """Says that there is progress; if so, that the pages are left alone."""
        self.lane.progress = time.monotonic()
        with self._changed:
            self.left_pages |= left_pages
            self._changed.notify_all()

    def touch_pages(self, touch: Callable[[int], bool], last: bool = False) -> None:
        """Calls `touch`: pages are read or written by it only. last: and left alone from then on. It is told how many
        planes, from the first on, are as they are to be read, and returns whether it needs no more; if the work is
        early it is called again then."""
        touched = False
        if self.early:
            with self._changed:
                self._touch, self._touch_is_last = touch, last
                self._changed.notify_all()
                self._changed.wait_for(lambda: self._touch is None or self.abandoned or not self.early)
                error, self._error = self._error, None
                touched, self._touch = self._touch is None, None
            if error is not None:
                raise error
        with self._pages:
            if self.abandoned:
                raise Abandoned
            if not touched:
                touch(ALL_PLANES)
        self.advance(left_pages=last)

    def be_late(self) -> None:
        """The work is not early any more: its own thread touches the pages. If that thread waits for this, the lane has
        not stood still so far."""
        with self._changed:
            if self._touch is not None:
                self.lane.progress = time.monotonic()
            self.early = False
            self._changed.notify_all()

    def leave_pages(self, patience_s: float, planes: int = ALL_PLANES) -> bool:
        """Returns when the pages are left alone, having touched them here if the work is early, or those of the first
        `planes` planes; False: it was given up."""
        while self.wait_for(self._asks, patience_s):
            if self._touch is None:
                return True
            if self.abandoned:
                return False
            if not self._touch_here(planes):
                return True
        return False

    def read_pages(self, deadline: float | None) -> None:
        """Touches the pages of early work here, as often as it asks, until they are left alone, or `deadline` by
        time.monotonic()."""
        while True:
            with self._changed:
                if not self._changed.wait_for(self._asks, None if deadline is None else deadline - time.monotonic()):
                    return
            if self._touch is None or self.abandoned:
                return
            self._touch_here(ALL_PLANES)

    def _asks(self) -> bool:
        return self.left_pages or self._touch is not None

    def _touch_here(self, planes: int) -> bool:
        """Whether what the thread asks for is done, by this or another one."""
        touch = self._touch
        with self._pages:
            if touch is None or self._touch is not touch or self.abandoned:
                return True
            last = self._touch_is_last
            try:
                done = touch(planes)
            except BaseException as error:
                self._error, done = error, True
            if done:
                with self._changed:
                    self._touch = None
        self.advance(left_pages=done and last)
        return done

    def abandon(self) -> bool:
        """Whether the pages will not be touched any more."""
        if not self._pages.acquire(blocking=False):
            return self.left_pages
        with self._changed:
            self.abandoned = True
            self._changed.notify_all()
        self._pages.release()
        return True

    def stop_touching(self) -> None:
        """Abandons it. If it is at its pages this moment, returns behind that; what it has read it may still store."""
        with self._changed:
            self.abandoned = True
            self._changed.notify_all()
        with self._pages:
            return

    def give_up(self, patience_s: float) -> bool:
        """Whether it is abandoned, for the lane has not moved for `patience_s` seconds, be it with earlier work."""
        return self.lane.stalled_s() >= patience_s and self.abandon()

    def pages_left(self, timeout_s: float) -> bool:
        """Whether the pages are left alone within that time. Nothing is given up."""
        with self._changed:
            return self._changed.wait_for(lambda: self.left_pages, timeout_s)

    def wait_for(self, reached: Callable[[], bool], patience_s: float) -> bool:
        """True once `reached`; False if it was given up."""
        with self._changed:
            while not reached():
                if self.give_up(patience_s):
                    return reached()
                self._changed.wait(max(patience_s - self.lane.stalled_s(), patience_s / 16))
            return True
