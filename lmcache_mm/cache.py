"""KVCache: match, retrieve and store the KV of prompts."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from lmcache_mm import ops
from lmcache_mm.base_cache import BaseCache
from lmcache_mm.codec import of_layout as codec_of_layout
from lmcache_mm.job import Job
from lmcache_mm.layout import KVLayout
from lmcache_mm.operands import Ids, ids_tensor
from lmcache_mm.payloads import Chunk
from lmcache_mm.prompt import Namespace, Prompt, checked_prompt, count, owner_of
from lmcache_mm.stores.arguments import unless_lacking
from lmcache_mm.stores.store import Store
from lmcache_mm.transfer import Transfer


@dataclass(frozen=True)
class Record:
    """The KV of tokens [begin, end) of a prompt, under the key of its first `end` tokens."""

    begin: int
    end: int
    key: bytes


def record_key(prefix_key: bytes, group: int = 0, rank: int = 0) -> bytes:
    """The key in a store: prefix key, u16 KV cache group, u16 rank."""
    return prefix_key + group.to_bytes(2, "little") + rank.to_bytes(2, "little")


class KVCache(BaseCache):
    """Reuse of the KV of `layout`'s pages across prompts, through a store.

    layout: where the pages are. store: a URL or a list of them (see `open_store`), or an open store, which the caller
    closes; the attribute `backend` is the open store. namespace: everything besides prompt and layout that determines
    the KV bytes. chunk_tokens: the number of tokens per chunk, a multiple of layout.page_tokens. opaque_tails: also
    store partial pages of an opaque layout, whole, with whatever their unused slots hold; without it, hits in an opaque
    layout end at whole pages. codec: "split" stores payloads of bf16 numbers in 0.78 of their length and restores them
    bit for bit; other payloads are stored as they are. It saves space in a small store, and bandwidth to a distant one.
    The attribute `codec` says whether it is used.

    Block ids are always those of the whole prompt: block_ids[i] is the page of tokens
    [i * page_tokens, (i + 1) * page_tokens). Several threads may call methods; RuntimeError after `close`.
    """

    def __init__(
        self,
        layout: KVLayout,
        store: str | Sequence[str] | Store,
        namespace: Namespace,
        chunk_tokens: int = 256,
        opaque_tails: bool = False,
        codec: str | None = None,
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
        self.codec = codec_of_layout(codec, layout)
        self._namespace = namespace.with_layout(layout.fingerprint(chunk_tokens, codec=self.codec))
        self._whole = layout.page_tokens if layout.opaque and not opaque_tails else 1
        super().__init__(store, "tokens", "restored_tokens", "stored_tokens", "raw_bytes", "stored_bytes")
        largest = layout.payload_bytes(chunk_tokens // layout.page_tokens)
        try:
            check_room(self.backend, "chunk", largest)
            self._transfer = Transfer(layout, self.backend, largest, coding=self.codec)
        except BaseException:
            super().close()
            raise

    def close(self) -> None:
        """Finishes all jobs, then closes the store if this cache opened it."""
        self._open = False
        self._transfer.close()
        super().close()

    def match(self, prompt: Prompt) -> int:
        """How many tokens of `prompt` can be restored now, up to all of them. A loop that needs logits retrieves one
        token less and recomputes the last one. Nothing is reserved: a record may be gone when it is retrieved."""
        records = unless_lacking(lambda: self._present(self._records(prompt, turns=True)), list[Record]())
        hit = records[-1].end if records else 0
        self._count(queried_tokens=len(prompt), hit_tokens=hit)
        return hit

    def _present(self, records: list[Record]) -> list[Record]:
        """The records of a prompt that the store has and that cover its longest prefix."""
        present = self.backend.contains([record.key for record in records])
        return chain((r for r, there in zip(records, present, strict=True) if there), self.chunk_tokens)

    def retrieve(self, prompt: Prompt, block_ids: Ids, hit: int | None = None, by_layer: bool = False) -> Job[int]:
        """Scatters the KV of the first `hit` tokens (the result of `match`, or less; None: all that the store has) into
        the pages.

        Pages with block id -1 are skipped. The result: how many tokens, from the first on, were restored and verified,
        at most `hit`; missing or damaged records raise no exception. Pages past these tokens hold garbage until they
        are computed. by_layer: loads one layer after the other (`Job.layer_ready`), and all of `hit` or nothing.

        Raises TypeError or ValueError for block ids that are wrong or too few.
        """

        def plan() -> tuple[list[Record], list[Chunk], int]:
            records = self._records(prompt, turns=True)
            if hit is None:
                records = self._present(records)
                limit = records[-1].end if records else 0
            else:
                limit = count("hit", hit)
                if limit > len(prompt):
                    raise ValueError(f"hit: expected at most the prompt's {len(prompt)} tokens, got {limit}")
                # Up to the first cut at or past `hit`: the extra tokens also belong to the prompt.
                behind = next((r.end for r in records if r.end >= limit), limit)
                records = chain((r for r in records if r.end <= behind), self.chunk_tokens) if limit else []
            return records, self._chunks(records, self._pages(block_ids, limit)), limit

        records, chunks, limit = unless_lacking(plan, (list[Record](), list[Chunk](), 0))
        if hit is None:
            self._count(queried_tokens=len(prompt), hit_tokens=limit)
        job = self._transfer.load(chunks, owner_of(prompt.salt), by_layer)
        restored = job._then(lambda loaded: min(limit, records[loaded - 1].end) if loaded else 0)
        restored.when_done(lambda tokens: self._count(restored_tokens=tokens))
        return restored

    def store(self, prompt: Prompt, block_ids: Ids, by_layer: bool = False) -> Job[int]:
        """Gathers the KV of `prompt` that the store lacks. The result: for a store on this host, how many tokens of the
        prompt it now holds that it did not hold before; for a store elsewhere, how many were handed to it. A token in
        several records, as the last item's tail and the prompt's tail, counts once.

        Block id -1 marks missing KV; chunks with such a page are skipped. by_layer: call this before the forward pass
        that computes the KV, and call `Job.layer_written` after each layer.
        Raises TypeError or ValueError for block ids that are wrong or too few.
        """
        chunks = unless_lacking(
            lambda: self._chunks(self._records(prompt), self._pages(block_ids, len(prompt))), list[Chunk]()
        )
        job = self._transfer.store(chunks, owner_of(prompt.salt), by_layer=by_layer)
        job.when_done(lambda tokens: self._count(stored_tokens=tokens))
        return job

    def stats(self) -> dict[str, float]:
        """Counters since this cache was created: queried_tokens and hit_tokens (of `match`, and of `retrieve` without
        `hit`), hit_rate (their ratio, 0 to 1), restored_tokens and stored_tokens (the results of `retrieve` and
        `store`); for stored records also raw_bytes (before coding), stored_bytes (after coding) and codec_ratio (1
        without a codec). `backend.stats()` has the store's own counters."""
        raw, stored = self._transfer.take_bytes()
        self._count(raw_bytes=raw, stored_bytes=stored)
        counts = super().stats()
        ratio = counts["raw_bytes"] / counts["stored_bytes"] if counts["stored_bytes"] else 1.0
        return counts | {"codec_ratio": ratio}

    def _records(self, prompt: Prompt, turns: bool = False) -> list[Record]:
        checked_prompt(prompt)
        self._check()
        root = self._namespace.root(prompt.salt, prompt.lora, prompt.prompt_embeds)
        ends = prompt.cuts(self.chunk_tokens, self._whole, turns)
        keys = ops.prefix_keys(prompt.token_ids, prompt.items, root, ends).numpy()
        size = self.chunk_tokens
        return [
            Record((end - 1) // size * size, end, record_key(key.tobytes()))
            for end, key in zip(ends, keys, strict=True)
        ]

    def _pages(self, block_ids: Ids, tokens: int) -> torch.Tensor:
        """A checked copy of the block ids of the first `tokens` tokens: int64, on the host."""
        pages = ids_tensor("block_ids", block_ids)
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

    def _chunks(self, records: list[Record], pages: torch.Tensor) -> list[Chunk]:
        """The records' chunks. If the last record reaches past `pages`, its missing pages are -1."""
        size = self.layout.page_tokens
        if records and len(pages) < (needed := -(-records[-1].end // size)):
            pages = torch.cat([pages, torch.full((needed - len(pages),), -1)])
        return [
            Chunk(r.key, pages[r.begin // size : -(-r.end // size)], r.end - r.begin, max(0, before - r.begin))
            for r, before in zip(records, [0, *(r.end for r in records)], strict=False)
        ]


def check_room(store: Store, what: str, size: int) -> None:
    """ValueError for a store that could never hold a payload of this size."""
    capacity = store.stats().get("capacity_bytes", size)
    if capacity < size and not store.read_only:
        raise ValueError(f"store: expected a capacity of at least a {what}'s {size} bytes, got {capacity}")


def chain(records: Iterable[Record], chunk_tokens: int) -> list[Record]:
    """The `records` (ascending by end) that together cover the longest prefix: whole chunks, then one tail."""
    chunks: list[Record] = []
    tail: list[Record] = []
    for record in records:
        if record.begin != (chunks[-1].end if chunks else 0):
            continue
        if record.end - record.begin == chunk_tokens:
            chunks.append(record)
            tail = []
        else:
            tail = [record]
    return chunks + tail
