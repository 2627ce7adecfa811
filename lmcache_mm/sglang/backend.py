"""HiCacheBackend: a storage backend for SGLang's hierarchical cache, over any store."""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import wait
from typing import Any

import torch

from lmcache_mm.lane import Abandoned, Lane, Work
from lmcache_mm.prompt import owner_of
from lmcache_mm.sglang.api import (
    HiCacheStorage,
    HiCacheStorageConfig,
    HiCacheStorageExtraInfo,
    MHATokenToKVPoolHost,
    ModelConfig,
    PageInterleaveHostPool,
    PoolHitPolicy,
    PoolName,
    PoolTransfer,
    PoolTransferResult,
    StorageMetrics,
    get_server_args,
    resolving_view,
)
from lmcache_mm.sglang.identity import CALL_S, NAME, Options, check_clients, namespace_of
from lmcache_mm.sglang.pools import Pages, dtypes_of, left_s, pages_of
from lmcache_mm.stores import open_store
from lmcache_mm.stores.breaker import PAUSE_S, Breaker

COUNTERS = (
    *("looked_up_pages", "found_pages", "loaded_pages", "stored_pages"),
    *("failed_lookups", "failed_loads", "failed_stores"),
)

logger = logging.getLogger("sglang.lmcache_mm")

Begin = Callable[[], Iterable[Work]]


class HiCacheBackend(HiCacheStorage):
    """See the module. Use it with --hicache-storage-backend dynamic; --hicache-storage-backend-extra-config takes
    "backend_name": "lmcache_mm", "module_path": "lmcache_mm.sglang", "class_name": "HiCacheBackend", and these options:

    store: a URL that every process of the engine can open, or a list of them (see `open_store`). weights: a name for
    the weights, if neither files nor a commit identify them. timeout_s: how long a store may do nothing (5, at most 8):
    after that the call is a miss, or its pages are not stored, and the store is not asked for 10 s. The same applies to
    a call that takes 8 s in all. identifiers: "trust", if no client can name the items or adapters of another client's
    requests; models with items and engines with adapters do not start without it.

    A pool's pages are read and written in place if SGLang says where their pieces are, else by value. Methods never
    raise for failures of a store; they raise TypeError or ValueError for wrong arguments.
    """

    def __init__(self, storage_config: HiCacheStorageConfig, _: Mapping[str, Any] | None = None) -> None:
        extra = storage_config.extra_config or {}
        self._options = Options.of(extra)
        # SGLang reads this when it creates the backend. Without it, SGLang passes copies of pages, not their places.
        if not extra.setdefault("interface_v1", 1):
            raise ValueError(f"{NAME}: interface_v1: expected 1 or nothing, got {extra['interface_v1']!r}")
        model = ModelConfig.from_server_args(get_server_args())
        args = resolving_view(get_server_args())  # the values that SGLang itself uses
        check_clients(bool(model.is_multimodal), bool(args.enable_lora), self._options)
        self._config = storage_config
        self._namespace = namespace_of(args, model, storage_config, self._options.weights)
        self._owner = owner_of(self._namespace.root())
        self._pools: dict[str, Pages] = {}
        self._hosts: dict[str, Any] = {}
        self._breaker = Breaker()
        self._counts = Counter(dict.fromkeys(COUNTERS, 0))
        self._metrics = StorageMetrics()
        self._counting = threading.Lock()
        self._closed = False
        # Open the store last: if a thread could not start, nothing would close it.
        self._lookups, self._clears = Lane("lmcache_mm lookup"), Lane("lmcache_mm clear")
        self._store = open_store(self._options.store)

    # --- Pools

    def register_mem_pool_host(self, mem_pool_host: Any) -> None:
        super().register_mem_pool_host(mem_pool_host)
        self.register_mem_host_pool_v2(mem_pool_host, PoolName.KV)

    def register_mem_host_pool_v2(self, host_pool: Any, host_pool_name: str) -> None:
        """Takes a pool; ValueError if it cannot be stored."""
        super().register_mem_host_pool_v2(host_pool, host_pool_name)
        name = PoolName(host_pool_name).value
        if self._hosts.get(name) is host_pool:
            return
        if isinstance(host_pool, PageInterleaveHostPool):
            raise ValueError(f"{NAME}: pool {name}: pages that ranks share between them are not supported")
        if isinstance(host_pool, MHATokenToKVPoolHost) and self._config.is_mla_model and self._config.tp_size > 1:
            # SGLang writes back only the first rank's pages, so the other ranks would not find theirs.
            raise ValueError(
                f"{NAME}: pool {name}: a drafter without MLA beside a model with MLA is not supported with tensor "
                "parallelism; start without the drafter, or without the backend"
            )
        try:
            pages = pages_of(
                host_pool,
                self._meaning(name, host_pool),
                lambda layout: self._namespace.with_layout(layout).root(),
                self._store,
                self._owner,
                self._rank(name),
            )
        except NotImplementedError as error:
            raise ValueError(
                f"{NAME}: pool {name}: SGLang hands out no pages of {type(host_pool).__name__} ({error}); start "
                "without the backend, or with another --kv-cache-dtype"
            ) from error
        capacity = self._store.stats().get("capacity_bytes", pages.page_bytes)
        if capacity < pages.page_bytes and not self._store.read_only:
            raise ValueError(
                f"{NAME}: store: expected a capacity of at least a page's {pages.page_bytes} bytes, got {capacity}"
            )
        former = self._pools.get(name)
        self._hosts[name], self._pools[name] = host_pool, pages
        if former is not None:
            former.close(time.monotonic() + self._options.timeout_s)

    def on_host_pools_registered(self) -> None:
        for name, pages in self._pools.items():
            logger.info("%s: pool %s: pages of %d bytes, %s", NAME, name, pages.page_bytes, pages.how)

    def _meaning(self, name: str, pool: Any) -> str:
        """What the bytes of a page mean, without their number."""
        facts = {
            "pool": name,
            "class": type(pool).__name__,
            "layout": pool.layout,
            "dtypes": dtypes_of(pool),
            "page": int(pool.page_size),
            "layers": [getattr(pool, "start_layer", None), getattr(pool, "end_layer", None)],
            "tag": getattr(pool, "storage_format_tag", None),
        }
        return "sglang " + " ".join(f"{fact}={value}" for fact, value in facts.items())

    def _rank(self, name: str) -> int:
        """The rank that the pages belong to. Its tensor-parallel rank is 0 if all those ranks have the same pages."""
        config = self._config
        tp_rank = config.tp_rank if self._of_each_rank(name) else 0
        return int((config.pp_rank * config.attn_cp_size + config.attn_cp_rank) * config.tp_size + tp_rank)

    def _of_each_rank(self, name: str) -> bool:
        """Whether each tensor-parallel rank has its own pages. With MLA, only states of linear attention differ."""
        return not self._config.is_mla_model or name == PoolName.MAMBA.value

    def _writes(self, name: str) -> bool:
        """Whether this rank stores the pool's pages. If all ranks have the same pages, only one rank stores them."""
        return bool(self._config.is_storage_writer) or self._of_each_rank(name)

    # --- Lookups

    def exists(self, key: str) -> bool:
        """Whether a page of the KV pool can be read now."""
        return self.batch_exists([key]) == 1

    def batch_exists(self, keys: list[str], extra_info: HiCacheStorageExtraInfo | None = None) -> int:
        """How many pages of the KV pool, from the first on, can be read now."""
        return _leading(self._contains(self._keys(PoolName.KV.value, keys)))

    def batch_exists_v2(
        self,
        keys: list[str],
        pool_transfers: list[PoolTransfer] | None = None,
        extra_info: HiCacheStorageExtraInfo | None = None,
    ) -> PoolTransferResult:
        """Which prefixes of the pages can be restored now, in the KV pool and all other pools. ValueError for a hit
        policy that SGLang's own backends do not know either."""
        transfers = pool_transfers or []
        for transfer in transfers:
            if transfer.hit_policy not in (PoolHitPolicy.ALL_PAGES, PoolHitPolicy.TRAILING_PAGES):
                raise ValueError(f"hit_policy: expected all or trailing pages, got {transfer.hit_policy}")
        names = [PoolName.KV.value, *(PoolName(transfer.name).value for transfer in transfers)]
        found = self._contains([records for name in names for records in self._keys(name, keys)])
        of_pools = [found[i * len(keys) : (i + 1) * len(keys)] for i in range(len(names))]
        kv_pages = _leading(of_pools[0])
        hits = {PoolName.KV: kv_pages} if kv_pages else {}
        restorable = set(range(1, kv_pages + 1))
        for transfer, there in zip(transfers, of_pools[1:], strict=True):
            window = kv_pages
            if transfer.hit_policy == PoolHitPolicy.TRAILING_PAGES:
                window = max(1, len(transfer.keys or ()))
            ends = {end for end in range(1, kv_pages + 1) if all(there[max(0, end - window) : end])}
            if ends and restorable:
                hits[transfer.name] = max(ends)
            restorable &= ends
        return PoolTransferResult(max(restorable, default=0), hits, sorted(restorable))

    def _keys(self, name: str, hashes: Sequence[str]) -> list[list[bytes]]:
        """The keys of the records of each page of a pool."""
        return self._pages(name).keys(hashes)

    def _pages(self, name: str) -> Pages:
        """A registered pool; ValueError for any other."""
        if name not in self._pools:
            raise ValueError(f"pool: expected one of {', '.join(self._pools)}, got {name}")
        return self._pools[name]

    def _contains(self, records: Sequence[Sequence[bytes]]) -> list[bool]:
        """Whether the store has all records of each page; all False if it does not answer. records: keys by page."""
        there = self._there(records, "failed_lookups", time.monotonic() + CALL_S) or [False] * len(records)
        self._count(looked_up_pages=len(there), found_pages=there.count(True))
        return there

    def _there(
        self, records: Sequence[Sequence[bytes]], failure: str, until: float, peek: bool = False
    ) -> list[bool] | None:
        keys = [key for of_page in records for key in of_page]
        answer: list[bool] = []

        def look(_: Work) -> int:
            answer.extend(self._store.contains(keys, peek))
            return 0

        if keys and self._ask(failure, lambda: [self._lookups.submit(look)], until) is None:
            return None
        there = iter(answer)
        return [all([next(there) for _ in of_page]) for of_page in records]

    # --- Pages

    def batch_get_v1(
        self, keys: list[str], host_indices: torch.Tensor, extra_info: HiCacheStorageExtraInfo | None = None
    ) -> list[bool]:
        """Fills pages of the KV pool, up to the first that is missing or damaged. host_indices: int64, all their slots.
        The result: for each page, whether it was filled."""
        return self._load(PoolName.KV.value, keys, host_indices, time.monotonic() + CALL_S)

    def batch_set_v1(
        self, keys: list[str], host_indices: torch.Tensor, extra_info: HiCacheStorageExtraInfo | None = None
    ) -> list[bool]:
        """Stores pages of the KV pool. The result: for each page, whether the store now has it or was handed it."""
        return self._save(PoolName.KV.value, keys, host_indices, time.monotonic() + CALL_S)

    def batch_get_v2(
        self, transfers: list[PoolTransfer], extra_info: HiCacheStorageExtraInfo | None = None
    ) -> dict[str, list[bool]]:
        return self._each(transfers, self._load)

    def batch_set_v2(
        self, transfers: list[PoolTransfer], extra_info: HiCacheStorageExtraInfo | None = None
    ) -> dict[str, list[bool]]:
        return self._each(transfers, self._save)

    def _each(
        self, transfers: list[PoolTransfer], move: Callable[[str, Sequence[str], Any, float], list[bool]]
    ) -> dict[str, list[bool]]:
        until = time.monotonic() + CALL_S
        return {t.name: move(PoolName(t.name).value, t.keys or [], t.host_indices, until) for t in transfers}

    def _load(self, name: str, keys: Sequence[str], host_indices: torch.Tensor | None, until: float) -> list[bool]:
        pages = self._pages(name)
        places = self._places(name, pages, keys, host_indices)
        if places is None:
            return [False] * len(keys)
        if not (keys and pages.page_bytes):
            return [True] * len(keys)  # do not tell the breaker: the store was not asked
        begun = time.perf_counter()
        loaded = self._ask("failed_loads", lambda: pages.load(keys, places), until) or 0
        self._measure("prefetch", pages, loaded, begun)
        self._count(loaded_pages=loaded)
        return [i < loaded for i in range(len(keys))]

    def _save(self, name: str, keys: Sequence[str], host_indices: torch.Tensor | None, until: float) -> list[bool]:
        pages = self._pages(name)
        if not self._writes(name):
            return [True] * len(keys)
        places = self._places(name, pages, keys, host_indices)
        if places is None:
            return [False] * len(keys)
        if not (keys and pages.page_bytes):
            return [True] * len(keys)
        begun = time.perf_counter()
        if self._ask("failed_stores", lambda: pages.store(keys, places), until) is None:
            return [False] * len(keys)
        stored = [True] * len(keys)
        if self._store.local:  # a local store may have dropped pages for lack of room
            stored = self._there(pages.keys(keys), "failed_stores", until, peek=True) or [False] * len(keys)
        self._measure("backup", pages, stored.count(True), begun)
        self._count(stored_pages=stored.count(True))
        return stored

    def _places(
        self, name: str, pages: Pages, keys: Sequence[str], host_indices: torch.Tensor | None
    ) -> list[int] | None:
        """The first slot of each page; None if the number of slots does not match the pages, or if they are not the
        slots of whole pages of the pool."""
        slots = torch.empty(0, dtype=torch.int64) if host_indices is None else host_indices
        size, end = pages.page_tokens, int(self._hosts[name].size)
        if slots.numel() != len(keys) * size:
            logger.error("%s: pool %s: expected slots of %d pages, got %d", NAME, name, len(keys), slots.numel())
            return None
        if (slots.reshape(-1, size) % size != torch.arange(size, device=slots.device)).any():
            logger.error("%s: pool %s: expected slots of whole pages, got others", NAME, name)
            return None
        if ((slots < 0) | (slots >= end)).any():
            logger.error("%s: pool %s: expected slots from 0 to %d, got others", NAME, name, end - 1)
            return None
        return slots[::size].tolist()

    def _by_value(self, *_: Any, **__: Any) -> Any:
        """SGLang declares these methods abstract and deprecated, and calls them only with "interface_v1": 0."""
        raise NotImplementedError(f"{NAME}: pages are read and written by batch_get_v1, batch_set_v1 and their like")

    get = batch_get = set = batch_set = _by_value

    # --- Budgets

    def _ask(self, failure: str, begin: Begin, until: float) -> int | None:
        """The minimum of what the works (at least one) return. None, counted as `failure`, if the store raises, does
        nothing for timeout_s, is not done by `until`, or failed like this less than 10 s ago. No work touches pages
        after this returns."""
        if not self._breaker.admit():
            self._count(**{failure: 1})
            return None
        results: list[int] = []
        works: list[Work] = []
        good = True
        try:
            for work in begin():
                works.append(work)  # at once: if the next work cannot begin, this one must still be waited for
        except Exception:
            logger.exception("%s: the store failed", NAME)
            good = False
        for work in works:
            try:
                results.append(self._result(work, until))
            except Exception as error:
                good = False
                logger.warning("%s: a call failed: %s", NAME, error, exc_info=not isinstance(error, Abandoned))
        if self._breaker.tell(good):
            logger.warning("%s: the store is %s", NAME, "back" if good else f"left alone for {PAUSE_S:g} s")
        if not good:
            self._count(**{failure: 1})
            return None
        return min(results)

    def _result(self, work: Work, until: float) -> int:
        """The work's result. Raises Abandoned if it makes no progress for timeout_s, or is not done by `until`."""
        timeout_s = self._options.timeout_s
        while not work.future.done():
            left = until - time.monotonic()
            if left <= 0:
                work.stop_touching()
                raise Abandoned(f"the call took longer than {CALL_S:g} s")
            if work.give_up(timeout_s):
                raise Abandoned(f"the store did nothing for {timeout_s:g} s")
            wait([work.future], min(left, max(timeout_s - work.lane.stalled_s(), timeout_s / 16)))
        return work.future.result() or 0

    # --- The rest

    def clear(self) -> bool:
        """Removes everything that engines with this model, these weights and settings have stored, including other
        engines; other records stay. False: it failed, or took longer than timeout_s and may still continue."""
        try:
            work = self._clears.submit(lambda _: self._store.forget(self._owner))
            work.future.result(self._options.timeout_s)
        except Exception:
            logger.exception("%s: the store was not cleared, or not within %g s", NAME, self._options.timeout_s)
            return False
        return True

    def get_stats(self) -> StorageMetrics:
        """Pages and GB/s of each call since the last `get_stats`, for SGLang's metrics."""
        with self._counting:
            metrics, self._metrics = self._metrics, StorageMetrics()
        return metrics

    def stats(self) -> dict[str, int]:
        """Counters since the backend was created, and the store's counters as store.NAME."""
        with self._counting:
            counts = dict(self._counts)
        return counts | {f"store.{name}": number for name, number in self._store.stats().items()}

    def close(self) -> None:
        """Ends work in progress, within timeout_s in all, and closes the store."""
        if self._closed:
            return
        self._closed = True
        until = time.monotonic() + self._options.timeout_s
        done = [pages.close(until) for pages in self._pools.values()]
        done += [lane.close(left_s(until)) for lane in (self._lookups, self._clears)]
        if all(done):
            self._store.close()

    def _measure(self, what: str, pages: Pages, moved: int, begun: float) -> None:
        if not self._config.enable_storage_metrics or not moved:
            return
        speed = moved * pages.page_bytes / (time.perf_counter() - begun) / 1e9
        with self._counting:
            getattr(self._metrics, f"{what}_pgs").append(moved)
            getattr(self._metrics, f"{what}_bandwidth").append(speed)

    def _count(self, **counts: int) -> None:
        with self._counting:
            self._counts.update(counts)


def _leading(there: Sequence[bool]) -> int:
    return there.index(False) if False in there else len(there)
