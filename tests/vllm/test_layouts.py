"""Caches that the CPU engine cannot have: built by vLLM's code from its own specs, stored and loaded bit by bit."""

from __future__ import annotations

import importlib
import importlib.util
import os
import re
import threading
import time
from contextlib import closing
from dataclasses import replace
from itertools import product
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lmcache_mm.cache import Record
from lmcache_mm.prompt import Namespace
from lmcache_mm.stores import open_store
from lmcache_mm.stores.local import slab

VLLM = importlib.util.find_spec("vllm")  # this folder also looks like a package vllm, but without an origin

pytestmark = pytest.mark.skipif(
    (VLLM is None or VLLM.origin is None) and "LMCACHE_MM_REQUIRE_VLLM" not in os.environ,
    reason="no vLLM (tests/vllm/requirements*.txt)",
)

POISON = 0x5A
LAYOUTS = ["LBHNC", "LBNHC", "LHBNC", "BLHNC", "BLNHC", "BHLNC"]
NOT_BUILT = re.compile("cannot express this model's mixed page sizes|cannot be split into 2 kernel blocks")


def build(cases: Any, kind: str, layout: str, kernel_blocks: int) -> dict[str, torch.Tensor] | None:
    """The caches; None if vLLM does not build this combination."""
    try:
        caches: dict[str, torch.Tensor] = cases.caches_of(kind, layout, kernel_blocks)
    except ValueError as error:
        if not NOT_BUILT.search(str(error)):
            raise
        return None
    return caches


@pytest.mark.parametrize("kernel_blocks", [1, 2])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "kind",
    [
        *("GQA", "GQA, other size of V", "fp8", "fp8, scales in the page", "MLA", "MLA, fp8"),
        *("MLA with an indexer", "windows and full attention", "windows of MLA", "states"),
    ],
)
def test_pages_of_every_layout_are_stored_and_loaded_bit_by_bit(cases, url, kind, layout, kernel_blocks, monkeypatch):
    """They are loaded into other pages, and no other bytes change. Skips combinations that vLLM does not build."""
    messages = importlib.import_module("lmcache_mm.vllm.kv.messages")
    monkeypatch.setattr("lmcache_mm.vllm.kv.worker.SAVE_S", 30)  # else a busy machine may give saves up
    caches = build(cases, kind, layout, kernel_blocks)
    if caches is None:
        return
    worker = cases.worker_of(kind, layout, caches, url)
    groups = cases.groups(kind, layout)
    assert sorted(name for group in groups for name in group.layers) == sorted(caches)
    memory = memory_of(caches)
    random = torch.randint(0, 256, memory.shape, generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    for table in sorted({group.table for group in groups}):
        memory.copy_(random)
        pages, others = [1, 7, 9], [5, 8, 6]
        layers = [name for group in groups if group.table == table for name in group.layers]
        pages_of = {name: by_page(caches[name], cases.BLOCKS) for name in layers}
        want = {name: of_pages[pages].clone() for name, of_pages in pages_of.items()}
        keys = [bytes([table, i]) * 16 for i in range(2)]

        def records(of: list[int], table: int = table, keys: list[bytes] = keys) -> list[Any]:
            if any(group.states for group in groups if group.table == table):
                return [messages.RecordPages(table, bytes([table, i]) * 16, [page], 32) for i, page in enumerate(of)]
            return [
                messages.RecordPages(table, keys[0], of[:2], 64),
                messages.RecordPages(table, keys[1], of[2:], 32),
            ]

        worker.begin_step(messages.Metadata(saves=[messages.Save(b"", records(pages))]))
        worker.save()
        worker.begin_step(messages.Metadata(written=set(pages)))
        memory.fill_(POISON)  # while the store continues with what it has read
        while not (news := worker.take_news()) or not news.saves:
            worker.take_stats()
        worker.load([messages.Load(0, "b", b"", records(others))])
        while not (results := worker.results()).finished_recving:
            time.sleep(0.001)
        assert not results.failed_recving
        for name, of_pages in pages_of.items():
            assert torch.equal(of_pages[others], want[name])
            of_pages[others] = POISON
        assert (memory == POISON).all()
    worker.close()


def test_nothing_touches_the_pages_of_an_engine_that_sleeps(cases, url):
    """The pages are unmapped then. What was read before is stored; new transfers fail."""
    messages = importlib.import_module("lmcache_mm.vllm.kv.messages")
    caches = cases.caches_of("GQA", "BLHNC")
    memory = memory_of(caches)
    memory.copy_(torch.randint(0, 256, memory.shape, dtype=torch.uint8))
    worker = cases.worker_of("GQA", "BLHNC", caches, url)
    records = [messages.RecordPages(0, b"k" * 32, [1, 7], 64)]
    want = [by_page(cache, cases.BLOCKS)[[1, 7]].clone() for cache in caches.values()]

    def save(key: bytes) -> Any:
        worker.begin_step(messages.Metadata(saves=[messages.Save(b"", [replace(records[0], key=key)])]))
        worker.save()

    def load() -> Any:
        worker.load([messages.Load(0, "b", b"", records)])
        while not (results := worker.results()).finished_recving:
            time.sleep(0.001)
        return results

    save(b"k" * 32)
    worker.fall_asleep()
    memory.fill_(POISON)
    while not (news := worker.take_news()) or not news.saves:
        worker.take_stats()
    assert load().failed_recving == {"b"}
    save(b"l" * 32)
    assert worker.take_stats().data["failed_stores"] == 1
    assert (memory == POISON).all()
    worker.wake_up()
    assert not load().failed_recving
    for cache, pages in zip(caches.values(), want, strict=True):
        assert torch.equal(by_page(cache, cases.BLOCKS)[[1, 7]], pages)
    worker.close()


def memory_of(caches: dict[str, torch.Tensor]) -> torch.Tensor:
    """The caches' common memory: uint8, 1-D."""
    first = next(iter(caches.values()))
    return torch.empty(0, dtype=torch.uint8, device=first.device).set_(first.untyped_storage())


def by_page(cache: torch.Tensor, blocks: int) -> torch.Tensor:
    """A view, uint8 [blocks, ...], with the kernel blocks of each block together."""
    return (cache if cache.dtype == torch.uint8 else cache.view(torch.uint8)).unflatten(0, (blocks, -1))


def test_a_save_that_the_store_delays_is_given_up_when_its_pages_are_written_again(cases, url, monkeypatch):
    messages = importlib.import_module("lmcache_mm.vllm.kv.messages")
    caches = cases.caches_of("GQA", "BLHNC")
    worker = cases.worker_of("GQA", "BLHNC", caches, url)
    reserve, goes_on = slab.SlabStore.reserve, threading.Event()
    monkeypatch.setattr(slab.SlabStore, "reserve", lambda *of: goes_on.wait(60) and reserve(*of))
    records = [messages.RecordPages(0, b"k" * 32, [1, 7], 64)]
    worker.begin_step(messages.Metadata(saves=[messages.Save(b"", records)]))
    worker.save()
    worker.begin_step(messages.Metadata(written={7}))
    memory_of(caches).fill_(POISON)
    goes_on.set()
    told = []
    while not (news := worker.take_news()) or not news.saves:
        told += [stats] if (stats := worker.take_stats()) else []
    assert [stats.data.get("failed_stores") for stats in told] == [1]
    worker.load([messages.Load(0, "b", b"", records)])
    while not (results := worker.results()).finished_recving:
        time.sleep(0.001)
    assert results.failed_recving == {"b"}
    worker.close()


def test_most_layouts_are_built(cases):
    """Otherwise the test above would test nothing."""
    for kind in cases.KINDS:
        assert sum(build(cases, kind, *one) is not None for one in product(LAYOUTS, (1, 2))) >= 6, kind


@pytest.mark.parametrize("kind", ["MLA with an indexer", "windows and full attention"])
def test_the_scheduler_asks_for_all_that_workers_store(cases, url, kind, monkeypatch):
    """vLLM shows its scheduler only one layer of each group."""
    monkeypatch.setattr("lmcache_mm.vllm.identity.namespace_of", lambda *_: Namespace(model="m"))
    messages = importlib.import_module("lmcache_mm.vllm.kv.messages")
    scheduler_of = importlib.import_module("lmcache_mm.vllm.kv.scheduler").Scheduler
    config = cases.config_of("BLHNC")
    seen = cases.generate_scheduler_kv_cache_config([cases.kv_cache_config_of(kind, "BLHNC")])
    scheduler = scheduler_of(config, cases.Options(store=url), cases.groups_of(config, seen), 64, 32)
    worker = cases.worker_of(kind, "BLHNC", cases.caches_of(kind, "BLHNC"), url)
    scheduler.learn_layouts({0: worker.layout})
    record = Record(0, 64, b"a" * 32)
    pages = [messages.RecordPages(group.table, record.key, [1, 2], 64) for group in scheduler._places.tables.values()]
    worker.begin_step(messages.Metadata(saves=[messages.Save(b"", pages)]))
    worker.save()
    while not (news := worker.take_news()) or not news.saves:
        worker.take_stats()
    with closing(open_store(url)) as store:
        assert store.stats()["records"] == len(cases.groups(kind, "BLHNC")) == 2
        assert scheduler._places.longest(store, [record]) == ([record], 64)
        store.delete([scheduler._places.keys(record)[1]])
        assert scheduler._places.longest(store, [record]) == ([], 0)
    scheduler.close()
    worker.close()


@pytest.mark.parametrize(
    ("more", "text"),
    [
        ({"mamba_cache_mode": "none"}, "mamba_cache_mode='none' are not supported .*--mamba-cache-mode align"),
        ({"mamba_cache_mode": "all"}, "mamba_cache_mode='all' are not supported .*--mamba-cache-mode align"),
        ({"num_speculative_blocks": 2}, "speculative decoding is not supported with layers that keep a state"),
    ],
)
def test_states_that_cannot_be_loaded_are_refused(cases, more, text, monkeypatch):
    group = cases.KVCacheGroupSpec(cases.names(1), replace(cases.STATE, **more))
    monkeypatch.setitem(cases.KINDS, "refused", [group])
    with pytest.raises(ValueError, match=rf"^LMCacheMMConnector: .*{text}"):
        cases.groups("refused", "LBHNC")


def test_partial_pages_are_refused_with_states(cases, monkeypatch):
    connector = importlib.import_module("lmcache_mm.vllm.connector")
    config = cases.config_of("BLHNC")
    config.kv_transfer_config.kv_connector_extra_config = {"store": "shm:///unused", "opaque_tails": True}
    with pytest.raises(ValueError, match="opaque_tails is not supported with layers that keep a state"):
        connector.LMCacheMMConnector(
            config, connector.KVConnectorRole.WORKER, cases.kv_cache_config_of("states", "BLHNC")
        )


@pytest.mark.parametrize(
    "more",
    [
        {"shapes": ((56, 3), (6, 16, 16))},
        {"shapes": ((3, 56), (3, 32, 16))},
        {"dtypes": (torch.float16, torch.float32)},
        {"tp_replicated": True},
    ],
)
def test_states_of_other_tensors_have_a_namespace_of_their_own(cases, url, more, monkeypatch):
    """vLLM shows all of them as the same number of bytes."""
    prints = []
    for state in (cases.STATE, replace(cases.STATE, **more)):
        groups = [cases.KVCacheGroupSpec(cases.names(2), cases.GQA), cases.KVCacheGroupSpec(cases.names(2, 2), state)]
        monkeypatch.setitem(cases.KINDS, "one", groups)
        worker = cases.worker_of("one", "BLHNC", cases.caches_of("one", "BLHNC"), url)
        prints.append(worker.layout.fingerprint)
        worker.close()
    assert prints[0] != prints[1]


def test_context_parallelism_is_refused(cases):
    config = cases.config_of("LBHNC")
    config.parallel_config.decode_context_parallel_size = 2
    with pytest.raises(ValueError, match="decode_context_parallel_size > 1 is not supported"):
        cases.groups_of(config, cases.kv_cache_config_of("GQA", "LBHNC"))


def test_layouts_and_dtypes_have_namespaces_of_their_own(cases, url):
    """Bytes with different meanings are never taken for each other."""
    seen = {}
    for kind, layout in product(("GQA", "fp8", "MLA"), ("LBHNC", "LBNHC")):
        worker = cases.worker_of(kind, layout, cases.caches_of(kind, layout), url)
        seen[kind, layout] = worker.layout.fingerprint
        worker.close()
    assert seen["MLA", "LBHNC"] == seen["MLA", "LBNHC"]  # with one head there is only one order
    assert len(set(seen.values())) == 5


@pytest.mark.parametrize(
    ("first", "end", "pages"),
    [
        (0, 100, [[1, 2], [3, 4]]),
        (32, 100, [[0, 2], [3, 4]]),  # the first page is vLLM's own already
        (0, 70, [[1, 2], [3, 0]]),  # vLLM uses only a part of the hit, and allocates pages for that part
        (32, 64, [[0, 2]]),
    ],
)
def test_a_load_has_the_pages_that_it_is_for(cases, url, first, end, pages, monkeypatch):
    monkeypatch.setattr("lmcache_mm.vllm.identity.namespace_of", lambda *_: Namespace(model="m"))
    scheduler_of = importlib.import_module("lmcache_mm.vllm.kv.scheduler").Scheduler
    config, groups = cases.config_of("LBHNC"), cases.groups("GQA", "LBHNC")
    scheduler = scheduler_of(config, cases.Options(store=url), groups, cases.CHUNK_TOKENS, cases.BLOCK_TOKENS)
    records = [Record(0, 64, b"a" * 32), Record(64, 100, b"b" * 32)]
    allotted = ([1, 2, 3, 4][: -(-end // 32)],)
    wanted = [record for record in records if record.end > first and record.begin < end]
    assert [one.pages for one in scheduler._places.pages(wanted, allotted, first, end)] == pages
    scheduler.close()


@pytest.mark.parametrize(
    ("extra", "text"),
    [
        ({}, 'the option "store" is missing; for example "store": "shm:///vllm'),
        ({"store": "shm:///x", "chunk": 3}, "unknown option 'chunk'; the options are store, weights"),
        ({"store": "mem://?capacity=1MiB"}, "only one process can use mem:"),
        ({"store": ["mem://?capacity=1MiB"]}, "only one process can use mem:"),
        ({"store": "shm:///x", "load": "lazy"}, "load: expected async or sync or layers, got 'lazy'"),
        ({"store": "shm:///x", "identifiers": None}, "identifiers: expected verify or trust, got None"),
        ({"store": "shm:///x", "opaque_tails": "yes"}, "opaque_tails: expected true or false, got 'yes'"),
        ({"store": "shm:///x", "chunk_tokens": 0}, "chunk_tokens: expected a whole number above 0, got 0"),
        ({"store": "shm:///x", "state_tokens": 0}, "state_tokens: expected a whole number above 0, got 0"),
        ({"store": "shm:///x", "state_tokens": "all"}, "state_tokens: expected a whole number above 0, got 'all'"),
        ({"store": "shm:///x", "chunk_tokens": 256.5}, "chunk_tokens: expected a whole number above 0, got 256.5"),
        ({"store": "shm:///x", "timeout_s": float("inf")}, "timeout_s: expected a number above 0, got inf"),
        ({"store": "shm:///x", "weights": ""}, "weights: expected a name, got ''"),
        ({"store": "tiered:shm:///x,mem:"}, "only one process can use mem:"),
        ({"store": []}, "store: expected a URL such as"),
        ({"store": 5}, "store: expected a URL such as"),
        ({"store": "shm:///x", "timeout_s": "5"}, "timeout_s: expected a number above 0, got '5'"),
    ],
)
def test_options_that_are_wrong_are_refused(cases, extra, text):
    with pytest.raises(ValueError, match=f"^LMCacheMMConnector: .*{re.escape(text)}"):
        cases.Options.of(extra)


@pytest.mark.parametrize("load", ["sync", "layers"])
def test_loads_within_a_step_are_refused_where_vllm_lends_their_pages_to_others(cases, load, monkeypatch):
    """With prefix caching, it lends them before the load has succeeded."""
    connector = importlib.import_module("lmcache_mm.vllm.connector")
    monkeypatch.setattr(connector, "Worker", lambda *_, **__: None)
    config = cases.config_of("BLHNC")
    config.kv_transfer_config.kv_connector_extra_config = {"store": "shm:///unused", "load": load}
    arguments = (config, connector.KVConnectorRole.WORKER, cases.kv_cache_config_of("GQA", "BLHNC"))
    config.cache_config.enable_prefix_caching = True
    with pytest.raises(ValueError, match=f"load={load} is not supported with vLLM's prefix caching"):
        connector.LMCacheMMConnector(*arguments)
    config.cache_config.enable_prefix_caching = False
    connector.LMCacheMMConnector(*arguments)


@pytest.mark.parametrize("encoder", [None, "ec_both", "ec_consumer", "ec_producer"])
@pytest.mark.parametrize("missing", [True, False, None])
def test_engines_that_a_request_without_its_embeddings_can_end_say_so_at_start(cases, caplog, encoder, missing):
    """missing: whether vLLM accepts requests without the embeddings that they describe; None for a model of text."""
    connector = importlib.import_module("lmcache_mm.vllm.connector")
    config = SimpleNamespace(
        model_config=SimpleNamespace(
            multimodal_config=None if missing is None else cases.MultiModalConfig(allow_missing_mm_embeddings=missing)
        ),
        ec_transfer_config=encoder
        and cases.ECTransferConfig(ec_connector="LMCacheMMEncoderConnector", ec_role=encoder),
    )
    connector._warn_of_embeddings(config)
    warned = "such a request ends the engine: add LMCacheMMEncoderConnector" in caplog.text
    assert warned == (missing is True and encoder in (None, "ec_producer"))


def test_another_vllm_says_so_at_start(cases, monkeypatch):
    check_version = importlib.import_module("lmcache_mm.vllm.api").check_version
    check_version("0.32.0")
    check_version("0.33.1+cpu")
    for version in ("0.31.2", "0.34.0", "0.320.0", "1.0.0"):
        with pytest.raises(RuntimeError, match=f"supports vLLM 0.32 and 0.33, but this is vLLM {version}"):
            check_version(version)
    monkeypatch.setenv("LMCACHE_MM_ANY_VLLM", "1")
    check_version("0.34.0")
