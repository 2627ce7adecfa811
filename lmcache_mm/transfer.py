"""Chunks between pages and a store: in place where the store has slots in memory, else through staging memory."""

from __future__ import annotations

import mmap
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import takewhile
from typing import Any, Generic, NamedTuple, TypeVar, cast

import torch

from lmcache_mm import ops
from lmcache_mm.layout import KVLayout
from lmcache_mm.stores import SlotStore, Store

S = TypeVar("S")
T = TypeVar("T")
STAGING_BYTES = 16 << 20  # least memory for the payloads of one step between pages and store
SLOTS_BYTES = 256 << 20  # of slots that are held at once


class Job(Generic[T]):
    """A retrieve or store under way. Pages it reads or writes must be left alone until it is done; on CUDA it begins
    behind the work that the caller's current stream held when it was asked for."""

    def __init__(self, future: Future[Any], result_of: Callable[[Any], T] = lambda result: result) -> None:
        self._future, self._result_of = future, result_of

    def done(self) -> bool:
        return self._future.done()

    def wait(self, timeout_s: float | None = None) -> T:
        """The job's result; TimeoutError if it is not there after `timeout_s` seconds."""
        return self._result_of(self._future.result(timeout_s))

    def then(self, result_of: Callable[[T], S]) -> Job[S]:
        """The same job with another result, made from this one's."""
        return Job(self._future, lambda result: result_of(self._result_of(result)))


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
        if isinstance(store, SlotStore) and layout.device.type == "cuda":
            store.register(layout.device.index)
        self._loads = ThreadPoolExecutor(1, "lmcache_mm load")
        self._stores = ThreadPoolExecutor(1, "lmcache_mm store")

    def close(self) -> None:
        """Finishes all jobs."""
        self._loads.shutdown()
        self._stores.shutdown()

    def load(self, chunks: Sequence[Chunk], owner: bytes) -> Job[int]:
        """Scatters chunks into their pages, until one is not there or damaged. The result: how many, from the first on,
        were restored and verified. `owner`: as of Store.get_into."""
        return self._submit(self._loads, self._load, chunks, owner)

    def store(self, chunks: Sequence[Chunk], owner: bytes) -> Job[int]:
        """Gathers the chunks that the store lacks and that have all their pages. The result: how many tokens were
        handed to the store. `owner`: as of Store.put."""
        return self._submit(self._stores, self._put, chunks, owner)

    def _submit(self, pool: ThreadPoolExecutor, work: Callable[..., int], *arguments: Any) -> Job[int]:
        """Runs `work` on a thread of `pool`; on CUDA on a stream of its own, behind what the caller's stream holds now,
        and finished on the device when the job is."""
        device = self.layout.device
        if device.type == "cpu":
            return Job(pool.submit(work, *arguments))
        before = torch.cuda.current_stream(device).record_event()

        def on_own_stream() -> int:
            stream = torch.cuda.Stream(device)
            stream.wait_event(before)
            with torch.cuda.stream(stream):
                result = work(*arguments)
            stream.synchronize()
            return result

        return Job(pool.submit(on_own_stream))

    def _load(self, chunks: Sequence[Chunk], owner: bytes) -> int:
        loaded = 0
        for step in self._steps(chunks):
            good = self._load_slots(step, owner) if self._in_place else self._load_staged(step, owner)
            loaded += good
            if good < len(step):
                break
        return loaded

    def _load_slots(self, step: list[Chunk], owner: bytes) -> int:
        """Scatters straight from the store's slots."""
        store = cast(SlotStore, self._store)
        slots = store.lend([chunk.key for chunk in step], [self._payload_bytes(chunk) for chunk in step], owner)
        lent = [slot for slot in slots if slot]
        try:
            there = lent[: slots.index(None)] if None in slots else lent
            if not there:
                return 0
            device = self.layout.device
            matched = ops.scatter_pages(
                self.layout,
                [chunk.pages for chunk in step[: len(there)]],
                [torch.from_numpy(store.view(slot)).to(device) for slot in there],
                checksums=torch.tensor([slot.checksum for slot in there], device=device),
            )
            matches: list[bool] = cast(torch.Tensor, matched).tolist()
            for slot, match in zip(there, matches, strict=True):
                if not match:
                    store.discard(slot)
            return len(list(takewhile(bool, matches)))
        finally:
            store.release(lent)

    def _load_staged(self, step: list[Chunk], owner: bytes) -> int:
        payloads = self._payloads(step, self._load_staging)
        buffers = [payload.numpy().data for payload in payloads]
        found = self._store.get_into([chunk.key for chunk in step], buffers, owner)
        whole = len(list(takewhile(bool, found)))
        if whole:
            on_device = [payload.to(self.layout.device) for payload in payloads[:whole]]
            ops.scatter_pages(self.layout, [chunk.pages for chunk in step[:whole]], on_device)
        return whole

    def _put(self, chunks: Sequence[Chunk], owner: bytes) -> int:
        present = self._store.contains([chunk.key for chunk in chunks])
        missing = [c for c, there in zip(chunks, present, strict=True) if not there and -1 not in c.pages]
        for step in self._steps(missing):
            if self._in_place:
                self._store_slots(step, owner)
            else:
                payloads = self._payloads(step, self._store_staging)
                sums = self._gather(step, payloads)
                buffers = [payload.numpy().data for payload in payloads]
                self._store.put([chunk.key for chunk in step], buffers, owner, sums)
        return sum(chunk.tokens for chunk in missing)

    def _store_slots(self, step: list[Chunk], owner: bytes) -> None:
        """Gathers straight into slots of the store."""
        store = cast(SlotStore, self._store)
        slots = store.reserve([chunk.key for chunk in step], [self._payload_bytes(chunk) for chunk in step], owner)
        reserved = [slot for slot in slots if slot]
        if not reserved:
            return
        try:
            chunks = [chunk for chunk, slot in zip(step, slots, strict=True) if slot]
            sums = self._gather(chunks, [torch.from_numpy(store.view(slot)) for slot in reserved])
        except BaseException:
            store.abandon(reserved)
            raise
        store.publish(reserved, sums)

    def _gather(self, chunks: list[Chunk], payloads: list[torch.Tensor]) -> list[int]:
        """Fills host memory with the chunks' payloads; their checksums."""
        device = self.layout.device
        tokens = None if self.layout.opaque else [chunk.tokens for chunk in chunks]
        sums = torch.empty(len(chunks), dtype=torch.int64, device=device)
        gathered = payloads
        if device.type != "cpu":
            gathered = [torch.empty_like(payload, device=device) for payload in payloads]
        ops.gather_pages(self.layout, [chunk.pages for chunk in chunks], gathered, tokens=tokens, checksums=sums)
        if gathered is not payloads:
            for payload, source in zip(payloads, gathered, strict=True):
                payload.copy_(source)
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


def _whole_pages(size: int) -> int:
    return -(-size // mmap.PAGESIZE) * mmap.PAGESIZE


def _staging(size: int, device: torch.device) -> torch.Tensor:
    """uint8 [size] of host memory that begins at a page, pinned where pages are on a GPU."""
    if device.type == "cuda" or size == 0:
        return torch.empty(size, dtype=torch.uint8, pin_memory=size > 0)
    return torch.frombuffer(mmap.mmap(-1, size), dtype=torch.uint8)
