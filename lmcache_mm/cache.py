"""KVCache: match, retrieve and store the KV of prompts."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch

from lmcache_mm import ops
from lmcache_mm.layout import KVLayout
from lmcache_mm.prompt import Namespace, Prompt, count
from lmcache_mm.stores import Store, open_store

T = TypeVar("T")
STAGING_BYTES = 16 << 20  # least memory for the payloads of one step between pages and store
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

    layout: where the pages are. store: a URL (see `open_store`) or an open store, which stays the caller's to close.
    namespace: everything beside prompt and layout that decides the KV bytes. chunk_tokens: the unit that is stored, a
    multiple of layout.page_tokens. opaque_tails: also store partial pages of an opaque layout, whole, with whatever
    their unused slots hold; without it hits end at whole pages there.

    Block ids are always those of the whole prompt: block_ids[i] is the page of tokens
    [i * page_tokens, (i + 1) * page_tokens). Methods may be called from several threads.
    """

    def __init__(
        self,
        layout: KVLayout,
        store: str | Store,
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
        self._owns_store = isinstance(store, str)
        self.backend = open_store(store) if isinstance(store, str) else store
        # One step's payloads, a direction each; both are touched by their one thread only.
        largest = layout.payload_bytes(chunk_tokens // layout.page_tokens)
        self._staging_bytes = max(STAGING_BYTES, largest)
        pinned = layout.device.type == "cuda"
        self._load_staging = torch.empty(self._staging_bytes, dtype=torch.uint8, pin_memory=pinned)
        self._store_staging = torch.empty(self._staging_bytes, dtype=torch.uint8, pin_memory=pinned)
        self._loads = ThreadPoolExecutor(1, "lmcache_mm load")
        self._stores = ThreadPoolExecutor(1, "lmcache_mm store")

    def close(self) -> None:
        """Finishes all jobs, then closes the store if this cache opened it."""
        self._loads.shutdown()
        self._stores.shutdown()
        if self._owns_store:
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
        return self._submit(self._loads, self._retrieve, records, pages)

    def _retrieve(self, records: list[_Record], pages: torch.Tensor) -> int:
        restored = 0
        for step in self._steps(records):
            payloads = self._payloads(step, self._load_staging)
            found = self.backend.get_into(
                [record.key for record in step], [payload.numpy().data for payload in payloads]
            )
            whole = found.index(False) if False in found else len(step)  # how many from the first on
            if whole:
                ids = [self._pages_of(record, pages) for record in step[:whole]]
                ops.scatter_pages(self.layout, ids, [payload.to(self.layout.device) for payload in payloads[:whole]])
                restored = step[whole - 1].end
            if whole < len(step):
                break
        return restored

    def store(self, prompt: Prompt, block_ids: ops.Ids) -> Job[int]:
        """Gathers the KV of `prompt` that the store lacks. The result: how many tokens were handed to the store.

        Block id -1 marks KV that is not there; chunks with such a page are left out.
        Raises TypeError or ValueError for block ids that are wrong or too few.
        """
        pages = self._pages(block_ids, len(prompt))
        return self._submit(self._stores, self._store, self._records(prompt), pages)

    def _store(self, records: list[_Record], pages: torch.Tensor) -> int:
        present = self.backend.contains([record.key for record in records])
        missing = [
            record
            for record, there in zip(records, present, strict=True)
            if not there and -1 not in self._pages_of(record, pages)
        ]
        for step in self._steps(missing):
            payloads = self._payloads(step, self._store_staging)
            ids = [self._pages_of(record, pages) for record in step]
            tokens = None if self.layout.opaque else [record.end - record.begin for record in step]
            sums = torch.empty(len(step), dtype=torch.int64, device=self.layout.device)
            gathered = payloads
            if self.layout.device.type != "cpu":
                gathered = [torch.empty_like(payload, device=self.layout.device) for payload in payloads]
            ops.gather_pages(self.layout, ids, gathered, tokens=tokens, checksums=sums)
            if gathered is not payloads:
                for payload, source in zip(payloads, gathered, strict=True):
                    payload.copy_(source)
            keys = [record.key for record in step]
            self.backend.put(keys, [payload.numpy().data for payload in payloads], checksums=sums.tolist())
        return sum(record.end - record.begin for record in missing)

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

    def _steps(self, records: list[_Record]) -> Iterator[list[_Record]]:
        """The records in steps that fit the staging memory."""
        step: list[_Record] = []
        room = self._staging_bytes
        for record in records:
            size = self._payload_bytes(record)
            if size > room:
                yield step
                step, room = [], self._staging_bytes
            step.append(record)
            room -= size
        if step:
            yield step

    def _payloads(self, step: list[_Record], staging: torch.Tensor) -> list[torch.Tensor]:
        sizes = [self._payload_bytes(record) for record in step]
        return list(torch.split(staging[: sum(sizes)], sizes))


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
