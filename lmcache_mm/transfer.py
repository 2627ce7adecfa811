"""Moves chunks between pages and a store: in place if the store has slots in memory, else through staging memory."""

from __future__ import annotations

import mmap
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, wait
from functools import partial
from itertools import takewhile
from typing import TYPE_CHECKING, Any, cast

import torch

from lmcache_mm.copies import Copies, current_event, whole_pages
from lmcache_mm.job import Job
from lmcache_mm.lane import EXIT_S, Lane, Work, close_at_exit
from lmcache_mm.layout import KVLayout
from lmcache_mm.payloads import Chunk, Payloads
from lmcache_mm.stores.arguments import unless_lacking
from lmcache_mm.stores.store import SlotStore, Store

if TYPE_CHECKING:
    from lmcache_mm.stores.local.slab import Slot

STAGING_BYTES = 16 << 20  # least staging memory for the payloads of one step
SLOTS_BYTES = 256 << 20  # most bytes of slots held at once


class Transfer:
    """Moves chunks of at most `largest` bytes between the pages of `layout` and `store`. Loads and stores have one
    thread each, and both may run at once.

    moved: called on those threads as moved("load" or "store", seconds, bytes). The seconds of a load count from the
    request for it, those of a store from the first page read. coding: the result of `codec.of_layout`."""

    def __init__(
        self,
        layout: KVLayout,
        store: Store,
        largest: int,
        moved: Callable[[str, float, int], None] | None = None,
        coding: str | None = None,
    ) -> None:
        self.layout, self._store, self._moved = layout, store, moved
        self._in_place = isinstance(store, SlotStore)
        self._step_bytes = SLOTS_BYTES if self._in_place else max(STAGING_BYTES, whole_pages(largest))
        # Memory for the payloads of a step and of the next, each used by one job at a time.
        self._load_staging, self._store_staging = self._staging(2), self._staging(2)
        self._by_layer: weakref.WeakSet[Work] = weakref.WeakSet()  # stores by layers
        self._payloads = Payloads(layout, largest, coding is not None)
        self._raw_bytes = self._stored_bytes = 0  # of stored chunks, before and after coding, since they were taken
        self._counting = threading.Lock()
        if layout.device.type == "cuda" and isinstance(store, SlotStore):
            store.register(layout.device.index)
        self._loads, self._stores = Lane("lmcache_mm load"), Lane("lmcache_mm store")
        # Through staging memory, the store is used on these while the threads above touch pages; those wait for them.
        self._reads, self._puts = self._loads, self._stores
        if not self._in_place:
            self._reads, self._puts = (Lane(f"lmcache_mm {what}", at_exit=False) for what in ("read ahead", "put"))
        close_at_exit(self.close)

    def close(self, patience_s: float | None = None) -> bool:
        """Finishes all jobs, or those that end within patience_s if given. Returns whether all are done. Gives up
        stores by layers whose layers have not all been written."""
        by_layer = list(self._by_layer)
        for work in by_layer:
            work.abandon()
        given_up = [work.lane.close(EXIT_S) for work in by_layer]
        done = all([*given_up, *(lane.close(patience_s) for lane in (self._loads, self._stores))])
        return done and all([lane.close(patience_s) for lane in (self._reads, self._puts)])

    def stores_stalled_s(self) -> float:
        """How long stores have been pending without progress."""
        return self._stores.stalled_s()

    def take_bytes(self) -> tuple[int, int]:
        """The bytes of chunks stored since the last call, before and after coding."""
        with self._counting:
            taken = self._raw_bytes, self._stored_bytes
            self._raw_bytes = self._stored_bytes = 0
        return taken

    def load(self, chunks: Sequence[Chunk], owner: bytes, by_layer: bool = False) -> Job[int]:
        """Scatters chunks into their pages, up to the first that is missing or damaged. The result: how many, from the
        first on, were restored and verified. `owner`: as in Store.get_into. by_layer: loads one layer after the other,
        for callers that wait with `Job.layer_ready`; then it restores all chunks or none."""
        copies: list[Copies] = []
        asked = time.perf_counter()
        return self._submit(
            self._loads, self._load, asked, chunks, owner, copies if by_layer else None, by_layer=copies
        )

    def store(self, chunks: Sequence[Chunk], owner: bytes, early: bool = False, by_layer: bool = False) -> Job[int]:
        """Gathers the chunks that have all their pages and that the store lacks and has room for. The result: how many
        tokens were handed to the store, without `repeated` ones. `owner`: as in Store.put. early: the pages are still
        being written. The store is queried at once; the pages are read by the thread that calls `Job.pages_free`
        (by_layer: `Job.layer_written`), or by the store's own thread after a call of `Job.written`. Does not store for
        an owner that was forgotten after this call."""
        try:
            as_of = self._store.moment()
        except Exception:  # for example, the store is closed; the job will fail for the same reason
            as_of = 0
        if not by_layer:
            return self._submit(self._stores, self._put, chunks, owner, as_of, self._store_staging, False, early=early)
        # It needs its own thread and memory: it waits for a forward pass, while other stores may run.
        name = "lmcache_mm store by layers"  # `close` gives it up
        made = unless_lacking(lambda: (Lane(name, at_exit=False), self._staging(1)), None)
        if made is None:
            return Job(_nothing(self._stores), self.layout, ())
        lane, staging = made
        job = self._submit(lane, self._put, chunks, owner, as_of, staging, True, early=True)
        self._by_layer.add(job._work)
        return job

    def _staging(self, steps: int) -> list[torch.Tensor]:
        """Host memory for the payloads of each of so many steps, uint8, page-aligned, pinned if pages are on a GPU."""
        size = 0 if self._in_place else self._step_bytes * steps
        if self.layout.device.type == "cuda" or size == 0:
            memory = torch.empty(size, dtype=torch.uint8, pin_memory=size > 0)
        else:
            memory = torch.frombuffer(mmap.mmap(-1, size), dtype=torch.uint8)
        return list(memory.split(self._step_bytes))

    def _submit(
        self,
        lane: Lane,
        run: Callable[..., int],
        *arguments: Any,
        early: bool = False,
        by_layer: Sequence[Copies] = (),
    ) -> Job[int]:
        """Runs `run` on the lane's thread, with an event after the work that the caller's stream holds now."""
        behind = current_event(self.layout.device)
        # Without memory, nothing is moved: a load is a miss, and a store stores nothing.
        moved = lane.submit(lambda work: unless_lacking(lambda: run(work, behind, *arguments), 0), early)
        return Job(moved, self.layout, by_layer)

    def _load(
        self,
        work: Work,
        behind: Any,
        asked: float,
        chunks: Sequence[Chunk],
        owner: bytes,
        by_layer: list[Copies] | None,
    ) -> int:
        loaded = 0
        whole = by_layer is not None
        steps = [list(chunks)] if whole and self._in_place and chunks else list(self._steps(chunks))
        if not self._in_place:
            loaded = self._load_staged(work, behind, steps, owner, by_layer)
        for step in steps if self._in_place else []:
            good = self._load_slots(work, behind, step, owner, by_layer if step is steps[-1] else None, whole)
            loaded += good
            if good < len(step):
                break
        if whole and loaded < len(chunks):
            loaded = 0
        self._tell("load", asked, chunks[:loaded])
        return loaded

    def _tell(self, direction: str, since: float, chunks: Sequence[Chunk]) -> None:
        if self._moved and chunks:
            size = sum(self._payloads.raw_bytes(chunk) for chunk in chunks)
            self._moved(direction, time.perf_counter() - since, size)

    def _load_slots(
        self, work: Work, behind: Any, step: list[Chunk], owner: bytes, by_layer: list[Copies] | None, whole: bool
    ) -> int:
        """Scatters directly from the store's slots; if `whole`, all chunks or none."""
        store = cast(SlotStore, self._store)
        lent: list[Slot] = []
        try:
            slots, coded = self._lend(store, step, owner, lent)
            good = slots.index(None) if None in slots else len(slots)
            if not good or (whole and good < len(step)):
                return 0
            there = [slot for slot in slots[:good] if slot]
            views = [torch.from_numpy(store.view(slot)) for slot in there]
            sums = [slot.checksum for slot in there]
            matches = self._payloads.scatter(work, behind, step[:good], views, coded[:good], sums, by_layer)
            for slot, match in zip(there, matches, strict=True):
                if not match:
                    store.discard(slot)
            return len(list(takewhile(bool, matches)))
        finally:
            store.release(lent)

    def _lend(
        self, store: SlotStore, step: list[Chunk], owner: bytes, lent: list[Slot]
    ) -> tuple[list[Slot | None], list[bool]]:
        """The slot of each chunk, and whether its payload is coded. Also appends the slots found to `lent`."""
        sizes = [self._payloads.coded_bytes(chunk) for chunk in step]
        first = [size or self._payloads.raw_bytes(chunk) for size, chunk in zip(sizes, step, strict=True)]
        slots = store.lend([chunk.key for chunk in step], first, owner)
        lent += [slot for slot in slots if slot]
        again = [i for i, size in enumerate(sizes) if size and not slots[i]]
        if again:  # what did not fit is raw
            keys, raw = [step[i].key for i in again], [self._payloads.raw_bytes(step[i]) for i in again]
            for i, slot in zip(again, store.lend(keys, raw, owner), strict=True):
                slots[i], sizes[i] = slot, None
                lent += [slot] if slot else []
        return slots, [size is not None for size in sizes]

    def _load_staged(
        self, work: Work, behind: Any, steps: list[list[Chunk]], owner: bytes, by_layer: list[Copies] | None
    ) -> int:
        """Scatters each step while the next is read; if `by_layer`, only steps of which all chunks were found."""
        loaded = 0
        read = self._read(steps[0], self._load_staging[0], owner) if steps else ([], [])
        for i, step in enumerate(steps):
            payloads, coded = read
            if not payloads or (by_layer is not None and len(payloads) < len(step)):
                break
            ahead = None
            if len(payloads) == len(step) and step is not steps[-1] and not work.abandoned:
                ahead = _call_on(self._reads, self._read, steps[i + 1], self._load_staging[(i + 1) % 2], owner)
            try:
                there = step[: len(payloads)]
                layers = by_layer if step is steps[-1] else None
                unknown = [None] * len(there)
                matches = self._payloads.scatter(work, behind, there, payloads, coded, unknown, layers)
                if damaged := [chunk.key for chunk, match in zip(there, matches, strict=True) if not match]:
                    self._store.delete(damaged)
            finally:
                if ahead:
                    wait([ahead])  # it fills memory that others will use
            good = len(list(takewhile(bool, matches)))
            loaded += good
            if good < len(step) or not ahead:
                break
            read = ahead.result()
        return loaded

    def _read(self, step: list[Chunk], staging: torch.Tensor, owner: bytes) -> tuple[list[torch.Tensor], list[bool]]:
        """The payloads of the chunks up to the first that is missing, and whether each is coded."""
        places = self._places(step, staging)
        sizes = [self._payloads.coded_bytes(chunk) for chunk in step]
        payloads = [place[:size] for place, size in zip(places, sizes, strict=True)]
        found = self._get(step, payloads, owner)
        again = [i for i, size in enumerate(sizes) if size and not found[i]]
        if again:  # what did not fit is raw
            raw = self._get([step[i] for i in again], [places[i] for i in again], owner)
            for i, is_there in zip(again, raw, strict=True):
                found[i], payloads[i], sizes[i] = is_there, places[i], None
        good = len(list(takewhile(bool, found)))
        return payloads[:good], [size is not None for size in sizes[:good]]

    def _get(self, chunks: list[Chunk], payloads: list[torch.Tensor], owner: bytes) -> list[bool]:
        buffers = [payload.numpy().data for payload in payloads]
        return self._store.get_into([chunk.key for chunk in chunks], buffers, owner)

    def _put(
        self,
        work: Work,
        behind: Any,
        chunks: Sequence[Chunk],
        owner: bytes,
        as_of: int,
        staging: list[torch.Tensor],
        by_layer: bool,
    ) -> int:
        whole = [chunk for chunk in chunks if -1 not in chunk.pages]
        if not self._in_place:
            present = self._store.contains([chunk.key for chunk in whole])
            whole = [chunk for chunk, there in zip(whole, present, strict=True) if not there]
        steps = [whole] if by_layer and self._in_place and whole else list(self._steps(whole))
        begun: list[float] = []
        gathers = [partial(self._payloads.gather, work, behind, by_layer, begun, step is steps[-1]) for step in steps]
        if self._in_place:
            slots = [self._store_slots(step, owner, as_of, gather) for step, gather in zip(steps, gathers, strict=True)]
            stored = [one for of_step in slots for one in of_step]
        else:
            stored = self._store_staged(staging, steps, owner, as_of, gathers)
        if self._store.local:  # it may have dropped some, or evicted them for later ones
            there = self._store.contains([chunk.key for chunk, _ in stored], peek=True)
            stored = [one for one, is_there in zip(stored, there, strict=True) if is_there]
        if begun:
            self._tell("store", begun[0], [chunk for chunk, _ in stored])
        with self._counting:
            self._raw_bytes += sum(self._payloads.raw_bytes(chunk) for chunk, _ in stored)
            self._stored_bytes += sum(size for _, size in stored)
        return sum(chunk.tokens - chunk.repeated for chunk, _ in stored)

    def _store_slots(self, step: list[Chunk], owner: bytes, as_of: int, gather: _Gather) -> list[_Stored]:
        """Gathers the chunks that the store has room for, directly into its slots."""
        store = cast(SlotStore, self._store)
        sizes = [self._payloads.coded_bytes(chunk) or self._payloads.raw_bytes(chunk) for chunk in step]
        slots = store.reserve([chunk.key for chunk in step], sizes, owner, as_of)
        chunks = [chunk for chunk, slot in zip(step, slots, strict=True) if slot]
        reserved: list[Slot | None] = [slot for slot in slots if slot]
        if not chunks:
            return []

        def view(slot: Slot | None) -> torch.Tensor | None:
            return torch.from_numpy(store.view(slot)) if slot else None

        def raw(misfits: list[int]) -> list[torch.Tensor | None]:
            given_up = [slot for i in misfits if (slot := reserved[i])]
            for i in misfits:
                reserved[i] = None
            store.abandon(given_up)
            keys, raw_sizes = [chunks[i].key for i in misfits], [self._payloads.raw_bytes(chunks[i]) for i in misfits]
            for i, slot in zip(misfits, store.reserve(keys, raw_sizes, owner, as_of), strict=True):
                reserved[i] = slot
            return [view(reserved[i]) for i in misfits]

        try:
            payloads, sums = gather(chunks, [view(slot) for slot in reserved], raw)
        except BaseException:
            store.abandon([slot for slot in reserved if slot])
            raise
        there = [(slot, total) for slot, total in zip(reserved, sums, strict=True) if slot]
        store.publish([slot for slot, _ in there], [total for _, total in there])
        return [(chunk, len(payload)) for chunk, payload in zip(chunks, payloads, strict=True) if payload is not None]

    def _store_staged(
        self,
        staging: list[torch.Tensor],
        steps: list[list[Chunk]],
        owner: bytes,
        as_of: int,
        gathers: Sequence[_Gather],
    ) -> list[_Stored]:
        """Gathers each step while the one before is put, if there is staging memory for two."""
        stored: list[_Stored] = []
        put: Future[None] | None = None
        try:
            for i, (step, gather) in enumerate(zip(steps, gathers, strict=True)):
                payloads, sums = self._fill(staging[i % len(staging)], step, gather)
                stored += [(chunk, len(payload)) for chunk, payload in zip(step, payloads, strict=True)]
                buffers = [payload.numpy().data for payload in payloads]
                if put:
                    put.result()
                arguments = ([chunk.key for chunk in step], buffers, owner, sums, as_of)
                put = None
                if step is steps[-1] or len(staging) == 1:
                    self._store.put(*arguments)
                else:
                    put = _call_on(self._puts, self._store.put, *arguments)
        finally:
            if put:
                wait([put])  # it reads memory that others will use
        return stored

    def _fill(self, staging: torch.Tensor, step: list[Chunk], gather: _Gather) -> tuple[list[torch.Tensor], list[int]]:
        """Gathers the chunks into staging memory. Returns the payloads and their checksums."""
        places = self._places(step, staging)
        views: list[torch.Tensor | None] = [
            place[: self._payloads.coded_bytes(chunk)] for place, chunk in zip(places, step, strict=True)
        ]
        gathered, sums = gather(step, views, lambda misfits: [places[i] for i in misfits])
        return [payload for payload in gathered if payload is not None], sums

    def _steps(self, chunks: Sequence[Chunk]) -> Iterator[list[Chunk]]:
        """The chunks in steps, each of one chunk or of at most as many bytes as there is memory for."""
        step: list[Chunk] = []
        room = self._step_bytes
        for chunk in chunks:
            size = whole_pages(self._payloads.raw_bytes(chunk))
            if step and size > room:
                yield step
                step, room = [], self._step_bytes
            step.append(chunk)
            room -= size
        if step:
            yield step

    def _places(self, step: list[Chunk], staging: torch.Tensor) -> list[torch.Tensor]:
        """The payload of each chunk in staging memory, page-aligned for disks."""
        payloads = []
        begin = 0
        for chunk in step:
            size = self._payloads.raw_bytes(chunk)
            payloads.append(staging[begin : begin + size])
            begin += whole_pages(size)
        return payloads


def _call_on(lane: Lane, do: Callable[..., Any], *arguments: Any) -> Future[Any]:
    """Calls do(*arguments), which touches no pages, on the lane's thread."""
    return lane.submit(lambda _: do(*arguments)).future


def _nothing(lane: Lane) -> Work:
    """Empty work that is already done."""
    work = Work(lane)
    work.future.set_result(0)
    work.advance(left_pages=True)
    return work


_Gather = Callable[
    [list[Chunk], list[torch.Tensor | None], Callable[[list[int]], list[torch.Tensor | None]]],
    tuple[list[torch.Tensor | None], list[int]],
]
_Stored = tuple[Chunk, int]  # and the length of its stored payload
