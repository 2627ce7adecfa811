"""Job: a caller's handle of a retrieve or store."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future
from typing import Any, Generic, TypeVar

from lmcache_mm.copies import Copies, current_event, current_stream
from lmcache_mm.lane import Work
from lmcache_mm.layout import KVLayout

S = TypeVar("S")
T = TypeVar("T")
PATIENCE_S = 30.0  # default patience with a store that makes no progress


class Job(Generic[T]):
    """A retrieve or store in progress. Do not touch the pages that it reads or writes until `pages_free`. On CUDA it
    runs after the work that the caller's current stream held when it was requested.

    To get pages back, call `pages_free`, which waits; where no call may wait, `give_up`, which ends a job that is
    stuck, or `abandon`, which ends any. An early store is requested before its pages are written; a store by layers is
    one. It reads the pages only during calls of this object's methods, or after `written`."""

    def __init__(
        self,
        work: Work,
        layout: KVLayout,
        by_layer: Sequence[Copies] = (),
        result_of: Callable[[Any], T] = lambda result: result,
    ) -> None:
        self._work, self._layout, self._by_layer, self._result_of = work, layout, by_layer, result_of

    def done(self) -> bool:
        """Whether `result` would return or raise at once."""
        return self._work.future.done()

    def result(self, timeout_s: float | None = None) -> T:
        """The job's result; TimeoutError if there is none after `timeout_s` seconds,
        `lmcache_mm.lane.Abandoned`, a RuntimeError, if there will never be one. For an early store, this reads the
        pages that have not been read."""
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        if self._work.early:
            self._work.read_pages(deadline)
        return self._result_of(self._work.future.result(None if deadline is None else deadline - time.monotonic()))

    def __await__(self) -> Generator[Any, None, T]:
        """Awaits `result`, which runs on another thread."""
        return asyncio.to_thread(self.result).__await__()

    def when_done(self, tell: Callable[[T], None]) -> None:
        """Calls `tell` with the result once, on the thread that ends the job; not if the job fails or is given up."""

        def told(future: Future[Any]) -> None:
            if not future.cancelled() and future.exception() is None:
                tell(self._result_of(future.result()))

        self._work.future.add_done_callback(told)

    def _then(self, result_of: Callable[[T], S]) -> Job[S]:
        """The same job with the result `result_of(result)`."""
        return Job(self._work, self._layout, self._by_layer, lambda result: result_of(self._result_of(result)))

    def give_up(self, patience_s: float = PATIENCE_S) -> bool:
        """Abandons the job if it made no progress for `patience_s` seconds, and returns whether it did. An abandoned
        job does not touch its pages anymore."""
        return self._work.give_up(patience_s)

    def abandon(self) -> bool:
        """Gives the job up, unless it is using its pages right now. True: it will not touch them anymore."""
        return self._work.abandon()

    def pages_free(self, patience_s: float = PATIENCE_S) -> bool:
        """Returns when the job is done with its pages, though it may still process what it has read. False: it made no
        progress for `patience_s` seconds (for example, a store hangs) and was abandoned; then it does not touch its
        pages anymore either.

        For an early store, this call reads the pages."""
        return self._work.leave_pages(patience_s)

    def _leave_pages(self, deadline: float) -> bool:
        """Returns when the job will not touch its pages anymore. False: it was not done with them by `deadline` (by
        time.monotonic()) and was abandoned."""
        if self._work.pages_left(max(0.0, deadline - time.monotonic())):
            return True
        self._work.stop_touching()
        return False

    def layer_ready(self, layer: str, patience_s: float = PATIENCE_S) -> bool:
        """Returns when a load by layers has filled the layer's pages or has ended. The pages are not verified before
        `result`. On CUDA, returns when work that the caller's current stream is given from now on runs after the fill.
        False: as in `pages_free`. ValueError for a layer that the layout does not name."""
        planes = self._planes_until(layer)
        ready = self._work.wait_for(lambda: bool(self._by_layer) or self._work.left_pages, patience_s)
        for copies in self._by_layer:
            copies.order(current_stream(self._layout.device), planes)
        return ready

    def written(self) -> None:
        """Tells an early store that its pages are written; on CUDA, once the caller's current stream has finished its
        present work. The store's own thread reads them from now on."""
        self._work.written = current_event(self._layout.device)
        self._work.be_late()

    def layer_written(self, layer: str, patience_s: float = PATIENCE_S) -> bool:
        """Tells a store by layers that the pages of this layer and of all layers before it are written; on CUDA, once
        the caller's current stream has finished its present work. This thread reads them at once, for the payloads that
        there is room for: all of the job's in a store with slots in memory, 16 MiB elsewhere. The rest is read with the
        last layer. With a codec, the call for the last layer waits for the copies. False: as in `pages_free`.
        ValueError for a layer that the layout does not name."""
        return self._work.leave_pages(patience_s, self._planes_until(layer))

    def _planes_until(self, layer: str) -> int:
        if layer not in self._layout.planes_until:
            raise ValueError(f"layer: expected one of {', '.join(self._layout.planes_until)}, got {layer!r}")
        return self._layout.planes_until[layer]
