"""KVCache: match, retrieve and store the KV of prompts."""

from __future__ import annotations

import mmap
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import takewhile
from typing import Any, Generic, TypeVar, cast

import torch

from lmcache_mm import ops
from lmcache_mm.layout import KVLayout
from lmcache_mm.prompt import Namespace, Prompt, count, owner_of
from lmcache_mm.stores import SlotStore, Store, open_store

T = TypeVar("T")
STAGING_BYTES = 16 << 20  # least memory for the payloads of one step between pages and store
SLOTS_BYTES = 256 << 20  # of slots that are held at once
GROUP_AND_RANK = bytes(4)  # u16 KV cache group, u16 rank


class Job(Generic[T]):
    """A retrieve or store under way. Pages it reads or writes must be left alone until it is done; on CUDA it begins
    behind the work that the caller's current stream held when it was asked for."""

    def __init__(self, future: Future[T]) -> None:
        self._future = future

    def done(self) -> bool:
        return self._future.done()

    def wait(self, timeout_s: float | None = None) -> T:
        """The job's result; TimeoutError if it is not there after `timeout_s` seconds."""
        return self._future.result(timeout_s)


@dataclass(frozen=True)
class _Record:
    """The KV of tokens [begin, end) of a prompt, under the key of its first `end` tokens."""

    begin: int
    end: int
    key: bytes


class KVCache:
    """Reuse of the KV of `layout`'s pages across prompts, through a store.

    layout: where the pages are. store: a URL or a list of them (see `open_store`), or an open store, which stays the
    caller's to close. namespace: everything beside prompt and layout that decides the KV bytes. chunk_tokens: the unit
    that is stored, a multiple of layout.page_tokens. opaque_tails: also store partial pages of an opaque layout, whole,
    with whatever their unused slots hold; without it hits end at whole pages there.

    Block ids are always those of the whole prompt: block_ids[i] is the page of tokens
    [i * page_tokens, (i + 1) * page_tokens). Methods may be called from several threads.
    """

    def __init__(
        self,
        layout: KVLayout,
        store: str | Sequence[str] | Store,
        namespace: Namespace,
        chunk_tokens: int = 256,
        opaque_tails: bool = False,
    ) -> None:
        for name, value, kind in (("layout", layout, KVLayout), ("namespace", namespace, Namespace)):
            if not isinstance(value, kind):
                raise TypeError(f"{name}: expected lmcache_mm.{kind.__name__}, got {type(value).__name__}")
        chunk_tokens = count("chunk_tokens", chunk_tokens)
        if not chunk_tokens or chunk_tokens % layout.page_tokens:
            raise ValueError(
                f"chunk_tokens: expected a multiple of page_tokens = {layout.page_tokens}, got {chunk_tokens}"
            )
        self.layout = layout
        self.chunk_tokens = chunk_tokens
        self._namespace = namespace.with_layout(layout.fingerprint(chunk_tokens))
        self._whole = layout.page_tokens if layout.opaque and not opaque_tails else 1
        self._owns_store = isinstance(store, (str, Sequence))
        self.backend = open_store(store) if isinstance(store, (str, Sequence)) else store
        largest = layout.payload_bytes(chunk_tokens // layout.page_tokens)
        capacity = self.backend.stats().get("capacity_bytes", largest)
        if capacity < largest:
            self._close_store()
            raise ValueError(f"store: expected a capacity of at least a chunk's {largest} bytes, got {capacity}")
        # Memory for one step's payloads, one a direction, each touched by its one thread only.
        self._staging_bytes = 0
        if not isinstance(self.backend, SlotStore):
            self._staging_bytes = max(STAGING_BYTES, _whole_pages(largest))
        elif layout.device.type == "cuda":
            self.backend.register(layout.device.index)
        self._load_staging, self._store_staging = (_staging(self._staging_bytes, layout.device) for _ in range(2))
        self._loads = ThreadPoolExecutor(1, "lmcache_mm load")
        self._stores = ThreadPoolExecutor(1, "lmcache_mm store")

    def close(self) -> None:
        """Finishes all jobs, then closes the store if this cache opened it."""
        self._loads.shutdown()
        self._stores.shutdown()
        self._close_store()

    def _close_store(self) -> None:
        if self._owns_store:
            self._owns_store = False
            self.backend.close()

    def __enter__(self) -> KVCache:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def match(self, prompt: Prompt) -> int:
        """How many tokens of `prompt` could be restored now, up to all of them. Whoever needs logits computes the last
        one again. Nothing is reserved: a record may be gone when it is retrieved."""
        chain = self._present(self._records(prompt))
        return chain[-1].end if chain else 0

    def _present(self, records: list[_Record]) -> list[_Record]:
        """Those of a prompt's records that the store has and that cover its longest prefix."""
        present = self.backend.contains([record.key for record in records])
        return _chain((r for r, there in zip(records, present, strict=True) if there), self.chunk_tokens)

    def retrieve(self, prompt: Prompt, block_ids: ops.Ids, hit: int | None = None) -> Job[int]:
        """Scatters the KV of the first `hit` tokens (what `match` said; None: all that is there) into the pages.

        Pages of block id -1 are left out. The result: how many tokens, from the first on, were restored and verified,
        at most `hit`; what is missing or damaged is no exception. Pages behind them hold garbage until computed.

        Raises TypeError or ValueError for block ids that are wrong or too few.
        """
        records = self._records(prompt)
        if hit is None:
            records = self._present(records)
            limit = records[-1].end if records else 0
        else:
            limit = count("hit", hit)
            if limit > len(prompt):
                raise ValueError(f"hit: expected at most the prompt's {len(prompt)} tokens, got {limit}")
            records = _chain((r for r in records if r.end <= limit), self.chunk_tokens)
        pages = self._pages(block_ids, limit)
        return self._submit(self._loads, self._retrieve, records, pages, owner_of(prompt.salt))

    def _retrieve(self, records: list[_Record], pages: torch.Tensor, owner: bytes) -> int:
        restored = 0
        lends = isinstance(self.backend, SlotStore)
        for step in self._steps(records, SLOTS_BYTES if lends else self._staging_bytes):
            good = self._load_slots(step, pages, owner) if lends else self._load_staged(step, pages, owner)
            if good:
                restored = step[good - 1].end
            if good < len(step):
                break
        return restored

    def _load_slots(self, step: list[_Record], pages: torch.Tensor, owner: bytes) -> int:
        """Scatters records straight from the store's slots; how many, from the first on, were there and verified."""
        store = cast(SlotStore, self.backend)
        slots = store.lend([record.key for record in step], [self._payload_bytes(record) for record in step], owner)
        lent = [slot for slot in slots if slot]
        try:
            there = lent[: slots.index(None)] if None in slots else lent
            if not there:
                return 0
            device = self.layout.device
            matched = ops.scatter_pages(
                self.layout,
                [self._pages_of(record, pages) for record in step[: len(there)]],
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

    def _load_staged(self, step: list[_Record], pages: torch.Tensor, owner: bytes) -> int:
        payloads = self._payloads(step, self._load_staging)
        buffers = [payload.numpy().data for payload in payloads]
        found = self.backend.get_into([record.key for record in step], buffers, owner)
        whole = len(list(takewhile(bool, found)))
        if whole:
            ids = [self._pages_of(record, pages) for record in step[:whole]]
            ops.scatter_pages(self.layout, ids, [payload.to(self.layout.device) for payload in payloads[:whole]])
        return whole

    def store(self, prompt: Prompt, block_ids: ops.Ids) -> Job[int]:
        """Gathers the KV of `prompt` that the store lacks. The result: how many tokens were handed to the store.

        Block id -1 marks KV that is not there; chunks with such a page are left out.
        Raises TypeError or ValueError for block ids that are wrong or too few.
        """
        pages = self._pages(block_ids, len(prompt))
        return self._submit(self._stores, self._store, self._records(prompt), pages, owner_of(prompt.salt))

    def forget(self, salt: str | bytes) -> int:
        """Removes all records that were stored under a tenant's salt from the store; returns their number."""
        if not salt:
            raise ValueError("salt: expected one, got none")
        return self.backend.forget(owner_of(salt))

    def _store(self, records: list[_Record], pages: torch.Tensor, owner: bytes) -> int:
        present = self.backend.contains([record.key for record in records])
        missing = [
            record
            for record, there in zip(records, present, strict=True)
            if not there and -1 not in self._pages_of(record, pages)
        ]
        lends = isinstance(self.backend, SlotStore)
        for step in self._steps(missing, SLOTS_BYTES if lends else self._staging_bytes):
            if lends:
                self._store_slots(step, pages, owner)
            else:
                payloads = self._payloads(step, self._store_staging)
                sums = self._gather(step, pages, payloads)
                keys = [record.key for record in step]
                self.backend.put(keys, [payload.numpy().data for payload in payloads], owner, sums)
        return sum(record.end - record.begin for record in missing)

    def _store_slots(self, step: list[_Record], pages: torch.Tensor, owner: bytes) -> None:
        """Gathers records straight into slots of the store."""
        store = cast(SlotStore, self.backend)
        slots = store.reserve([record.key for record in step], [self._payload_bytes(record) for record in step], owner)
        reserved = [slot for slot in slots if slot]
        try:
            if reserved:
                records = [record for record, slot in zip(step, slots, strict=True) if slot]
                sums = self._gather(records, pages, [torch.from_numpy(store.view(slot)) for slot in reserved])
        except BaseException:
            store.abandon(reserved)
            raise
        if reserved:
            store.publish(reserved, sums)

    def _gather(self, records: list[_Record], pages: torch.Tensor, payloads: list[torch.Tensor]) -> list[int]:
        """Fills host memory with the records' payloads; their checksums."""
        device = self.layout.device
        ids = [self._pages_of(record, pages) for record in records]
        tokens = None if self.layout.opaque else [record.end - record.begin for record in records]
        sums = torch.empty(len(records), dtype=torch.int64, device=device)
        gathered = payloads
        if device.type != "cpu":
            gathered = [torch.empty_like(payload, device=device) for payload in payloads]
        ops.gather_pages(self.layout, ids, gathered, tokens=tokens, checksums=sums)
        if gathered is not payloads:
            for payload, source in zip(payloads, gathered, strict=True):
                payload.copy_(source)
        return cast(list[int], sums.tolist())

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

    def _records(self, prompt: Prompt) -> list[_Record]:
        if not isinstance(prompt, Prompt):
            raise TypeError(f"prompt: expected lmcache_mm.Prompt, got {type(prompt).__name__}")
        root = self._namespace.root(prompt.salt, prompt.lora, prompt.prompt_embeds)
        ends = prompt.cuts(self.chunk_tokens, self._whole)
        keys = ops.prefix_keys(prompt.token_ids, prompt.items, root, ends).numpy()
        size = self.chunk_tokens
        return [
            _Record((end - 1) // size * size, end, key.tobytes() + GROUP_AND_RANK)
            for end, key in zip(ends, keys, strict=True)
        ]

    def _pages(self, block_ids: ops.Ids, tokens: int) -> torch.Tensor:
        """The checked block ids of the first `tokens` tokens: int64 on the host, a copy."""
        pages = ops.ids_tensor("block_ids", block_ids)
        needed = -(-tokens // self.layout.page_tokens)
        if len(pages) < needed:
            raise ValueError(f"block_ids: expected {needed} pages for {tokens} tokens, got {len(pages)}")
        pages = pages[:needed].clone()
        wrong = pages[(pages < -1) | (pages >= self.layout.num_pages)]
        if len(wrong):
            raise ValueError(
                f"block_ids: expected ids in [0, {self.layout.num_pages}), or -1 to skip, got {int(wrong[0])}"
            )
        return pages

    def _pages_of(self, record: _Record, pages: torch.Tensor) -> torch.Tensor:
        size = self.layout.page_tokens
        return pages[record.begin // size : -(-record.end // size)]

    def _payload_bytes(self, record: _Record) -> int:
        return self.layout.payload_bytes(-(-(record.end - record.begin) // self.layout.page_tokens))

    def _steps(self, records: list[_Record], step_bytes: int) -> Iterator[list[_Record]]:
        """The records in steps of at most so many bytes, or of one record."""
        step: list[_Record] = []
        room = step_bytes
        for record in records:
            size = _whole_pages(self._payload_bytes(record))
            if step and size > room:
                yield step
                step, room = [], step_bytes
            step.append(record)
            room -= size
        if step:
            yield step

    def _payloads(self, step: list[_Record], staging: torch.Tensor) -> list[torch.Tensor]:
        """Of each record its payload in staging memory, each beginning at a page, as disks like it."""
        payloads = []
        begin = 0
        for record in step:
            size = self._payload_bytes(record)
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


def _chain(records: Iterable[_Record], chunk_tokens: int) -> list[_Record]:
    """Those of `records` (ascending by end) that cover the longest prefix together: whole chunks, then one tail."""
    chunks: list[_Record] = []
    tail: list[_Record] = []
    for record in records:
        if record.begin != (chunks[-1].end if chunks else 0):
            continue
        if record.end - record.begin == chunk_tokens:
            chunks.append(record)
            tail = []
        else:
            tail = [record]
    return chunks + tail
