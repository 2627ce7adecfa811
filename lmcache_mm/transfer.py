"""Chunks between pages and a store: in place where the store has slots in memory, else through staging memory."""

from __future__ import annotations

import mmap
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import cached_property
from itertools import pairwise, takewhile
from typing import Any, Generic, NamedTuple, Protocol, TypeVar, cast

import torch

from lmcache_mm import _C, ops, transfer_paths
from lmcache_mm.lane import EXIT_S, Lane, Work, close_at_exit
from lmcache_mm.layout import KVLayout
from lmcache_mm.stores import SlotStore, Store
from lmcache_mm.stores.arguments import is_lack

S = TypeVar("S")
T = TypeVar("T")
STAGING_BYTES = 16 << 20  # least memory for the payloads of one step between pages and store
SLOTS_BYTES = 256 << 20  # of slots that are held at once
LANE_BYTES = 16  # of the checksum
RING_BUFFERS, RING_BUFFER_BYTES = 3, 16 << 20  # in a GPU's memory, for each direction


class Job(Generic[T]):
    """A retrieve or store under way. Pages it reads or writes must be left alone until `pages_free`; on CUDA it begins
    behind the work that the caller's current stream held when it was asked for."""

    def __init__(
        self,
        work: Work,
        layout: KVLayout,
        layers: Sequence[_Layer],
        result_of: Callable[[Any], T] = lambda result: result,
    ) -> None:
        self.work, self._layout, self._layers, self._result_of = work, layout, layers, result_of

    def done(self) -> bool:
        return self.work.future.done()

    def wait(self, timeout_s: float | None = None) -> T:
        """The job's result; TimeoutError if it is not there after `timeout_s` seconds, Abandoned if it never will. Of
        a store that was asked for early or by layers, it reads the pages that have not been read."""
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        if self.work.early:
            self.work.read_pages(deadline)
        return self._result_of(self.work.future.result(None if deadline is None else deadline - time.monotonic()))

    def then(self, result_of: Callable[[T], S]) -> Job[S]:
        """The same job with another result, made from this one's."""
        return Job(self.work, self._layout, self._layers, lambda result: result_of(self._result_of(result)))

    def give_up(self, patience_s: float) -> bool:
        """Whether the job was abandoned, for nothing moved for `patience_s` seconds: its pages are left alone then."""
        return self.work.give_up(patience_s)

    def abandon(self) -> bool:
        """Gives the job up, unless it is at its pages this moment. True: it will leave them alone."""
        return self.work.abandon()

    def pages_free(self, patience_s: float) -> bool:
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

    def layer_ready(self, layer: str, patience_s: float) -> bool:
        """Returns when a load by layers has filled the layer's pages, which are not verified before `wait`, or ended;
        on CUDA, when what the caller's current stream is given from now on comes behind that. False: as of
        `pages_free`. ValueError for a layer that the layout does not name."""
        planes = self._planes_until(layer)
        ready = self.work.wait_for(lambda: self.work.planes_ready >= planes or self.work.left_pages, patience_s)
        started = next((started for end, started in self._layers if end >= planes), None)
        if started:
            started.order(_current_stream(self._layout.device))
        return ready

    def written(self) -> None:
        """Says that the pages hold what an early store is to keep; on CUDA, once the caller's current stream has done
        what it holds. The store's own thread reads them from now on."""
        if self._layout.device.type == "cuda":
            self.work.written = torch.cuda.current_stream(self._layout.device).record_event()
        self.work.be_late()

    def layer_written(self, layer: str, patience_s: float) -> bool:
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


class _Started(Protocol):
    """Copies under way, or done."""

    def order(self, stream: int) -> None:
        """What `stream` is given from now on comes behind their last access to pages."""
        ...

    def wait(self) -> list[int]:
        """The payloads' checksums, unsigned; of parts of a payload, they add up to its own."""
        ...


class _Layer(NamedTuple):
    end: int  # planes, from the first on, that it and the layers before it have
    started: _Started


class Chunk(NamedTuple):
    """What is stored under one key: the pages of `tokens` consecutive tokens."""

    key: bytes
    pages: torch.Tensor  # block ids, int64 on the host; -1: a page to be left out
    tokens: int


class Transfer:
    """Moves chunks of at most `largest` bytes between the pages of `layout` and `store`, loads and stores on a thread
    each; both may be under way at once."""

    def __init__(self, layout: KVLayout, store: Store, largest: int) -> None:
        self.layout, self._store = layout, store
        self._in_place = isinstance(store, SlotStore)
        self._step_bytes = SLOTS_BYTES if self._in_place else max(STAGING_BYTES, _whole_pages(largest))
        # Memory for one step's payloads, one a direction, each touched by its one thread only.
        self._load_staging, self._store_staging = self._staging(), self._staging()
        self._by_layer: weakref.WeakSet[Work] = weakref.WeakSet()  # stores
        self._loading, self._storing = (
            _Ring(layout, largest) if layout.device.type == "cuda" else _HostCopies() for _ in range(2)
        )
        if layout.device.type == "cuda" and isinstance(store, SlotStore):
            store.register(layout.device.index)
        self._loads, self._stores = Lane("lmcache_mm load"), Lane("lmcache_mm store")
        close_at_exit(self.close)

    def close(self, patience_s: float | None = None) -> bool:
        """Finishes all jobs; with a patience, those that end within it. Whether these are all. Stores by layers whose
        layers have not all been written are given up."""
        by_layer = list(self._by_layer)
        for work in by_layer:
            work.abandon()
        given_up = [work.lane.close(EXIT_S) for work in by_layer]
        return all([*given_up, *(lane.close(patience_s) for lane in (self._loads, self._stores))])

    def stores_stalled_s(self) -> float:
        """For how long there has been something to store and nothing has moved."""
        return self._stores.stalled_s()

    def load(self, chunks: Sequence[Chunk], owner: bytes, by_layer: bool = False) -> Job[int]:
        """Scatters chunks into their pages, until one is not there or damaged. The result: how many, from the first on,
        were restored and verified. `owner`: as of Store.get_into. by_layer: one layer after the other, for those who
        wait by `Job.layer_ready`; then it is all chunks or none."""
        layers: list[_Layer] = []
        return self._submit(self._loads, self._load, chunks, owner, layers if by_layer else None, layers=layers)

    def store(self, chunks: Sequence[Chunk], owner: bytes, early: bool = False, by_layer: bool = False) -> Job[int]:
        """Gathers the chunks that the store lacks and has room for, and that have all their pages. The result: how many
        tokens were handed to the store. `owner`: as of Store.put. early: the pages are still being written; the store
        is asked already, and they are read by the thread that waits for `Job.pages_free` or, by_layer, that says
        `Job.layer_written`; or by the store's own thread once somebody says `Job.written`. What was forgotten since
        the store was asked for is not stored."""
        try:
            as_of = self._store.moment()
        except Exception:  # it is closed, say, as the job will find
            as_of = 0
        if not by_layer:
            return self._submit(self._stores, self._put, chunks, owner, as_of, self._store_staging, False, early=early)
        # On a thread and with memory of its own: it waits for a forward pass, in which others may be under way.
        try:
            lane, staging = Lane("lmcache_mm store by layers", at_exit=False), self._staging()  # `close` gives it up
        except Exception as error:
            if not is_lack(error):
                raise
            return Job(_nothing(self._stores), self.layout, ())
        job = self._submit(lane, self._put, chunks, owner, as_of, staging, True, early=True)
        self._by_layer.add(job.work)
        return job

    def _staging(self) -> torch.Tensor:
        """uint8 of host memory for the payloads of one step, beginning at a page, pinned where pages are on a GPU."""
        size = 0 if self._in_place else self._step_bytes
        if self.layout.device.type == "cuda" or size == 0:
            return torch.empty(size, dtype=torch.uint8, pin_memory=size > 0)
        return torch.frombuffer(mmap.mmap(-1, size), dtype=torch.uint8)

    def _submit(
        self,
        lane: Lane,
        run: Callable[..., int],
        *arguments: Any,
        early: bool = False,
        layers: Sequence[_Layer] = (),
    ) -> Job[int]:
        """Runs `run` on a lane's thread; on CUDA on a stream of its own, behind what the caller's stream holds now."""
        device = self.layout.device
        if device.type == "cpu":
            return Job(lane.submit(lambda work: _moved(run, work, *arguments), early), self.layout, layers)
        before = torch.cuda.current_stream(device).record_event()

        def on_own_stream(work: Work) -> int:
            stream = torch.cuda.Stream(device)
            stream.wait_event(before)
            with torch.cuda.stream(stream):
                return _moved(run, work, *arguments)

        return Job(lane.submit(on_own_stream, early), self.layout, layers)

    def _touch(self, work: Work, touch: Callable[[], T]) -> T:
        """What `touch` returns: it alone reads or writes pages, which are left alone afterwards."""
        results: list[T] = []

        def touch_all(_: int) -> bool:
            results.append(touch())
            return True

        work.touch_pages(touch_all)
        return results[0]

    def _load(self, work: Work, chunks: Sequence[Chunk], owner: bytes, layers: list[_Layer] | None) -> int:
        loaded = 0
        by_layer = layers is not None
        steps = [list(chunks)] if by_layer and self._in_place and chunks else list(self._steps(chunks))
        for i, step in enumerate(steps, 1):
            if self._in_place:
                good = self._load_slots(work, step, owner, layers)
            else:
                good = self._load_staged(work, step, owner, layers, i == len(steps))
            loaded += good
            if good < len(step):
                return 0 if by_layer else loaded
        return loaded

    def _load_slots(self, work: Work, step: list[Chunk], owner: bytes, layers: list[_Layer] | None) -> int:
        """Scatters straight from the store's slots."""
        store = cast(SlotStore, self._store)
        slots = store.lend([chunk.key for chunk in step], [self._payload_bytes(chunk) for chunk in step], owner)
        lent = [slot for slot in slots if slot]
        try:
            there = lent[: slots.index(None)] if None in slots else lent
            if not there or (layers is not None and len(there) < len(step)):
                return 0
            views = [torch.from_numpy(store.view(slot)) for slot in there]
            if layers is None:
                found = self._scatter(work, step[: len(there)], views, checksums=True)
            else:
                found = self._scatter_layers(work, step, views, layers, verify=True, ready=True)
            matches = [a == slot.checksum for a, slot in zip(found, there, strict=True)]
            for slot, match in zip(there, matches, strict=True):
                if not match:
                    store.discard(slot)
            return len(list(takewhile(bool, matches)))
        finally:
            store.release(lent)

    def _scatter(self, work: Work, chunks: list[Chunk], payloads: list[torch.Tensor], checksums: bool) -> list[int]:
        """The payloads' checksums, if they are asked for."""
        parts = self._parts(chunks, payloads, whole_pages=True)
        sums = self._touch(work, lambda: self._loading.load(self.layout, parts, checksums).wait())
        return [ops.checksum_of_parts([total]) for total in sums]

    def _scatter_layers(
        self,
        work: Work,
        chunks: list[Chunk],
        payloads: list[torch.Tensor],
        layers: list[_Layer],
        verify: bool,
        ready: bool,
    ) -> list[int]:
        """Scatters layer after layer; the payloads' checksums, if they are to be verified. ready: layers are then."""

        def scatter() -> list[list[int]]:
            with _waiting_for_all(layers):
                for i, (end, layout) in enumerate(self._layers):
                    parts = self._parts(chunks, payloads, True, i)
                    started = self._loading.load(layout, parts, verify and self._whole_lanes)
                    layers.append(_Layer(end, started))
                    work.advance(planes=end if ready else 0)
                return [layer.started.wait() for layer in layers]

        sums = self._touch(work, scatter)
        return self._sums_of_layers(payloads, sums) if verify else []

    @cached_property
    def _layers(self) -> list[_Planes]:
        """Of each layer up to which plane it reaches, and a layout of its planes alone."""
        ends = sorted({*self.layout.planes_until.values(), len(self.layout.planes)})
        return [
            _Planes(end, replace(self.layout, planes=self.layout.planes[begin:end]))
            for begin, end in pairwise([0, *ends])
        ]

    @property
    def _whole_lanes(self) -> bool:
        """Whether a layer's part of a payload begins at a lane of the checksum."""
        return self.layout.page_bytes % LANE_BYTES == 0

    def _parts(
        self, chunks: list[Chunk], payloads: list[torch.Tensor], whole_pages: bool, layer: int | None = None
    ) -> list[_Part]:
        """What is to be copied; of one layer: the part of each payload that it has."""
        parts = []
        begin = self._layers[layer - 1].end if layer else 0
        for chunk, payload in zip(chunks, payloads, strict=True):
            offset = begin * len(chunk.pages) * self.layout.page_bytes
            tokens = len(chunk.pages) * self.layout.page_tokens if whole_pages else chunk.tokens
            pages = (chunk.pages.data_ptr(), True, len(chunk.pages), tokens)
            parts.append((*pages, payload.data_ptr() + offset, offset if self._whole_lanes else 0))
        return parts

    def _sums_of_layers(self, payloads: list[torch.Tensor], sums: list[list[int]]) -> list[int]:
        """The payloads' checksums from those of their layers' parts."""
        if self._whole_lanes:
            return [ops.checksum_of_parts(of_payload) for of_payload in zip(*sums, strict=True)]
        return [ops.checksum(payload) for payload in payloads]

    def _load_staged(self, work: Work, step: list[Chunk], owner: bytes, layers: list[_Layer] | None, last: bool) -> int:
        payloads = self._payloads(step, self._load_staging)
        buffers = [payload.numpy().data for payload in payloads]
        found = self._store.get_into([chunk.key for chunk in step], buffers, owner)
        whole = len(list(takewhile(bool, found)))
        if layers is not None and whole == len(step):
            of_step: list[_Layer] = layers if last else []
            self._scatter_layers(work, step, payloads, of_step, verify=False, ready=last)
        elif whole and layers is None:
            self._scatter(work, step[:whole], payloads[:whole], checksums=False)
        return whole

    def _put(
        self, work: Work, chunks: Sequence[Chunk], owner: bytes, as_of: int, staging: torch.Tensor, by_layer: bool
    ) -> int:
        whole = [chunk for chunk in chunks if -1 not in chunk.pages]
        if not self._in_place:
            present = self._store.contains([chunk.key for chunk in whole])
            whole = [chunk for chunk, there in zip(whole, present, strict=True) if not there]
        steps = [whole] if by_layer and self._in_place and whole else list(self._steps(whole))
        if self._in_place:
            return sum(self._store_slots(work, step, owner, as_of, by_layer, step is steps[-1]) for step in steps)
        return sum(self._store_staged(work, step, owner, as_of, staging, by_layer, step is steps[-1]) for step in steps)

    def _store_slots(self, work: Work, step: list[Chunk], owner: bytes, as_of: int, by_layer: bool, last: bool) -> int:
        """Gathers straight into slots of the store; of how many tokens."""
        store = cast(SlotStore, self._store)
        sizes = [self._payload_bytes(chunk) for chunk in step]
        slots = store.reserve([chunk.key for chunk in step], sizes, owner, as_of)
        reserved = [slot for slot in slots if slot]
        chunks = [chunk for chunk, slot in zip(step, slots, strict=True) if slot]
        if not chunks:
            return 0
        try:
            sums = self._gather(work, chunks, [torch.from_numpy(store.view(slot)) for slot in reserved], by_layer, last)
        except BaseException:
            store.abandon(reserved)
            raise
        store.publish(reserved, sums)
        return sum(chunk.tokens for chunk in chunks)

    def _store_staged(
        self, work: Work, step: list[Chunk], owner: bytes, as_of: int, staging: torch.Tensor, by_layer: bool, last: bool
    ) -> int:
        payloads = self._payloads(step, staging)
        sums = self._gather(work, step, payloads, by_layer, last)
        buffers = [payload.numpy().data for payload in payloads]
        self._store.put([chunk.key for chunk in step], buffers, owner, sums, as_of)
        return sum(chunk.tokens for chunk in step)

    def _gather(
        self, work: Work, chunks: list[Chunk], payloads: list[torch.Tensor], by_layer: bool, last: bool
    ) -> list[int]:
        """Fills host memory with the chunks' payloads, layer by layer as they are written if `by_layer`; their
        checksums."""
        started: list[_Layer] = []
        layers = self._layers if by_layer else [_Planes(len(self.layout.planes), self.layout)]

        def gather(planes: int) -> bool:
            if work.written is not None:
                torch.cuda.current_stream(self.layout.device).wait_event(work.written)
            for i, (end, layout) in enumerate(layers[len(started) :], len(started)):
                if end > planes:
                    return False
                parts = self._parts(chunks, payloads, self.layout.opaque, i)
                copies = self._storing.store(layout, parts, self._whole_lanes or not by_layer)
                started.append(_Layer(end, copies))
            if work.early:  # the caller's thread goes on, its stream behind the reads
                started[-1].started.order(_current_stream(self.layout.device))
            else:
                started[-1].started.wait()
            return True

        with _waiting_for_all(started):
            work.touch_pages(gather, last)
            sums = [layer.started.wait() for layer in started]
        if len(sums) != len(layers):
            raise RuntimeError(f"store: {len(sums)} of {len(layers)} layers were read")
        return self._sums_of_layers(payloads, sums) if by_layer else [ops.checksum_of_parts([s]) for s in sums[0]]

    def _payload_bytes(self, chunk: Chunk) -> int:
        return self.layout.payload_bytes(len(chunk.pages))

    def _steps(self, chunks: Sequence[Chunk]) -> Iterator[list[Chunk]]:
        """The chunks in steps of at most so many bytes as there is memory for, or of one chunk."""
        step: list[Chunk] = []
        room = self._step_bytes
        for chunk in chunks:
            size = _whole_pages(self._payload_bytes(chunk))
            if step and size > room:
                yield step
                step, room = [], self._step_bytes
            step.append(chunk)
            room -= size
        if step:
            yield step

    def _payloads(self, step: list[Chunk], staging: torch.Tensor) -> list[torch.Tensor]:
        """Of each chunk its payload in staging memory, each beginning at a page, as disks like it."""
        payloads = []
        begin = 0
        for chunk in step:
            size = self._payload_bytes(chunk)
            payloads.append(staging[begin : begin + size])
            begin += _whole_pages(size)
        return payloads


def _moved(run: Callable[..., int], work: Work, *arguments: Any) -> int:
    """What `run` returns; 0 where there is no memory for it: that is a miss, or something not stored."""
    try:
        return run(work, *arguments)
    except Exception as error:
        if is_lack(error):
            return 0
        raise


def _nothing(lane: Lane) -> Work:
    """Work that is done, and was nothing."""
    work = Work(lane)
    work.future.set_result(0)
    work.advance(left_pages=True)
    return work


@contextmanager
def _waiting_for_all(layers: list[_Layer]) -> Iterator[None]:
    """Of copies that were begun, none is under way when an exception leaves: what they read and write is given back."""
    try:
        yield
    except BaseException:
        for layer in layers:
            with suppress(Exception):
                layer.started.wait()
        raise


_Part = tuple[int, bool, int, int, int, int]  # ids, that they are int64, pages, tokens, payload, offset: see csrc


class _Planes(NamedTuple):
    """The first planes of a cache, up to `end`, or a layer's, which end there."""

    end: int
    layout: KVLayout


class _Done(NamedTuple):
    """See `_Started`."""

    sums: list[int]

    def order(self, stream: int) -> None:
        pass

    def wait(self) -> list[int]:
        return self.sums


class _HostCopies:
    """Copies between pages and payloads on the CPU, by the thread that asks for them."""

    def store(self, layout: KVLayout, parts: list[_Part], checksums: bool) -> _Started:
        return self._copy(_C.gather, layout, parts, checksums)

    def load(self, layout: KVLayout, parts: list[_Part], checksums: bool) -> _Started:
        return self._copy(_C.scatter, layout, parts, checksums)

    def _copy(self, copy: Callable[..., None], layout: KVLayout, parts: list[_Part], checksums: bool) -> _Started:
        sums = torch.empty(len(parts) if checksums else 0, dtype=torch.uint64)
        copy(layout.compiled, False, parts, sums.data_ptr() if checksums else 0, ops.THREADS)
        return _Done(cast(list[int], sums.tolist()))


class _Ring:
    """Copies between a GPU's pages and pinned memory, in one direction, behind the caller's current stream: see
    csrc/transfer.cu."""

    def __init__(self, layout: KVLayout, largest: int) -> None:
        self._device, self._planes = layout.device, len(layout.planes)
        self._lock = threading.Lock()  # stores by layers have a thread each
        pages = largest // layout.payload_bytes(1)
        buffer_bytes = max(RING_BUFFER_BYTES, _C.cuda_least_buffer_bytes(layout.compiled, pages))
        memory = torch.empty(RING_BUFFERS * buffer_bytes, dtype=torch.uint8, device=layout.device)
        torch.cuda.current_stream(layout.device).synchronize()  # what had this memory before is done with it
        self._staging = _C.CudaStaging(layout.device.index, memory.data_ptr(), buffer_bytes, RING_BUFFERS)
        self._memory = memory  # let go behind what uses it
        self._paths = transfer_paths.of_device(layout.device)

    def store(self, layout: KVLayout, parts: list[_Part], checksums: bool) -> _Started:
        least = self._paths.store_fragment_bytes(_bytes_of(layout, parts))
        with self._lock:
            return self._staging.store(layout.compiled, parts, _current_stream(self._device), least)

    def load(self, layout: KVLayout, parts: list[_Part], checksums: bool) -> _Started:
        least = self._paths.load_fragment_bytes(_bytes_of(layout, parts))
        blocks = self._paths.layer_blocks if len(layout.planes) < self._planes else 0
        with self._lock:
            return self._staging.load(layout.compiled, parts, checksums, _current_stream(self._device), least, blocks)


def _bytes_of(layout: KVLayout, parts: list[_Part]) -> int:
    return sum(layout.payload_bytes(pages) for _, _, pages, *_ in parts)


def _current_stream(device: torch.device) -> int:
    """Its handle; 0 where there are none."""
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0


def _whole_pages(size: int) -> int:
    return -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
