"""SGLang's host pools as a store sees them: the records of a page, and the copies between pages and records."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import takewhile
from typing import Any, Protocol

import torch
from blake3 import blake3

from lmcache_mm.cache import record_key
from lmcache_mm.lane import Lane, Work
from lmcache_mm.layout import KVLayout, fingerprint_of_groups
from lmcache_mm.payloads import Chunk
from lmcache_mm.stores.arguments import unless_lacking
from lmcache_mm.stores.store import Store
from lmcache_mm.transfer import Transfer

PAGE_CONTEXT = "lmcache_mm v1 sglang page"
STEP_BYTES = 16 << 20  # most bytes of pages moved by value at once


def page_key(root: bytes, page_hash: str) -> bytes:
    """32 bytes: derive_key("lmcache_mm v1 sglang page", root ‖ the hash in UTF-8)."""
    return blake3(root + page_hash.encode(), derive_key_context=PAGE_CONTEXT).digest()


def left_s(until: float) -> float:
    return max(0.0, until - time.monotonic())


class Pages(Protocol):
    """A host pool. A page is named by its hash; its place is its first slot in the pool."""

    page_tokens: int
    page_bytes: int  # of all records of a page
    how: str  # how bytes are moved, for logs

    def keys(self, hashes: Sequence[str]) -> list[list[bytes]]:
        """The keys of each page's records. A page needs all of its records."""
        ...

    def load(self, hashes: Sequence[str], places: Sequence[int]) -> Iterable[Work]:
        """Fills pages. Each work begins when the iteration reaches it. Its result is how many pages, from the first on,
        it has filled and verified; later pages hold garbage."""
        ...

    def store(self, hashes: Sequence[str], places: Sequence[int]) -> Iterable[Work]:
        """Hands the store the pages that it lacks. Each work begins when the iteration reaches it."""
        ...

    def close(self, until: float) -> bool:
        """Ends work in progress, until `until` by time.monotonic(). Whether all work is done."""
        ...


def pages_of(pool: Any, what: str, root_of: Callable[[bytes], bytes], store: Store, owner: bytes, rank: int) -> Pages:
    """The Pages for a pool. `what`: its name, and what its bytes mean. root_of: namespace root for a fingerprint."""
    layouts = layouts_of(pool, what)
    if layouts:
        root = root_of(fingerprint_of_groups(layouts, chunk_tokens=1))
        return AddressedPages(pool, layouts, root, store, owner, rank)
    sample = pool.get_dummy_flat_data_page()
    if sample.nbytes == 0:
        return NoPages(int(pool.page_size))
    by_value = _layout((0,), 0, 0, sample.nbytes, f"{what} by value")
    root = root_of(by_value.fingerprint(chunk_tokens=1))
    return FlatPages(pool, sample.dtype, sample.nbytes, root, store, owner, rank)


def dtypes_of(pool: Any) -> str:
    """All dtypes that the bytes of a pool's pages stand for. A pool has one for KV, several for states, and pools of
    raw bytes have those of the device's memory."""
    named = [f"{name}={value}" for name, value in vars(pool).items() if isinstance(value, torch.dtype)]
    states = [state.kv_score_buffer.kv_score for state in getattr(pool, "state_pools", ())]
    memory = (getattr(pool, "kv_buffer", None), getattr(pool, "device_buffers", None), states)
    return " ".join([*sorted(named), *(str(tensor.dtype) for part in memory for tensor in _tensors_in(part))])


def _tensors_in(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for part in value:
            yield from _tensors_in(part)


def layouts_of(pool: Any, what: str) -> list[KVLayout]:
    """Where the pool's pages are: one layout for each group of pieces with the same size and stride. [] for a pool that
    does not say, or whose pages are not evenly spaced."""
    size, last = int(pool.page_size), int(pool.size) // int(pool.page_size) - 1
    if getattr(pool, "shared_allocation_domain", None) is not None or last < 1:
        return []  # its pages move
    try:
        found = [pool.get_page_buffer_meta(torch.arange(p * size, (p + 1) * size)) for p in (0, 1, last)]
    except (ValueError, NotImplementedError, AttributeError):
        return []
    if any(meta is None for meta in found):
        return []
    (begin, sizes), (second, *_), (end, *_) = found
    if any(list(meta[1]) != list(sizes) for meta in found) or 0 in sizes:
        return []
    pieces: dict[tuple[int, int], list[int]] = {}
    for first, one_on, at_end, piece in zip(begin, second, end, sizes, strict=True):
        stride = one_on - first
        if stride < piece or at_end != first + last * stride:
            return []
        pieces.setdefault((stride, int(piece)), []).append(first)
    return [
        _layout(tuple(planes), last + 1, stride, piece, f"{what} part {i}")
        for i, ((stride, piece), planes) in enumerate(pieces.items())
    ]


def _layout(planes: tuple[int, ...], num_pages: int, page_stride: int, piece_bytes: int, spec: str) -> KVLayout:
    """A layout of pages that are only copied whole."""
    return KVLayout(
        planes=planes,
        num_pages=num_pages,
        page_stride=page_stride,
        page_tokens=1,
        runs=1,
        run_stride=piece_bytes,
        run_bytes=piece_bytes,
        token_bytes=piece_bytes,
        spec=spec,
    )


class AddressedPages:
    """Pages that native calls copy between the pool's memory and the store's slots, or staging memory."""

    how = "in place"

    def __init__(
        self, pool: Any, layouts: Sequence[KVLayout], root: bytes, store: Store, owner: bytes, rank: int
    ) -> None:
        self.page_tokens = int(pool.page_size)
        self.page_bytes = sum(layout.payload_bytes(1) for layout in layouts)
        self._root, self._owner, self._rank = root, owner, rank
        # Layouts hold only addresses, so keep the memory alive, whatever SGLang does with the pool.
        buffers: Any = getattr(pool, "get_hybrid_pool_buffer", list)()
        self._memory = (pool, getattr(pool, "kv_buffer", None), buffers)
        self._transfers = [Transfer(layout, store, layout.payload_bytes(1)) for layout in layouts]

    def keys(self, hashes: Sequence[str]) -> list[list[bytes]]:
        parts = range(len(self._transfers))
        return [[record_key(key, part, self._rank) for part in parts] for key in self._page_keys(hashes)]

    def _page_keys(self, hashes: Sequence[str]) -> list[bytes]:
        return [page_key(self._root, page_hash) for page_hash in hashes]

    def load(self, hashes: Sequence[str], places: Sequence[int]) -> Iterator[Work]:
        for part, transfer in enumerate(self._transfers):
            yield transfer.load(self._chunks(hashes, places, part), self._owner)._work

    def store(self, hashes: Sequence[str], places: Sequence[int]) -> Iterator[Work]:
        for part, transfer in enumerate(self._transfers):
            yield transfer.store(self._chunks(hashes, places, part), self._owner)._work

    def _chunks(self, hashes: Sequence[str], places: Sequence[int], part: int) -> list[Chunk]:
        pages = torch.tensor(places, dtype=torch.int64).div_(self.page_tokens, rounding_mode="floor")
        return [
            Chunk(record_key(key, part, self._rank), page, 1)
            for key, page in zip(self._page_keys(hashes), pages.split(1), strict=True)
        ]

    def close(self, until: float) -> bool:
        return all([transfer.close(left_s(until)) for transfer in self._transfers])


class FlatPages:
    """Pages that SGLang copies out of the pool and into it."""

    how = "by value"

    def __init__(
        self, pool: Any, dtype: torch.dtype, page_bytes: int, root: bytes, store: Store, owner: bytes, rank: int
    ) -> None:
        self.page_tokens, self.page_bytes = int(pool.page_size), page_bytes
        self._pool, self._dtype = pool, dtype
        self._root, self._store, self._owner, self._rank = root, store, owner, rank
        self._loads, self._stores = Lane("lmcache_mm load by value"), Lane("lmcache_mm store by value")

    def keys(self, hashes: Sequence[str]) -> list[list[bytes]]:
        return [[record_key(page_key(self._root, page_hash), 0, self._rank)] for page_hash in hashes]

    def load(self, hashes: Sequence[str], places: Sequence[int]) -> list[Work]:
        keys = [key for (key,) in self.keys(hashes)]
        return [self._loads.submit(lambda work: unless_lacking(lambda: self._load(work, keys, places), 0))]

    def store(self, hashes: Sequence[str], places: Sequence[int]) -> list[Work]:
        keys, as_of = [key for (key,) in self.keys(hashes)], self._store.moment()
        return [self._stores.submit(lambda work: unless_lacking(lambda: self._put(work, keys, places, as_of), 0))]

    def _load(self, work: Work, keys: Sequence[bytes], places: Sequence[int]) -> int:
        loaded = 0
        for step in self._steps(len(keys)):
            pages = [torch.empty(self.page_bytes // self._dtype.itemsize, dtype=self._dtype) for _ in keys[step]]
            found = self._store.get_into(keys[step], [_bytes_of(page) for page in pages], self._owner)
            good = len(list(takewhile(bool, found)))

            def fill(_: int, step: slice = step, pages: list[torch.Tensor] = pages, good: int = good) -> bool:
                for place, page in zip(places[step][:good], pages[:good], strict=True):
                    self._pool.set_from_flat_data_page(place, page)
                return True

            work.touch_pages(fill)
            loaded += good
            if good < len(pages):
                break
        return loaded

    def _put(self, work: Work, keys: Sequence[bytes], places: Sequence[int], as_of: int) -> int:
        for step in self._steps(len(keys)):
            pages: list[torch.Tensor] = []

            def read(_: int, step: slice = step, pages: list[torch.Tensor] = pages) -> bool:
                pages += [self._pool.get_data_page(place).clone() for place in places[step]]
                return True

            work.touch_pages(read)
            self._store.put(keys[step], [_bytes_of(page) for page in pages], self._owner, None, as_of)
        return len(keys)

    def _steps(self, count: int) -> Iterator[slice]:
        at_once = max(1, STEP_BYTES // self.page_bytes)
        return (slice(begin, begin + at_once) for begin in range(0, count, at_once))

    def close(self, until: float) -> bool:
        return all([lane.close(left_s(until)) for lane in (self._loads, self._stores)])


class NoPages:
    """A pool without memory, which only counts slots for other pools."""

    how, page_bytes = "without memory", 0

    def __init__(self, page_tokens: int) -> None:
        self.page_tokens = page_tokens

    def keys(self, hashes: Sequence[str]) -> list[list[bytes]]:
        return [[] for _ in hashes]

    def load(self, hashes: Sequence[str], places: Sequence[int]) -> list[Work]:
        return []

    store = load

    def close(self, until: float) -> bool:
        return True


def _bytes_of(page: torch.Tensor) -> memoryview:
    flat: memoryview = page.contiguous().reshape(-1).view(torch.uint8).numpy().data
    return flat
