"""Chunks between pages and a store: in place where the store has slots in memory, else through staging memory."""

from __future__ import annotations

import mmap
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import cached_property, partial
from itertools import pairwise, takewhile
from typing import Any, Generic, NamedTuple, TypeVar, cast

import torch

from lmcache_mm import _C, ops
from lmcache_mm.lane import Lane, Work
from lmcache_mm.layout import KVLayout
from lmcache_mm.stores import SlotStore, Store

S = TypeVar("S")
T = TypeVar("T")
STAGING_BYTES = 16 << 20  # least memory for the payloads of one step between pages and store
SLOTS_BYTES = 256 << 20  # of slots that are held at once
LANE_BYTES = 16  # of the checksum
RING_BUFFERS, RING_BUFFER_BYTES = 3, 16 << 20  # in a GPU's memory, for each direction


class Job(Generic[T]):
    """A retrieve or store under way. Pages it reads or writes must be left alone until `pages_free`; on CUDA it begins
    behind the work that the caller's current stream held when it was asked for."""

    def __init__(self, work: Work, layout: KVLayout, result_of: Callable[[Any], T] = lambda result: result) -> None:
        self._work, self._layout, self._result_of = work, layout, result_of

    def done(self) -> bool:
        return self._work.future.done()

    def wait(self, timeout_s: float | None = None) -> T:
        """The job's result; TimeoutError if it is not there after `timeout_s` seconds, Abandoned if it never will."""
        return self._result_of(self._work.future.result(timeout_s))

    def then(self, result_of: Callable[[T], S]) -> Job[S]:
        """The same job with another result, made from this one's."""
        return Job(self._work, self._layout, lambda result: result_of(self._result_of(result)))

    def give_up(self, patience_s: float) -> bool:
        """Whether the job was abandoned, for nothing moved for `patience_s` seconds: its pages are left alone then."""
        return self._work.give_up(patience_s)

    def abandon(self) -> bool:
        """Gives the job up, unless it is at its pages this moment. True: it will leave them alone."""
        return self._work.abandon()

    def pages_free(self, patience_s: float) -> bool:
        """Returns when the job has done with its pages, though it may go on with what it has read. False: it made no
        progress for `patience_s` seconds (a store hangs, say) and was abandoned: its pages are left alone too.

        The pages of a store that was asked for early are read in here."""
        return self._work.leave_pages(patience_s)

    def layer_ready(self, layer: str, patience_s: float) -> bool:
        """Returns when a load by layers has filled the layer's pages, which are not verified before `wait`, or ended.
        False: as of `pages_free`. ValueError for a layer that the layout does not name."""
        if layer not in self._layout.planes_until:
            raise ValueError(f"layer: expected one of {', '.join(self._layout.planes_until)}, got {layer!r}")
        planes = self._layout.planes_until[layer]
        return self._work.wait_for(lambda: self._work.planes_ready >= planes or self._work.left_pages, patience_s)


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
        staging_bytes = 0 if self._in_place else self._step_bytes
        self._load_staging, self._store_staging = (_staging(staging_bytes, layout.device) for _ in range(2))
        if layout.device.type == "cuda":
            self._load_ring, self._store_ring = (_Ring(layout, largest) for _ in range(2))
            if isinstance(store, SlotStore):
                store.register(layout.device.index)
        self._loads, self._stores = Lane("lmcache_mm load"), Lane("lmcache_mm store")

    def close(self, patience_s: float | None = None) -> bool:
        """Finishes all jobs; with a patience, those that end within it. Whether these are all."""
        return all([lane.close(patience_s) for lane in (self._loads, self._stores)])

    def stores_stalled_s(self) -> float:
        """For how long there has been something to store and nothing has moved."""
        return self._stores.stalled_s()

    def load(self, chunks: Sequence[Chunk], owner: bytes, by_layer: bool = False) -> Job[int]:
        """Scatters chunks into their pages, until one is not there or damaged. The result: how many, from the first on,
        were restored and verified. `owner`: as of Store.get_into. by_layer: one layer after the other, for those who
        wait by `Job.layer_ready`; then it is all chunks or none."""
        return self._submit(self._loads, self._load, chunks, owner, by_layer)

    def store(self, chunks: Sequence[Chunk], owner: bytes, early: bool = False) -> Job[int]:
        """Gathers the chunks that the store lacks and has room for, and that have all their pages. The result: how many
        tokens were handed to the store. `owner`: as of Store.put. early: the pages are still being written; the store
        is asked already, and they are read by the thread that waits for `Job.pages_free`."""
        return self._submit(self._stores, self._put, chunks, owner, early=early)

    def _submit(self, lane: Lane, run: Callable[..., int], *arguments: Any, early: bool = False) -> Job[int]:
        """Runs `run` on a lane's thread; on CUDA on a stream of its own, behind what the caller's stream holds now."""
        device = self.layout.device
        if device.type == "cpu":
            return Job(lane.submit(lambda work: run(work, *arguments), early), self.layout)
        before = torch.cuda.current_stream(device).record_event()

        def on_own_stream(work: Work) -> int:
            stream = torch.cuda.Stream(device)
            stream.wait_event(before)
            with torch.cuda.stream(stream):
                return run(work, *arguments)

        return Job(lane.submit(on_own_stream, early), self.layout)

    def _touch(self, work: Work, touch: Callable[[], T], last: bool = False) -> T:
        """What `touch` returns: it alone reads or writes pages. They are left alone afterwards; last: for good."""
        results: list[T] = []
        work.touch_pages(lambda: results.append(touch()), last)
        return results[0]

    def _load(self, work: Work, chunks: Sequence[Chunk], owner: bytes, by_layer: bool) -> int:
        loaded = 0
        steps = [list(chunks)] if by_layer and self._in_place and chunks else list(self._steps(chunks))
        for i, step in enumerate(steps, 1):
            if self._in_place:
                good = self._load_slots(work, step, owner, by_layer)
            else:
                good = self._load_staged(work, step, owner, by_layer, i == len(steps))
            loaded += good
            if good < len(step):
                return 0 if by_layer else loaded
        return loaded

    def _load_slots(self, work: Work, step: list[Chunk], owner: bytes, by_layer: bool) -> int:
        """Scatters straight from the store's slots."""
        store = cast(SlotStore, self._store)
        slots = store.lend([chunk.key for chunk in step], [self._payload_bytes(chunk) for chunk in step], owner)
        lent = [slot for slot in slots if slot]
        try:
            there = lent[: slots.index(None)] if None in slots else lent
            if not there or (by_layer and len(there) < len(step)):
                return 0
            views = [torch.from_numpy(store.view(slot)) for slot in there]
            expected = [slot.checksum for slot in there]
            if by_layer:
                found = self._scatter_layers(work, step, views, ready=True)
                matches = [a == b for a, b in zip(found, expected, strict=True)]
            else:
                matches = self._scatter(work, step[: len(there)], views, expected)
            for slot, match in zip(there, matches, strict=True):
                if not match:
                    store.discard(slot)
            return len(list(takewhile(bool, matches)))
        finally:
            store.release(lent)

    def _scatter(
        self, work: Work, chunks: list[Chunk], payloads: list[torch.Tensor], checksums: list[int] | None
    ) -> list[bool]:
        """Whether each payload has its checksum; without any, they have been verified."""
        pages = [chunk.pages for chunk in chunks]
        if self.layout.device.type == "cuda":
            matches = self._touch(work, lambda: self._load_ring.load(chunks, payloads, checksums).wait())
            return [bool(match) for match in matches] if checksums is not None else [True] * len(chunks)
        sums = None if checksums is None else torch.tensor(checksums)
        matched = self._touch(work, lambda: ops.scatter_pages(self.layout, pages, payloads, checksums=sums))
        return [True] * len(chunks) if matched is None else cast(list[bool], matched.tolist())

    def _scatter_layers(self, work: Work, chunks: list[Chunk], payloads: list[torch.Tensor], ready: bool) -> list[int]:
        """Scatters layer after layer; the payloads' checksums. ready: they are then."""
        begin = 0
        pages = [chunk.pages for chunk in chunks]
        plane_bytes = [len(chunk.pages) * self.layout.page_bytes for chunk in chunks]
        parts_of: list[list[int]] = [[] for _ in chunks]
        for end, planes in self._layers:
            layer = [p[begin * size : end * size] for p, size in zip(payloads, plane_bytes, strict=True)]
            self._touch(work, partial(self._scatter_layer, planes, pages, layer))
            work.advance(planes=end if ready else 0)
            for i, (payload, size) in enumerate(zip(payloads, plane_bytes, strict=True)):
                # Parts of a checksum begin at whole lanes.
                first, last = begin * size // LANE_BYTES * LANE_BYTES, end * size // LANE_BYTES * LANE_BYTES
                last = len(payload) if end == len(self.layout.planes) else last
                if last > first:
                    parts_of[i].append(_C.checksum_part(payload.data_ptr() + first, last - first, first, len(payload)))
            begin = end
        return [ops.checksum_of_parts(parts) for parts in parts_of]

    @cached_property
    def _layers(self) -> list[tuple[int, KVLayout]]:
        """Of each layer up to which plane it reaches, and a layout of its planes alone."""
        ends = sorted({*self.layout.planes_until.values(), len(self.layout.planes)})
        return [
            (end, replace(self.layout, planes=self.layout.planes[begin:end])) for begin, end in pairwise([0, *ends])
        ]

    def _scatter_layer(self, planes: KVLayout, pages: list[torch.Tensor], parts: list[torch.Tensor]) -> None:
        device = self.layout.device
        ops.scatter_pages(planes, pages, [part.to(device) for part in parts])
        if device.type == "cuda":
            torch.cuda.current_stream(device).synchronize()

    def _load_staged(self, work: Work, step: list[Chunk], owner: bytes, by_layer: bool, last: bool) -> int:
        payloads = self._payloads(step, self._load_staging)
        buffers = [payload.numpy().data for payload in payloads]
        found = self._store.get_into([chunk.key for chunk in step], buffers, owner)
        whole = len(list(takewhile(bool, found)))
        if by_layer and whole == len(step):
            self._scatter_layers(work, step, payloads, last)
        elif whole and not by_layer:
            self._scatter(work, step[:whole], payloads[:whole], None)
        return whole

    def _put(self, work: Work, chunks: Sequence[Chunk], owner: bytes) -> int:
        whole = [chunk for chunk in chunks if -1 not in chunk.pages]
        if not self._in_place:
            present = self._store.contains([chunk.key for chunk in whole])
            whole = [chunk for chunk, there in zip(whole, present, strict=True) if not there]
        steps = list(self._steps(whole))
        store = self._store_slots if self._in_place else self._store_staged
        return sum(store(work, step, owner, i == len(steps)) for i, step in enumerate(steps, 1))

    def _store_slots(self, work: Work, step: list[Chunk], owner: bytes, last: bool) -> int:
        """Gathers straight into slots of the store; of how many tokens."""
        store = cast(SlotStore, self._store)
        slots = store.reserve([chunk.key for chunk in step], [self._payload_bytes(chunk) for chunk in step], owner)
        reserved = [slot for slot in slots if slot]
        chunks = [chunk for chunk, slot in zip(step, slots, strict=True) if slot]
        if not chunks:
            return 0
        try:
            sums = self._gather(work, chunks, [torch.from_numpy(store.view(slot)) for slot in reserved], last)
        except BaseException:
            store.abandon(reserved)
            raise
        store.publish(reserved, sums)
        return sum(chunk.tokens for chunk in chunks)

    def _store_staged(self, work: Work, step: list[Chunk], owner: bytes, last: bool) -> int:
        payloads = self._payloads(step, self._store_staging)
        sums = self._gather(work, step, payloads, last)
        self._store.put([chunk.key for chunk in step], [payload.numpy().data for payload in payloads], owner, sums)
        return sum(chunk.tokens for chunk in step)

    def _gather(self, work: Work, chunks: list[Chunk], payloads: list[torch.Tensor], last: bool) -> list[int]:
        """Fills host memory with the chunks' payloads; their checksums."""
        if self.layout.device.type == "cuda":
            store = partial(self._store_ring.store, chunks, payloads, self.layout.opaque, wait=not work.early)
            return [ops.checksum_of_parts([total]) for total in self._touch(work, store, last).wait()]
        tokens = None if self.layout.opaque else [chunk.tokens for chunk in chunks]
        sums = torch.empty(len(chunks), dtype=torch.int64)
        pages = [chunk.pages for chunk in chunks]
        gather = partial(ops.gather_pages, self.layout, pages, payloads, tokens=tokens, checksums=sums)
        self._touch(work, gather, last)
        return cast(list[int], sums.tolist())

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


class _Ring:
    """Transfers between the GPU pages of a layout and pinned memory, in one direction: see csrc/transfer.cu."""

    def __init__(self, layout: KVLayout, largest: int) -> None:
        self._layout = layout
        pages = largest // layout.payload_bytes(1)
        self._buffer_bytes = max(RING_BUFFER_BYTES, _C.cuda_least_buffer_bytes(layout.compiled, pages))
        self._memory = torch.empty(RING_BUFFERS * self._buffer_bytes, dtype=torch.uint8, device=layout.device)
        self._staging = _C.CudaStaging(layout.device.index, self._memory.data_ptr(), self._buffer_bytes, RING_BUFFERS)

    def store(
        self, chunks: list[Chunk], payloads: list[torch.Tensor], whole_pages: bool, wait: bool
    ) -> _C.CudaTransfer:
        """Behind what the caller's stream holds. What that is given afterwards comes behind the reads of pages; with
        `wait` the call does."""
        stream = torch.cuda.current_stream(self._layout.device).cuda_stream
        transfer = self._staging.store(self._layout.compiled, self._plain(chunks, payloads, whole_pages), stream)
        if wait:
            transfer.wait()
        else:
            transfer.order(stream)
        return transfer

    def load(self, chunks: list[Chunk], payloads: list[torch.Tensor], checksums: list[int] | None) -> _C.CudaTransfer:
        stream = torch.cuda.current_stream(self._layout.device).cuda_stream
        expected = [total % (1 << 64) for total in checksums or ()]
        return self._staging.load(self._layout.compiled, self._plain(chunks, payloads, True), expected, stream)

    def _plain(
        self, chunks: list[Chunk], payloads: list[torch.Tensor], whole_pages: bool
    ) -> list[tuple[int, bool, int, int, int]]:
        size = self._layout.page_tokens
        return [
            (
                *(chunk.pages.data_ptr(), True, len(chunk.pages)),
                len(chunk.pages) * size if whole_pages else chunk.tokens,
                payload.data_ptr(),
            )
            for chunk, payload in zip(chunks, payloads, strict=True)
        ]


def _whole_pages(size: int) -> int:
    return -(-size // mmap.PAGESIZE) * mmap.PAGESIZE


def _staging(size: int, device: torch.device) -> torch.Tensor:
    """uint8 [size] of host memory that begins at a page, pinned where pages are on a GPU."""
    if device.type == "cuda" or size == 0:
        return torch.empty(size, dtype=torch.uint8, pin_memory=size > 0)
    return torch.frombuffer(mmap.mmap(-1, size), dtype=torch.uint8)
