"""The backend under SGLang's own cache controllers: their threads that prefetch pages and write them back."""

from __future__ import annotations

import threading
import time

import pytest
import torch
from sglang.srt.environ import envs
from sglang.srt.managers import cache_controller
from sglang.srt.mem_cache import l2_transfer
from sglang.srt.mem_cache.allocator import TokenToKVPoolAllocator
from sglang.srt.mem_cache.base_prefix_cache import CacheRequestHandle
from sglang.srt.mem_cache.hicache_storage import PoolHitPolicy, PoolName, PoolTransfer
from sglang.srt.mem_cache.hybrid_cache.hybrid_cache_controller import HybridCacheController
from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool
from sglang.srt.mem_cache.pool_host import HostPoolGroup, PoolEntry
from sglang.srt.mem_cache.radix_cache import RadixKey
from sglang.srt.mem_cache.utils import get_storage_hash_str
from sglang.srt.runtime_context import get_parallel

from hosts import PAGE, fill, mamba, mha, mla, pages_of, slots

WAIT_S = 20
OURS = {
    "backend_name": "lmcache_mm",
    "module_path": "lmcache_mm.sglang",
    "class_name": "HiCacheBackend",
    "timeout_s": 1.0,
}


@pytest.fixture
def controller_of(monkeypatch, tmp_path):
    """A function that makes a controller over host pools, with `file` (None) or ours over a store."""
    for module in (cache_controller, l2_transfer):  # whose streams and events are a GPU's
        monkeypatch.setattr(module, "device_module", torch.cpu)
    made = []

    def make(pools, url, options=None):
        device = MHATokenToKVPool(
            size=32 * PAGE, page_size=PAGE, dtype=torch.bfloat16, head_num=2, head_dim=16, layer_num=3,
            device="cpu", enable_memory_saver=False,
        )  # fmt: skip
        allocator = TokenToKVPoolAllocator(device.size, torch.bfloat16, "cpu", device, need_sort=False)
        entries = [
            PoolEntry(name, pool, device, lambda layer: layer, is_primary_index_anchor=name == PoolName.KV)
            for name, pool in pools.items()
        ]
        with get_parallel().override(tp_rank=0, tp_size=1, pp_rank=0, pp_size=1):
            controller = HybridCacheController(
                allocator,
                HostPoolGroup(entries),
                PAGE,
                None,
                load_cache_event=threading.Event(),
                io_backend="kernel",
                prefetch_threshold=PAGE,
                enable_storage_metrics=True,
            )
            monkeypatch.setattr(controller, "_create_sync_groups", list)
            made.append(controller)
            with envs.SGLANG_HICACHE_FILE_BACKEND_STORAGE_DIR.override(None if url else str(tmp_path)):
                extra = {**OURS, "store": url, **(options or {})} if url else {}
                name = "dynamic" if url else "file"
                controller.attach_storage_backend(name, PAGE, "model", extra, host_pools=entries)
        return controller

    yield make
    for controller in made:
        controller.detach_storage_backend()


def write_back(controller, tokens, pages, others=()):
    """As SGLang writes a node of its tree to storage; how many tokens were stored."""
    keys = get_storage_hash_str(tokens, None, page_size=PAGE)
    kv = controller.mem_pool_host.get_pool(PoolName.KV)
    for transfer in others:
        transfer.keys = keys[-len(transfer.keys) :]
    controller.write_storage(slots(kv, pages), list(tokens), keys, extra_pools=list(others) or None)
    return controller.ack_backup_queue.get(timeout=WAIT_S).completed_tokens


def prefetch(controller, tokens, others=()):
    """As SGLang's scheduler prefetches a prompt. Tokens that were found, that were read, the pages read into, and how
    many of other pools' were read."""
    operation = controller.prefetch(CacheRequestHandle("request", 0), RadixKey(tokens), None, None)
    operation.pool_transfers = list(others) or None
    controller_hit = controller.prefetch_hit_queue.get(timeout=WAIT_S)
    assert controller_hit is operation
    found = operation.storage_hit_count
    operation.host_indices = controller.mem_pool_host.alloc(found)
    controller.prefetch_buffer.put(operation)
    read, of_pools = 0, {}
    while not (ack := controller.ack_prefetch_queue.get(timeout=WAIT_S)).completed_req:
        read = ack.completed_tokens if ack.completed_tokens is not None else read
        of_pools |= ack.pool_hits or {}
    return found, read, (operation.host_indices[::PAGE] // PAGE).tolist(), of_pools


BACKENDS = ("file:", "mem", "shm", "file", "valkey", "tiered")


@pytest.mark.parametrize("kind", BACKENDS)
@pytest.mark.parametrize("layout", ["layer_first", "page_first"])
def test_what_was_written_back_is_prefetched(kind, layout, controller_of, url_of):
    url = None if kind == "file:" else url_of(kind)
    pool = mha(layout, pages=400)
    controller = controller_of({PoolName.KV: pool}, url)
    if url:
        assert controller.page_get_func == controller._page_get_zero_copy
        controller.clear_storage_backend()
    tokens = list(range(150 * PAGE))  # more pages than one batch
    pages = controller.mem_pool_host.alloc(len(tokens))[::PAGE] // PAGE
    fill(pool, pages.tolist(), 1)
    assert prefetch(controller, tokens)[:2] == (0, 0)
    assert write_back(controller, tokens, pages.tolist()) == len(tokens)
    asked = [*tokens[: 140 * PAGE], *range(7, 7 + 3 * PAGE)]
    found, read, into, _ = prefetch(controller, asked)
    assert (found, read) == (140 * PAGE, 140 * PAGE)
    assert pages_of(pool, into) == pages_of(pool, pages[:140].tolist())
    assert prefetch(controller, tokens[1:])[:2] == (0, 0)


@pytest.mark.parametrize("kind", ["file:", "mem", "shm"])
def test_states_of_the_last_page_are_prefetched_with_it(kind, controller_of, url_of):
    pools = {PoolName.KV: mha("page_first", pages=64), PoolName.MAMBA: mamba()}
    controller = controller_of(pools, None if kind == "file:" else url_of(kind))
    tokens = list(range(8 * PAGE))
    pages = (controller.mem_pool_host.alloc(len(tokens))[::PAGE] // PAGE).tolist()
    fill(pools[PoolName.KV], pages, 1)
    fill(pools[PoolName.MAMBA], [3, 4], 2)

    def state(slot=None):
        indices = None if slot is None else torch.tensor([slot])
        return PoolTransfer(
            name=PoolName.MAMBA, host_indices=indices, keys=["the last"], hit_policy=PoolHitPolicy.TRAILING_PAGES
        )

    # There are states at the ends of pages 5 and 8.
    assert write_back(controller, tokens[: 5 * PAGE], pages[:5], [state(3)]) == 5 * PAGE
    assert write_back(controller, tokens, pages, [state(4)]) == 8 * PAGE
    for asked, end, slot, into_slot in (
        (tokens, 8, 4, 10),
        (tokens[: 7 * PAGE], 5, 3, 11),
        (tokens[: 4 * PAGE], 0, 0, 12),
    ):
        found, read, into, of_pools = prefetch(controller, asked, [state(into_slot)])
        assert (found, read) == (end * PAGE, end * PAGE)
        assert pages_of(pools[PoolName.KV], into) == pages_of(pools[PoolName.KV], pages[:end])
        if end:
            assert of_pools[PoolName.MAMBA] == 1
            assert pages_of(pools[PoolName.MAMBA], [into_slot]) == pages_of(pools[PoolName.MAMBA], [slot])


@pytest.mark.parametrize("pools", [[PoolName.KV], [PoolName.KV, PoolName.DRAFT]], ids=str)
def test_a_rank_that_does_not_write_reads_what_the_writer_wrote(pools, controller_of, url_of):
    url, pools = url_of("shm"), {name: mla(pages=64) for name in pools}
    tokens = list(range(6 * PAGE))

    def others():
        return [PoolTransfer(name=name, keys=["x"], indices_from_pool=PoolName.KV) for name in list(pools)[1:]]

    for rank in (0, 1):
        controller = controller_of(pools, url)
        backend = controller.storage_backend
        backend._config.is_mla_model, backend._config.tp_size, backend._config.tp_rank = True, 2, rank
        backend._hosts.clear()
        for name in pools:
            backend.register_mem_host_pool_v2(pools[name], name)
        pages = (controller.mem_pool_host.alloc(len(tokens))[::PAGE] // PAGE).tolist()
        if rank == 0:
            for seed, filled in enumerate(pools.values()):
                fill(filled, pages, seed)
            kept = [pages_of(filled, pages) for filled in pools.values()]
        assert controller.backup_skip == (rank == 1)
        assert write_back(controller, tokens, pages, others()) == (0 if rank else len(tokens))
    found, read, into, _ = prefetch(controller, tokens, others())
    assert (found, read) == (len(tokens), len(tokens))
    assert [pages_of(filled, into) for filled in pools.values()] == kept


def test_a_store_that_hangs_ends_a_prefetch_and_a_write(controller_of, monkeypatch):
    pool = mha(pages=64)
    controller = controller_of({PoolName.KV: pool}, "mem://?capacity=64MiB")
    tokens = list(range(6 * PAGE))
    pages = (controller.mem_pool_host.alloc(len(tokens))[::PAGE] // PAGE).tolist()
    assert write_back(controller, tokens, pages) == len(tokens)
    goes_on = threading.Event()
    store = controller.storage_backend._store
    for name in ("get_into", "put"):
        monkeypatch.setattr(store, name, lambda *_: goes_on.wait(WAIT_S))
    begun = time.monotonic()
    assert prefetch(controller, tokens)[:2] == (len(tokens), 0)
    assert write_back(controller, range(100, 100 + 6 * PAGE), pages) == 0
    assert time.monotonic() - begun < 5
    goes_on.set()


def test_detaching_closes_the_store(controller_of):
    controller = controller_of({PoolName.KV: mha(pages=64)}, "mem://?capacity=1MiB")
    backend = controller.storage_backend
    controller.detach_storage_backend()
    assert backend._closed
    assert controller.storage_backend is None
