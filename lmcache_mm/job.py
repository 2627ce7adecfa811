"""What callers hold of a retrieve or store under way."""

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
PATIENCE_S = 30.0  # with a store that does not move, where the caller does not say


class Job(Generic[T]):
    """A retrieve or store under way. Pages it reads or writes must be left alone until `pages_free`; on CUDA it begins
    behind the work that the caller's current stream held when it was asked for."""

    def __init__(
        self,
        work: Work,
        layout: KVLayout,
        by_layer: Sequence[Copies] = (),
        result_of: Callable[[Any], T] = lambda result: result,
    ) -> None:
        self.work, self._layout, self._by_layer, self._result_of = work, layout, by_layer, result_of

    def done(self) -> bool:
        return self.work.future.done()

    def result(self, timeout_s: float | None = None) -> T:
        """The job's result; TimeoutError if it is not there after `timeout_s` seconds, Abandoned if it never will. Of
        a store that was asked for early or by layers, it reads the pages that have not been read."""
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        if self.work.early:
            self.work.read_pages(deadline)
        return self._result_of(self.work.future.result(None if deadline is None else deadline - time.monotonic()))

    def __await__(self) -> Generator[Any, None, T]:
        """`result`, on another thread."""
        return asyncio.to_thread(self.result).__await__()

    def when_done(self, tell: Callable[[T], None]) -> None:
        """Calls `tell` with the result once, on whatever thread ends the job; not if it fails or is given up."""

        def told(future: Future[Any]) -> None:
            if not future.cancelled() and future.exception() is None:
                tell(self._result_of(future.result()))

        self.work.future.add_done_callback(told)

    def then(self, result_of: Callable[[T], S]) -> Job[S]:
        """The same job with another result, made from this one's."""
        return Job(self.work, self._layout, self._by_layer, lambda result: result_of(self._result_of(result)))

    def give_up(self, patience_s: float = PATIENCE_S) -> bool:
        """Whether the job was abandoned, for nothing moved for `patience_s` seconds: its pages are left alone then."""
        return self.work.give_up(patience_s)

    def abandon(self) -> bool:
        """Gives the job up, unless it is at its pages this moment. True: it will leave them alone."""
        return self.work.abandon()

    def pages_free(self, patience_s: float = PATIENCE_S) -> bool:
        """Returns when the job has done with its pages, though it may go on with what it has read. False: it made no
        progress for `patience_s` seconds (a store hangs, say) and was abandoned: its pages are left alone too.

        The pages of a store that was asked for early are read in here."""
        return self.work.leave_pages(patience_s)

    def leave_pages(self, deadline: float) -> bool:
        """Returns when the job will not touch its pages any more; False: it had not done with them by `deadline`, by
        time.monotonic(), and was abandoned."""
        if self.work.pages_left(max(0.0, deadline - time.monotonic())):
            return True
        self.work.stop_touching()
        return False

    def layer_ready(self, layer: str, patience_s: float = PATIENCE_S) -> bool:
        """Returns when a load by layers has filled the layer's pages, which are not verified before `result`, or ended;
        on CUDA, when what the caller's current stream is given from now on comes behind that. False: as of
        `pages_free`. ValueError for a layer that the layout does not name."""
        planes = self._planes_until(layer)
        ready = self.work.wait_for(lambda: bool(self._by_layer) or self.work.left_pages, patience_s)
        for copies in self._by_layer:
            copies.order(current_stream(self._layout.device), planes)
        return ready

    def written(self) -> None:
        """Says that the pages hold what an early store is to keep; on CUDA, once the caller's current stream has done
        what it holds. The store's own thread reads them from now on."""
        self.work.written = current_event(self._layout.device)
        self.work.be_late()

    def layer_written(self, layer: str, patience_s: float = PATIENCE_S) -> bool:
        """Says that the layer's pages, and those of all layers before it, hold what a store by layers is to keep; on
        CUDA, once the caller's current stream has done what it holds. They are read at once, by this thread, as far as
        there is room for all of the job's payloads: in a store with slots in memory there is, elsewhere for 16 MiB; the
        rest is read with the last layer's. False: as of `pages_free`. ValueError for a layer that the layout does not
        name."""
        return self.work.leave_pages(patience_s, self._planes_until(layer))

    def _planes_until(self, layer: str) -> int:
        if layer not in self._layout.planes_until:
            raise ValueError(f"layer: expected one of {', '.join(self._layout.planes_until)}, got {layer!r}")
        return self._layout.planes_until[layer]
