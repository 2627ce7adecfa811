"""Lanes: threads for work that may hang, and ways for its waiters to give it up."""

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

EXIT_S = 5.0  # total time that pending work gets at interpreter exit
LEAST_EXIT_S = 0.1  # what each lane still gets after others have used that up
ALL_PLANES = 1 << 62


logger = logging.getLogger("lmcache_mm")


class Abandoned(RuntimeError):
    """The work was given up before it was done with its pages."""


class Lane:
    """A thread that does one piece of work after another until the lane is closed or collected. Not an executor: the
    interpreter joins an executor's threads at exit even if they hang. at_exit: close the lane at interpreter exit."""

    def __init__(self, name: str, at_exit: bool = True) -> None:
        self.progress = 0.0  # when a piece of work, or a step of one, last began or ended
        self._unfinished = 0
        self._closed = False
        self._lock = threading.Lock()
        self._queue: _Queue = queue.SimpleQueue()
        self._thread = threading.Thread(target=_work_off, args=(self._queue,), name=name, daemon=True)
        self._thread.start()
        # Not at interpreter exit: lanes and stores opened later may still need this one.
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
        """How long work has been pending without progress."""
        with self._lock:
            return time.monotonic() - self.progress if self._unfinished else 0.0

    def close(self, patience_s: float | None = None) -> bool:
        """Finishes the submitted work, waiting at most `patience_s` if given. Returns whether all of it is done."""
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
        del item  # it references the lane


_opened = itertools.count()
_open: dict[int, weakref.WeakMethod[Callable[[float], bool]]] = {}


def close_at_exit(close: Callable[[float], bool]) -> None:
    """Calls the bound method `close` at interpreter exit, last opened first, since later objects may use earlier ones.
    So a store still writes what it has accepted, and no thread returns from C++ later, which would end the process.
    `close` gets the seconds it may take and returns whether all pending work is done."""
    _register()
    number = next(_opened)
    _open[number] = weakref.WeakMethod(close, lambda _: _open.pop(number, None))


@functools.cache
def _register() -> None:
    """Registered at the first use, after the modules' own handlers, so that it runs before them."""
    atexit.register(_close_all)


def _close_all() -> None:
    until = time.monotonic() + EXIT_S
    unfinished = 0
    for _, reference in sorted(_open.items(), reverse=True):
        if close := reference():
            unfinished += not close(max(LEAST_EXIT_S, until - time.monotonic()))
    if unfinished:
        logger.warning("the process exits while %d threads still have work, after %g s", unfinished, EXIT_S)


class Call:
    """The jobs of one call, on an executor's threads. `end` waits for the jobs that have begun; no others begin."""

    def __init__(self) -> None:
        self._running, self._ended = 0, False
        self._changed = threading.Condition()

    def run(self, do: Callable[..., Any], *arguments: Any) -> Any:
        """Returns what `do` returns; after `end`, returns False without calling it."""
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
    """A piece of work, shared by the lane's thread and its waiters.

    early: the lane's thread must not touch the pages before `be_late`. Until then a thread that waits in `leave_pages`
    or `read_pages` touches them.
    """

    def __init__(self, lane: Lane, early: bool = False) -> None:
        self.future: Future[Any] = Future()
        self.abandoned = False
        self.left_pages = False
        self.written: Any = None  # on CUDA, an event: work that was made late touches the pages after it
        self.lane = lane
        self.early = early
        self._pages = threading.Lock()
        self._changed = threading.Condition()
        self._touch: Callable[[int], bool] | None = None  # for the waiting thread to call
        self._touch_is_last = False
        self._error: BaseException | None = None  # what that call raised

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
        """Reports progress; left_pages: the pages will not be touched again."""
        self.lane.progress = time.monotonic()
        with self._changed:
            self.left_pages |= left_pages
            self._changed.notify_all()

    def touch_pages(self, touch: Callable[[int], bool], last: bool = False) -> None:
        """Calls `touch`, the only place where pages are read or written. last: the pages are not touched after that.
        `touch` gets the number of planes, counted from the first, that are ready to be read, and returns whether it is
        done; if not, and the work is early, it is called again."""
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
        """Makes the work late: its own thread touches the pages. A thread that waited for this counts as progress."""
        with self._changed:
            if self._touch is not None:
                self.lane.progress = time.monotonic()
            self.early = False
            self._changed.notify_all()

    def leave_pages(self, patience_s: float, planes: int = ALL_PLANES) -> bool:
        """Waits until the work has left the pages, or those of the first `planes` planes; if the work is early, touches
        them on this thread. False: the work was given up."""
        while self.wait_for(self._asks, patience_s):
            if self._touch is None:
                return True
            if self.abandoned:
                return False
            if not self._touch_here(planes):
                return True
        return False

    def read_pages(self, deadline: float | None) -> None:
        """Touches the pages of early work on this thread, as often as the work asks, until it has left them or until
        `deadline`, by time.monotonic()."""
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
        """Whether the requested touch is done, by this thread or another."""
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
        """Tries to abandon the work. Returns whether the pages will not be touched again."""
        if not self._pages.acquire(blocking=False):
            return self.left_pages
        with self._changed:
            self.abandoned = True
            self._changed.notify_all()
        self._pages.release()
        return True

    def stop_touching(self) -> None:
        """Abandons the work, and waits if it is touching pages now. It may still store what it has read."""
        with self._changed:
            self.abandoned = True
            self._changed.notify_all()
        with self._pages:
            return

    def give_up(self, patience_s: float) -> bool:
        """Abandons the work if the lane has made no progress for `patience_s`, even on earlier work. Whether it did."""
        return self.lane.stalled_s() >= patience_s and self.abandon()

    def pages_left(self, timeout_s: float) -> bool:
        """Whether the work leaves the pages within `timeout_s`. Gives nothing up."""
        with self._changed:
            return self._changed.wait_for(lambda: self.left_pages, timeout_s)

    def wait_for(self, reached: Callable[[], bool], patience_s: float) -> bool:
        """True once `reached`; False if the work was given up."""
        with self._changed:
            while not reached():
                if self.give_up(patience_s):
                    return reached()
                self._changed.wait(max(patience_s - self.lane.stalled_s(), patience_s / 16))
            return True
