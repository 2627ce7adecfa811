"""The backend on SGLang's own host pools, beside SGLang's own backend `file`."""

from __future__ import annotations

import itertools
import json
import multiprocessing
import os
import random
import signal
import threading
import time
from types import SimpleNamespace

import pytest
import torch
from sglang.srt.configs.load_config import LoadFormat
from sglang.srt.mem_cache.hicache_storage import PoolHitPolicy, PoolName, PoolTransfer
from sglang.srt.mem_cache.storage.backend_factory import StorageBackendFactory

from hosts import (
    PAGE,
    POOLS,
    STORES,
    fill,
    hashes,
    mamba,
    mha,
    mla,
    pages_of,
    rows,
    slots,
    start,
    storage_config,
    write_model,
)
from lmcache_mm.engine import SGLANG_FROM_THE_MODEL
from lmcache_mm.sglang import HiCacheBackend, identity
from lmcache_mm.sglang.pools import AddressedPages, FlatPages, layouts_of
from lmcache_mm.stores.local.slab_files import shm_directory


def transfer(pool, name, keys, pages, **fields):
    return PoolTransfer(name=name, host_indices=slots(pool, pages), keys=keys, **fields)


def moved(pools, keys, pages):
    return [transfer(pool, name, keys, pages) for name, pool in pools.items()]


@pytest.mark.parametrize("kind", POOLS)
def test_what_is_stored_and_read_is_what_file_stores_and_reads(kind, url_of, backend_of, peer_of, monkeypatch):
    monkeypatch.setattr("lmcache_mm.sglang.pools.STEP_BYTES", 1)  # one page after the other
    pools = POOLS[kind]()
    ours, peer = backend_of(url_of("shm"), pools), peer_of(pools)
    keys, stored, into = hashes(6), [1, 2, 3, 5, 8, 13], [20, 21, 22, 23, 24, 25]
    for seed, (name, pool) in enumerate(pools.items()):
        fill(pool, stored, seed)
        assert ours.batch_get_v2(moved({name: pool}, keys, into)) == (
            {name: [False] * 6} if pages_of(pool, [1])[0] else {name: [True] * 6}
        )
    written = moved(pools, keys, stored)
    assert ours.batch_set_v2(written) == peer.batch_set_v2(written) == {name: [True] * 6 for name in pools}
    for backend in (ours, peer):
        for seed, pool in enumerate(pools.values()):
            fill(pool, into, 100 + seed)
            before = pages_of(pool, [0, 19, 26, *stored])
            assert backend.batch_get_v2(moved(pools, keys, into))
            assert pages_of(pool, into) == pages_of(pool, stored)
            assert pages_of(pool, [0, 19, 26, *stored]) == before
    # In another order, one of which is not there.
    other = [keys[3], keys[0], "none such", keys[1]]
    reads = moved(pools, other, into[:4])
    found = ours.batch_get_v2(reads)
    for name, pool in pools.items():
        empty = not pages_of(pool, [0])[0]
        assert found[name] == ([True] * 4 if empty else [True, True, False, False])
        assert pages_of(pool, into[:2]) == pages_of(pool, [stored[3], stored[0]])


@pytest.mark.parametrize("kind", STORES)
def test_on_every_store_pages_come_back(kind, url_of, backend_of):
    url = url_of(kind)
    pools = POOLS["states"]()
    first = backend_of(url, pools)
    keys, stored, into = hashes(8), range(1, 9), range(10, 18)
    first.clear()
    for seed, pool in enumerate(pools.values()):
        fill(pool, stored, seed)
    assert first.batch_exists(keys) == 0
    assert first.batch_set_v1(keys, slots(pools[PoolName.KV], stored)) == [True] * 8
    assert first.batch_set_v2(moved(pools, keys, stored)) == {name: [True] * 8 for name in pools}
    if kind == "mem":
        second = first
    else:  # another engine
        for store in (first._store, *getattr(first._store, "tiers", ())):
            store.flush()
        second = backend_of(url, pools)
    assert second.batch_exists([*keys, "none such", keys[0]]) == 8
    assert second.exists(keys[0])
    assert not second.exists("none such")
    got = second.batch_get_v1(keys, slots(pools[PoolName.KV], into))
    assert got == [True] * 8
    assert pages_of(pools[PoolName.KV], into) == pages_of(pools[PoolName.KV], stored)
    assert second.batch_get_v2(moved(pools, keys, into)) == {name: [True] * 8 for name in pools}
    assert pages_of(pools[PoolName.MAMBA], into) == pages_of(pools[PoolName.MAMBA], stored)
    assert second.clear()
    assert second.batch_exists(keys) == 0


@pytest.mark.parametrize("kind", STORES)
@pytest.mark.parametrize("seed", range(8))
def test_prefixes_that_can_be_restored_are_those_of_file(seed, kind, url_of, backend_of, peer_of):
    pools = {PoolName.KV: mha(), PoolName.SWA: mha(layers=1), PoolName.DRAFT: mha(layers=2)}
    ours, peer = backend_of(url_of(kind), pools), peer_of(pools)
    ours.clear()
    dice = random.Random(seed)
    keys = hashes(12)
    for name, pool in pools.items():
        there = [i for i in range(12) if dice.random() < (0.93 if name == PoolName.KV else 0.7)]
        there = list(range(12)) if seed == 0 else there
        for backend in (ours, peer):
            backend.batch_set_v2([transfer(pool, name, [keys[i] for i in there], there)])
    ours._store.flush()
    windows = [1, 2, 3, 5]
    for swa, draft in itertools.product([*windows, None], [*windows, None]):
        asked = [
            PoolTransfer(
                name=name,
                keys=keys[:window] if window else None,
                hit_policy=PoolHitPolicy.TRAILING_PAGES if window else PoolHitPolicy.ALL_PAGES,
            )
            for name, window in ((PoolName.SWA, swa), (PoolName.DRAFT, draft))
        ]
        assert ours.batch_exists_v2(keys, asked) == peer.batch_exists_v2(keys, asked)
    assert ours.batch_exists_v2(keys) == peer.batch_exists_v2(keys)
    assert ours.batch_exists(keys) == peer.batch_exists(keys)
    assert ours.batch_exists_v2([]) == peer.batch_exists_v2([])


def test_a_hit_policy_that_file_does_not_know_is_refused(backend_of):
    backend = backend_of("mem://?capacity=1MiB", {PoolName.KV: mha()})
    asked = [PoolTransfer(name=PoolName.KV, hit_policy=PoolHitPolicy.BLOCK_GROUPS)]
    with pytest.raises(ValueError, match="hit_policy"):
        backend.batch_exists_v2(hashes(1), asked)


def test_a_pool_of_which_sglang_hands_out_no_pages_is_refused(backend_of, monkeypatch):
    def fail(*_):
        raise NotImplementedError("not yet")

    pool = mha()
    for method in ("get_page_buffer_meta", "get_dummy_flat_data_page"):  # as of a pool in MXFP8
        monkeypatch.setattr(pool, method, fail)
    refusal = r"pool kv: SGLang hands out no pages of MHATokenToKVPoolHost \(not yet\); start without the backend"
    with pytest.raises(ValueError, match=refusal):
        backend_of("mem://?capacity=1MiB", {PoolName.KV: pool})


def test_keys_and_values_of_different_widths_come_back(backend_of):
    pool, keys = mha("page_first", width_of_values=8), hashes(1)
    backend = backend_of("mem://?capacity=1MiB", {PoolName.KV: pool})
    for buffer in (pool.k_buffer, pool.v_buffer):
        buffer.copy_(torch.rand(buffer.shape))
    assert backend.batch_set_v1(keys, slots(pool, [1])) == [True]
    assert backend.batch_get_v1(keys, slots(pool, [2])) == [True]
    for buffer in (pool.k_buffer, pool.v_buffer):
        assert torch.equal(buffer[PAGE : 2 * PAGE], buffer[2 * PAGE : 3 * PAGE])


def test_a_pool_that_was_not_registered_is_refused(backend_of):
    pool = mha()
    backend = backend_of("mem://?capacity=1MiB", {PoolName.KV: pool})
    other = [transfer(pool, PoolName.SWA, hashes(1), [1])]
    for call in (backend.batch_get_v2, backend.batch_set_v2, lambda asked: backend.batch_exists_v2([], asked)):
        with pytest.raises(ValueError, match="pool: expected one of kv, got swa"):
            call(other)


def test_pages_are_read_and_written_in_place_where_sglang_says_where_they_are(backend_of):
    pools = {PoolName.KV: mha("layer_first"), PoolName.MAMBA: mamba(), PoolName.SWA: mha("page_first")}
    backend = backend_of("mem://?capacity=64MiB", pools)
    assert all(isinstance(pages, AddressedPages) for pages in backend._pools.values())
    # Two pieces of one size are planes of one record; the states' three sizes are three records.
    assert [len(backend._pools[name.value].keys(["a"])[0]) for name in pools] == [1, 3, 1]
    backend = backend_of("mem://?capacity=64MiB", {PoolName.KV: mha(), PoolName.MAMBA: mamba(side_states=True)})
    assert isinstance(backend._pools["mamba"], FlatPages)


def test_pages_that_move_or_do_not_lie_evenly_are_not_taken_by_address(monkeypatch):
    pool = mha("page_first")
    assert layouts_of(pool, "pool")
    whole = pool.get_page_buffer_meta

    def uneven(indices, page):
        begins, sizes = whole(indices)
        return [begin + 64 * (int(indices[0]) == page * PAGE) for begin in begins], sizes

    for page in (1, 31):  # the second, the last
        monkeypatch.setattr(pool, "get_page_buffer_meta", lambda indices, page=page: uneven(indices, page))
        assert not layouts_of(pool, "pool")
    monkeypatch.setattr(pool, "get_page_buffer_meta", lambda indices: ([0], [64]))  # one on top of the other
    assert not layouts_of(pool, "pool")
    monkeypatch.undo()
    monkeypatch.setattr(pool, "shared_allocation_domain", object())
    assert not layouts_of(pool, "pool")


def test_slots_of_another_number_are_no_pages(backend_of):
    pool = mha()
    backend = backend_of("mem://?capacity=64MiB", {PoolName.KV: pool})
    keys = hashes(2)
    assert backend.batch_set_v1(keys, slots(pool, [1, 2])[:-1]) == [False, False]
    assert backend.batch_get_v1(keys, slots(pool, [1])) == [False, False]
    assert backend.batch_set_v2([PoolTransfer(name=PoolName.KV, keys=keys)]) == {PoolName.KV: [False, False]}
    assert backend.batch_exists(keys) == 0


def test_slots_of_parts_of_pages_are_no_pages(backend_of):
    pool, keys = mha(), hashes(2)
    backend = backend_of("mem://?capacity=64MiB", {PoolName.KV: pool})
    whole = slots(pool, [1, 2])
    for others in (whole + 2, whole.flip(0), whole[[0, 1, 2, 2, 4, 5, 6, 7]]):
        assert backend.batch_set_v1(keys, others) == [False, False]
        assert backend.batch_get_v1(keys, others) == [False, False]
    assert backend.batch_exists(keys) == 0
    assert backend.batch_set_v1(keys, whole) == [True, True]


def test_slots_outside_the_pool_are_no_pages(backend_of, caplog):
    """They are the caller's mistake, and the store keeps serving others."""
    pools = {PoolName.KV: mha(), PoolName.MAMBA: mamba(), PoolName.SWA: mamba(side_states=True)}
    backend, keys = backend_of("mem://?capacity=64MiB", pools), hashes(1)
    for name, pool in pools.items():
        inside = transfer(pool, name, keys, [1])
        assert backend.batch_set_v2([inside]) == {name: [True]}
        for page in (-1, -(pool.size // pool.page_size), pool.size // pool.page_size, 1 << 40):
            outside = transfer(pool, name, keys, [page])
            assert backend.batch_get_v2([outside]) == {name: [False]}
            assert backend.batch_set_v2([outside]) == {name: [False]}
            assert f"pool {name.value}: expected slots from 0 to {pool.size - 1}" in caplog.text
            caplog.clear()
        assert not backend._breaker.open
        assert backend.batch_get_v2([inside]) == {name: [True]}
    pool = pools[PoolName.KV]
    last = pool.size // pool.page_size - 1
    assert backend.batch_set_v1(keys, slots(pool, [last])) == backend.batch_get_v1(keys, slots(pool, [0])) == [True]
    counts = backend.stats()
    assert (counts["failed_loads"], counts["failed_stores"]) == (0, 0)


def test_what_sglang_calls_deprecated_is_not_there(backend_of):
    backend = backend_of("mem://?capacity=1MiB", {PoolName.KV: mha()})
    for method in (backend.get, backend.set, backend.batch_get, backend.batch_set):
        with pytest.raises(NotImplementedError, match="batch_get_v1"):
            method("a", torch.zeros(4))


# --- Whose pages


def test_with_mla_one_rank_writes_for_all(url_of, backend_of):
    url = url_of("shm")
    pools = {PoolName.KV: mla(), PoolName.MAMBA: mamba(), PoolName.DRAFT: mla()}
    ranks = [backend_of(url, pools, is_mla_model=True, tp_size=2, tp_rank=rank) for rank in (0, 1)]
    keys = hashes(3)
    assert ranks[1].batch_set_v1(keys, slots(pools[PoolName.KV], [1, 2, 3])) == [True] * 3
    assert ranks[0].batch_exists(keys) == 0  # the second rank leaves it to the first
    for rank, backend in enumerate(ranks):
        for seed, pool in enumerate(pools.values()):
            fill(pool, [1, 2, 3], 10 * rank + seed)
        # Of what all ranks have the same of, the second one stores nothing.
        assert backend.batch_set_v2(moved(pools, keys, [1, 2, 3])) == {name: [True] * 3 for name in pools}
    assert ranks[1].batch_get_v2(moved(pools, keys, [4, 5, 6])) == {name: [True] * 3 for name in pools}
    of_rank = {name: pages_of(pool, [1, 2, 3]) for name, pool in pools.items()}  # 1
    assert pages_of(pools[PoolName.MAMBA], [4, 5, 6]) == of_rank[PoolName.MAMBA]
    for name, seed in ((PoolName.KV, 0), (PoolName.DRAFT, 2)):
        assert pages_of(pools[name], [4, 5, 6]) != of_rank[name]
        fill(pools[name], [1, 2, 3], seed)
        assert pages_of(pools[name], [4, 5, 6]) == pages_of(pools[name], [1, 2, 3])


def test_with_mla_and_ranks_a_drafter_without_is_refused(backend_of):
    pools = {PoolName.KV: mla(), PoolName.DRAFT: mha()}
    with pytest.raises(ValueError, match=r"pool draft: a drafter without MLA .* not supported with tensor parallelism"):
        backend_of("mem://?capacity=64MiB", pools, is_mla_model=True, tp_size=2)
    backend_of("mem://?capacity=64MiB", pools, is_mla_model=True)


@pytest.mark.parametrize(
    "ranks",
    [
        [{"tp_rank": rank, "tp_size": 2} for rank in (0, 1)],
        [{"pp_rank": rank, "pp_size": 2} for rank in (0, 1)],
        [{"attn_cp_rank": rank, "attn_cp_size": 2} for rank in (0, 1)],
        [{"pp_rank": rank, "pp_size": 2, "is_mla_model": True} for rank in (0, 1)],
        [{"tp_size": 1}, {"tp_size": 2}],
    ],
    ids=str,
)
def test_other_ranks_have_other_pages(ranks, url_of, backend_of):
    url, pools, keys = url_of("shm"), {PoolName.KV: mha()}, hashes(2)
    first, second = (backend_of(url, pools, **rank) for rank in ranks)
    assert first.batch_set_v1(keys, slots(pools[PoolName.KV], [1, 2])) == [True, True]
    assert (first.batch_exists(keys), second.batch_exists(keys)) == (2, 0)


def test_what_decides_the_bytes_is_in_the_key(url_of, backend_of, model, tmp_path, monkeypatch):
    url, keys = url_of("shm"), hashes(2)
    pool = mha("page_first")
    backend_of(url, {PoolName.KV: pool}).batch_set_v1(keys, slots(pool, [1, 2]))

    def found(pools=None, name=PoolName.KV, **changes):
        backend = backend_of(url, pools or {name: mha("page_first")}, **changes)
        return backend.batch_exists_v2(keys, []).kv_hit_pages

    assert found() == 2
    assert found({PoolName.KV: mha("page_first_direct")}) == 0
    assert found({PoolName.KV: mha("page_first", heads=1, width=32)}) == 2  # these bytes are as many: of another model
    assert found(options={"weights": "others"}) == 0
    for changes in (
        {"dtype": "float16"},
        {"kv_cache_dtype": "fp8_e5m2"},
        {"mamba_ssm_dtype": "float16"},
        {"mamba_ssm_dtype": "bfloat16"},
        {"quantization": "fp8"},
        {"json_model_override_args": '{"rope_theta": 7}'},
        {"speculative_algorithm": "EAGLE"},
        {"modelopt_quant": "fp8"},
        {"rl_quant_profile": "/profile"},
        {"weight_version": "2"},
        {"model_loader_extra_config": '{"qlora_adapter_name_or_path": "/adapter"}'},
    ):
        start(model, **changes)
        assert found() == 0, changes
    start(write_model(tmp_path / "another", rope_theta=5.0))
    assert found() == 0
    start(model)
    monkeypatch.setenv("LMCACHE_MM_SECRET", "another secret, as long as that one")
    assert found() == 0
    monkeypatch.undo()


@pytest.mark.parametrize("of", ["temporal", "conv", "side"])
def test_states_of_another_dtype_have_other_pages(of, url_of, backend_of):
    """The dtypes have the same size, so the pages' bytes would fit."""
    url, keys, found = url_of("shm"), hashes(2), []
    for dtype in (torch.float16, torch.bfloat16):
        pool = mamba(side_states=of == "side", **{of: dtype})
        backend = backend_of(url, {PoolName.KV: mha(), PoolName.MAMBA: pool})
        found.append(backend.batch_get_v2(moved({PoolName.MAMBA: pool}, keys, [3, 4])))
        assert backend.batch_set_v2(moved({PoolName.MAMBA: pool}, keys, [1, 2])) == {PoolName.MAMBA: [True, True]}
    assert found == [{PoolName.MAMBA: [False, False]}] * 2


def test_raw_bytes_of_another_dtype_have_other_pages(url_of, backend_of):
    url, keys, name = url_of("shm"), hashes(2), PoolName.DEEPSEEK_V4_C4_INDEXER
    for dtype in (torch.uint8, torch.float8_e4m3fn):
        pool = rows(dtype=dtype)
        backend = backend_of(url, {PoolName.KV: mla(), name: pool})
        assert backend.batch_get_v2(moved({name: pool}, keys, [3, 4])) == {name: [False, False]}
        assert backend.batch_set_v2(moved({name: pool}, keys, [1, 2])) == {name: [True, True]}


@pytest.mark.parametrize("option", ["quantization_param_path", "decrypted_config_file"])
@pytest.mark.parametrize("weights", [None, "named"])
def test_files_that_change_kv_are_in_the_key(option, weights, model, tmp_path):
    file, roots = tmp_path / "file.json", set()
    options = {"store": "mem://?capacity=1MiB"} | ({"weights": weights} if weights else {})
    for content in (None, "", " "):
        if content is not None:
            file.write_text((model / "config.json").read_text() + content)
            start(model, **{option: str(file)})
        backend = HiCacheBackend(storage_config(dict(options)), {})
        roots.add(backend._namespace.root())
        backend.close()
    assert len(roots) == 3


@pytest.mark.parametrize(
    "changes",
    [
        *({"load_format": name} for name in ("dummy", "remote", "flash_rl", "presharded", "private", "npcache")),
        {"custom_weight_loader": ["package.load"]},
        {"weight_cache_mode": "client"},
        {"modelopt_checkpoint_restore_path": "/checkpoint"},
        {"checkpoint_engine_wait_weights_before_ready": True},
        {"kt_weight_path": "/none"},
    ],
    ids=str,
)
def test_weights_from_elsewhere_need_a_name(changes, model):
    start(model, **changes)
    store = {"store": "mem://?capacity=1MiB"}
    with pytest.raises(ValueError, match=r"--load-format .*name them with \"weights\""):
        HiCacheBackend(storage_config(dict(store)), {})
    HiCacheBackend(storage_config({**store, "weights": "named"}), {}).close()


def test_a_model_that_loads_a_tower_of_the_hub_needs_a_name(model, tmp_path):
    start(write_model(tmp_path / "with tower", mm_vision_tower="owner/tower"))
    store = {"store": "mem://?capacity=1MiB"}
    with pytest.raises(ValueError, match=r'{"mm_vision_tower": "owner/tower"}; name them with "weights"'):
        HiCacheBackend(storage_config(dict(store)), {})
    HiCacheBackend(storage_config({**store, "weights": "named"}), {}).close()


def test_a_model_in_one_file_is_named_by_it(tmp_path):
    file, found = tmp_path / "model.gguf", set()
    args = SimpleNamespace(load_format="gguf", kt_weight_path=None, **dict.fromkeys(identity.ELSEWHERE))
    for content in ("one", "two"):
        file.write_text(content)
        found.add(identity._weights_of_model(args, SimpleNamespace(model_path=str(file), hf_config=SimpleNamespace())))
    assert len(found) == 2


def root(options=None):
    backend = HiCacheBackend(storage_config({"store": "mem://?capacity=1MiB", **(options or {})}), {})
    backend.close()
    return backend._namespace.root()


@pytest.mark.parametrize("weights", [None, "named"])
def test_experts_of_ktransformers_are_in_the_key(weights, model, tmp_path):
    options, roots = {"weights": weights} if weights else {}, [root()]
    for name, method, content in (
        ("a", "AMXINT4", ""),
        ("b", "AMXINT4", ""),
        ("a", "AMXINT8", ""),
        ("a", "AMXINT4", "1"),
    ):
        file = tmp_path / name / "layer_0" / "experts.kt"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(content)
        start(model, kt_weight_path=str(tmp_path / name), kt_method=method)
        roots.append(root(options))
    assert len(set(roots)) == (4 if weights else 5)  # a name covers the files


def test_every_format_is_sglangs_or_needs_a_name(model):
    assert set(SGLANG_FROM_THE_MODEL) < {format.value for format in LoadFormat}


def test_a_model_of_the_hub_is_named_by_its_commit(model, tmp_path, monkeypatch):
    """SGLang's ModelConfig of such a model has no commit."""
    config = SimpleNamespace(model_path="owner/model", is_multimodal=False, hf_config=SimpleNamespace())
    of_hub = SimpleNamespace(from_server_args=lambda _: config)
    monkeypatch.setattr("lmcache_mm.sglang.backend.ModelConfig", of_hub)
    monkeypatch.setattr("lmcache_mm.sglang.identity.HF_HUB_CACHE", str(tmp_path / "hub"))

    def started(**arguments):
        start(model, **arguments)
        return root()

    commits = ["1" * 40, "2" * 40]
    pinned = [started(revision=commit) for commit in commits]
    assert pinned[0] != pinned[1]
    with pytest.raises(ValueError, match=r"neither files nor a commit .*; for a model of the hub, --revision"):
        started()
    snapshots = tmp_path / "hub" / "models--owner--model" / "snapshots"
    (snapshots / commits[0]).mkdir(parents=True)
    assert started() == started(revision="main") == pinned[0]
    downloads = tmp_path / "downloads" / "models--owner--model" / "snapshots"
    (downloads / commits[0]).mkdir(parents=True)
    assert started(download_dir=str(tmp_path / "downloads")) == pinned[0]
    # Another one has come: SGLang may have started with either.
    (downloads / commits[1]).mkdir()
    for arguments in ({"download_dir": str(tmp_path / "downloads")}, {"revision": "main"}):
        with pytest.raises(ValueError, match="neither files nor a commit"):
            started(**arguments)
        (snapshots / commits[1]).mkdir(exist_ok=True)
    assert started(revision=commits[1]) == pinned[1]


def test_pools_share_no_pages(backend_of):
    pools = {PoolName.KV: mha(), PoolName.DRAFT: mha()}
    backend = backend_of("mem://?capacity=64MiB", pools)
    keys = hashes(2)
    backend.batch_set_v1(keys, slots(pools[PoolName.KV], [1, 2]))
    assert backend.batch_get_v2([transfer(pools[PoolName.DRAFT], PoolName.DRAFT, keys, [1, 2])]) == {
        PoolName.DRAFT: [False, False]
    }


def test_clearing_leaves_other_models_pages(url_of, backend_of):
    url, pools, keys = url_of("shm"), {PoolName.KV: mha()}, hashes(2)
    one, other = backend_of(url, pools), backend_of(url, pools, {"weights": "others"})
    for backend in (one, other):
        backend.batch_set_v1(keys, slots(pools[PoolName.KV], [1, 2]))
    assert one.clear()
    assert (one.batch_exists(keys), other.batch_exists(keys)) == (0, 2)


# --- What goes wrong


def write_until_killed(url, ready):
    pools = {PoolName.KV: mha(pages=200, width=512)}
    backend = HiCacheBackend(storage_config({"store": url}), {})
    backend.register_mem_pool_host(pools[PoolName.KV])
    for begin in itertools.count(0, 16):
        fill(pools[PoolName.KV], range(1), begin)
        pages = [(begin + i) % 199 for i in range(16)]
        for i, page in enumerate(pages):
            pools[PoolName.KV].kv_buffer[:, :, page * PAGE : (page + 1) * PAGE] = begin + i
        ready.value = begin
        backend.batch_set_v1(hashes(16, begin), slots(pools[PoolName.KV], pages))


@pytest.mark.parametrize("kind", ["shm", "file", "tiered"])
def test_what_a_killed_writer_stored_is_whole_or_a_miss(kind, url_of, backend_of):
    url = url_of(kind)
    processes = multiprocessing.get_context("fork")
    for kill in range(4):
        begun = processes.Value("q", -1)
        writer = processes.Process(target=write_until_killed, args=(url, begun), daemon=True)
        writer.start()
        until = time.monotonic() + 30
        while begun.value < 32 + 7 * kill and time.monotonic() < until:
            time.sleep(0.0005)
        os.kill(writer.pid, signal.SIGKILL)
        writer.join()
        assert begun.value >= 32
        pool = mha(pages=64, width=512)
        reader = backend_of(url, {PoolName.KV: pool})
        there = 0
        for number in range(begun.value + 16):
            if reader.batch_get_v1(hashes(1, number), slots(pool, [3])) == [True]:
                there += 1
                page = pool.kv_buffer[:, :, 3 * PAGE : 4 * PAGE]
                assert torch.equal(page, torch.full_like(page, number))
        assert there >= 16
        reader.close()


def damage(url, backend, page_hash, content):
    """Changes a bit of a page of the KV pool, wherever the store has it."""
    if isinstance(url, list):
        for tier in url:
            damage(tier, backend, page_hash, content)
    elif url.startswith("valkey"):
        ((key,),) = backend._pools["kv"].keys([page_hash])
        name, client = backend._store._name(key), backend._store._calls.hands[0]._connect()._client
        last = str(client.custom_command(["STRLEN", name]) - 1)
        (byte,) = client.custom_command(["GETRANGE", name, last, last])
        client.custom_command(["SETRANGE", name, last, bytes([byte ^ 1])])
    else:
        path = url.partition("://")[2].partition("?")[0]
        directory = shm_directory(path.strip("/")) if url.startswith("shm") else path
        with open(f"{directory}/slab", "r+b") as slab:
            whole = slab.read()
            begin = whole.index(content[:64])
            slab.seek(begin + 5)
            slab.write(bytes([whole[begin + 5] ^ 1]))
        if url.startswith("file"):
            os.sync()


@pytest.mark.parametrize("kind", ["shm", "file", "valkey", "tiered"])
def test_a_damaged_page_is_a_miss(kind, url_of, backend_of):
    url, pool, keys = url_of(kind), mha("page_first", width=128), hashes(4)
    backend = backend_of(url, {PoolName.KV: pool})
    backend.clear()
    fill(pool, [1, 2, 3, 4], 0)
    assert backend.batch_set_v1(keys, slots(pool, [1, 2, 3, 4])) == [True] * 4
    backend._store.flush()
    damage(url, backend, keys[2], pages_of(pool, [3])[0])
    for _ in getattr(backend._store, "tiers", [backend._store]):  # each read finds one of them
        assert backend.batch_get_v1(keys, slots(pool, [10, 11, 12, 13])) == [True, True, False, False]
        assert pages_of(pool, [10, 11]) == pages_of(pool, [1, 2])
    assert backend.batch_exists(keys) == 2  # it was removed
    assert backend.batch_set_v1(keys, slots(pool, [1, 2, 3, 4])) == [True] * 4
    assert backend.batch_get_v1(keys, slots(pool, [10, 11, 12, 13])) == [True] * 4
    assert pages_of(pool, [10, 11, 12, 13]) == pages_of(pool, [1, 2, 3, 4])


@pytest.mark.parametrize("kind", ["mha page_first", "side states"])
def test_a_store_that_hangs_costs_its_time_once(kind, backend_of, monkeypatch):
    pools = POOLS[kind]()
    backend = backend_of("mem://?capacity=64MiB", pools, {"timeout_s": 1})
    keys, name = hashes(2), list(pools)[-1]
    pool = pools[name]
    assert backend.batch_set_v2([transfer(pool, name, keys, [1, 2])]) == {name: [True, True]}
    goes_on, calls = threading.Event(), []
    get_into = backend._store.get_into

    def hang(*arguments):
        calls.append(arguments)
        goes_on.wait(30)
        return get_into(*arguments)

    monkeypatch.setattr(backend._store, "get_into", hang)
    fill(pool, [5, 6], 9)
    before, begun = pages_of(pool, [5, 6]), time.monotonic()
    assert backend.batch_get_v2([transfer(pool, name, keys, [5, 6])]) == {name: [False, False]}
    assert 1 <= time.monotonic() - begun < 20
    begun = time.monotonic()
    assert backend.batch_get_v2([transfer(pool, name, keys, [5, 6])]) == {name: [False, False]}
    assert backend.batch_exists(keys) == 0
    assert backend.batch_set_v2([transfer(pool, name, keys, [1, 2])]) == {name: [False, False]}
    assert time.monotonic() - begun < 1
    assert len(calls) == 1
    goes_on.set()
    time.sleep(0.1)
    assert pages_of(pool, [5, 6]) == before  # which are another request's by now
    counts = backend.stats()
    assert (counts["failed_loads"], counts["failed_lookups"], counts["failed_stores"]) == (2, 1, 1)
    monkeypatch.undo()
    backend._breaker._open_until = 0.0
    assert backend.batch_get_v2([transfer(pool, name, keys, [5, 6])]) == {name: [True, True]}


@pytest.mark.parametrize("call", ["batch_get_v2", "batch_set_v2"])
def test_a_store_that_is_slow_ends_a_call_in_time(call, backend_of, monkeypatch):
    monkeypatch.setattr("lmcache_mm.sglang.pools.STEP_BYTES", 1)  # one page after the other, each of which is progress
    pools, keys = POOLS["side states"](), hashes(20)
    pools |= {PoolName.SWA: mamba(side_states=True)}
    backend = backend_of("mem://?capacity=64MiB", pools, {"timeout_s": 0.3})
    pool, asked = pools[PoolName.MAMBA], {name: pools[name] for name in (PoolName.SWA, PoolName.MAMBA)}
    assert backend.batch_set_v2(moved(asked, keys[:5], range(5)))[PoolName.MAMBA] == [True] * 5
    monkeypatch.setattr("lmcache_mm.sglang.backend.CALL_S", 0.4)
    begun = []
    for name in ("get_into", "put"):
        of_store = getattr(backend._store, name)
        monkeypatch.setattr(
            backend._store,
            name,
            lambda *given, of_store=of_store: (begun.append(given), time.sleep(0.05), of_store(*given))[2],
        )
    if call == "batch_set_v2":
        assert backend.batch_set_v2(moved(asked, keys, range(20))) == {name: [False] * 20 for name in asked}
    else:
        assert backend.batch_get_v2(moved(asked, keys[:5], range(20, 25)))[PoolName.MAMBA] == [False] * 5
    assert len(begun) <= 9  # of 0.05 s each, in 0.4 s
    before = pages_of(pool, range(20, 25))
    time.sleep(0.3)
    assert pages_of(pool, range(20, 25)) == before


def test_closing_a_store_that_hangs_costs_its_time_once(backend_of, monkeypatch):
    pools, keys = POOLS["states"](), hashes(2)
    backend = backend_of("mem://?capacity=64MiB", pools, {"timeout_s": 1})
    goes_on, closed = threading.Event(), []
    for name in ("get_into", "put", "contains"):
        monkeypatch.setattr(backend._store, name, lambda *_: goes_on.wait(20))
    monkeypatch.setattr(backend._store, "close", lambda: closed.append(True))
    for name, pages in backend._pools.items():
        places = [0, PAGE] if name == "kv" else [0, 1]
        assert list(pages.load(keys, places))
        assert list(pages.store(keys, places))
    begun = time.monotonic()
    backend.close()
    assert 1 <= time.monotonic() - begun < 4  # there are eight threads that hang
    assert not closed
    goes_on.set()


def test_a_backend_whose_threads_do_not_start_leaves_no_store_open(monkeypatch):
    def fail(*_):
        raise RuntimeError("can't start new thread")

    opened = []
    monkeypatch.setattr("lmcache_mm.sglang.backend.Lane", fail)
    monkeypatch.setattr("lmcache_mm.sglang.backend.open_store", opened.append)
    with pytest.raises(RuntimeError, match="new thread"):
        HiCacheBackend(storage_config({"store": "mem://?capacity=1MiB"}), {})
    assert not opened


def test_work_that_began_is_over_when_the_next_cannot_begin(backend_of, monkeypatch):
    pools, keys = POOLS["states"](), hashes(2)
    backend, pool = backend_of("mem://?capacity=64MiB", pools), pools[PoolName.MAMBA]
    assert backend.batch_set_v2(moved({PoolName.MAMBA: pool}, keys, [1, 2])) == {PoolName.MAMBA: [True, True]}
    get_into = backend._store.get_into
    monkeypatch.setattr(backend._store, "get_into", lambda *given: (time.sleep(0.2), get_into(*given))[1])

    def fail(*_):
        raise RuntimeError("no thread")

    monkeypatch.setattr(backend._pools["mamba"]._transfers[1], "load", fail)
    fill(pool, [5, 6], 9)
    assert backend.batch_get_v2(moved({PoolName.MAMBA: pool}, keys, [5, 6])) == {PoolName.MAMBA: [False, False]}
    before = pages_of(pool, [5, 6])
    time.sleep(0.4)
    assert pages_of(pool, [5, 6]) == before


def test_clearing_a_store_that_hangs_costs_its_time(backend_of, monkeypatch, caplog):
    pool, keys = mha(), hashes(2)
    backend = backend_of("mem://?capacity=64MiB", {PoolName.KV: pool}, {"timeout_s": 0.2})
    assert backend.batch_set_v1(keys, slots(pool, [1, 2])) == [True, True]
    goes_on, forget = threading.Event(), backend._store.forget
    monkeypatch.setattr(backend._store, "forget", lambda owner: goes_on.wait(30) and forget(owner))
    begun = time.monotonic()
    assert not backend.clear()
    assert 0.2 <= time.monotonic() - begun < 20
    assert "was not cleared, or not within 0.2 s" in caplog.text
    assert backend.batch_exists(keys) == 2  # lookups do not wait for it
    goes_on.set()
    assert backend.clear()
    assert backend.batch_exists(keys) == 0


def test_a_store_that_raises_is_left_alone(backend_of, monkeypatch):
    pool = mha()
    backend = backend_of("mem://?capacity=64MiB", {PoolName.KV: pool})

    def fail(*_):
        raise OSError("no")

    for method in ("contains", "get_into", "put", "forget", "moment"):
        monkeypatch.setattr(backend._store, method, fail)
    assert backend.batch_exists(hashes(2)) == 0
    assert backend._breaker.open
    for call in (backend.batch_get_v1, backend.batch_set_v1):
        backend._breaker._open_until = 0.0
        assert call(hashes(2), slots(pool, [1, 2])) == [False, False]
        assert backend._breaker.open
    backend._breaker._open_until = 0.0
    assert not backend.clear()


def test_calls_that_do_not_reach_the_store_say_nothing_about_it(backend_of, monkeypatch):
    pools, keys = POOLS["logical"](), hashes(2)
    backend = backend_of("mem://?capacity=64MiB", pools)
    asked = [PoolTransfer(name=PoolName.DEEPSEEK_V4_C4_INDEXER)]

    def fail(*_):
        raise OSError("no")

    monkeypatch.setattr(backend._store, "contains", fail)
    assert backend.batch_exists_v2(keys, asked).kv_hit_pages == 0
    for until in (time.monotonic() + 10, 0.0):
        backend._breaker._open_until = until
        for call in (backend.batch_get_v1, backend.batch_set_v1):
            assert call(keys, slots(pools[PoolName.KV], [1, 2])) == [True, True]
        for call in (backend.batch_get_v2, backend.batch_set_v2):
            assert call([PoolTransfer(name=name) for name in pools]) == {name: [] for name in pools}
        assert backend._breaker.open
    assert backend.batch_exists_v2(keys, asked).kv_hit_pages == 0  # a probe was left for this one
    assert backend._breaker._open_until > time.monotonic()


def test_a_full_store_says_so(backend_of):
    pool = mha("page_first", pages=64, width=128)
    backend = backend_of(f"mem://?capacity={4 * pool.page_size * pool.size_per_token}", {PoolName.KV: pool})
    assert backend.batch_set_v1(hashes(3), slots(pool, [1, 2, 3])) == [True] * 3
    # More than fit at once: what was evicted for others is not there.
    assert backend.batch_set_v1(hashes(6, 10), slots(pool, range(1, 7))).count(True) == 4
    with pytest.raises(ValueError, match="capacity of at least a page's"):
        backend_of("mem://?capacity=1KiB", {PoolName.KV: pool})


def test_metrics_say_pages_and_speeds_once(backend_of):
    pool = mha()
    backend = backend_of("mem://?capacity=64MiB", {PoolName.KV: pool})
    keys = hashes(3)
    backend.batch_set_v1(keys, slots(pool, [1, 2, 3]))
    backend.batch_get_v1([*keys, "none"], slots(pool, [4, 5, 6, 7]))
    metrics = backend.get_stats()
    assert (metrics.backup_pgs, metrics.prefetch_pgs) == ([3], [3])
    assert len(metrics.backup_bandwidth) == len(metrics.prefetch_bandwidth) == 1
    assert min(*metrics.backup_bandwidth, *metrics.prefetch_bandwidth) > 0
    assert backend.get_stats().backup_pgs == []
    assert {"loaded_pages": 3, "stored_pages": 3, "failed_loads": 0}.items() <= backend.stats().items()
    assert backend.stats()["store.puts"] == 3


# --- Options


def test_sglangs_factory_makes_it(url_of, backend_of):
    extra = {
        "backend_name": "lmcache_mm",
        "module_path": "lmcache_mm.sglang",
        "class_name": "HiCacheBackend",
        "store": "mem://?capacity=1MiB",
    }
    backend = StorageBackendFactory.create_backend("dynamic", storage_config(extra), mha())
    assert isinstance(backend, HiCacheBackend)
    assert extra["interface_v1"] == 1  # by which SGLang tells addresses
    backend.close()
    backend.close()


def test_sglangs_own_options_are_taken_where_it_leaves_them_in():
    extra = json.loads(
        '{"store": "mem://?capacity=1MiB", "prefetch_threshold": 256, "prefetch_timeout_base": 1, '
        '"prefetch_timeout_per_ki_token": 0.25, "hicache_storage_pass_prefix_keys": false}'
    )
    HiCacheBackend(storage_config(extra), {}).close()


@pytest.mark.parametrize(
    "extra, message",
    [
        ({}, 'the option "store" is missing'),
        ({"store": "mem://?capacity=1MiB", "stor": 1}, "unknown option 'stor'; the options are store, weights"),
        ({"store": []}, "store: expected a URL such as"),
        ({"store": "mem://?capacity=1MiB", "timeout_s": 0}, "timeout_s: expected a number above 0"),
        ({"store": "mem://?capacity=1MiB", "timeout_s": 8.1}, "timeout_s: expected at most 8, got 8.1"),
        ({"store": "mem://?capacity=1MiB", "weights": ""}, "weights: expected a name"),
        ({"store": "mem://?capacity=1MiB", "identifiers": "verify"}, 'identifiers: expected "trust"'),
        ({"store": "redis://host:1"}, "valkey://HOST:PORT"),
        ({"store": "mem://?capacity=1MiB", "interface_v1": 0}, "interface_v1: expected 1 or nothing, got 0"),
    ],
)
def test_wrong_options_are_named(extra, message):
    with pytest.raises(ValueError, match=message):
        HiCacheBackend(storage_config(extra), {})


def test_weights_without_a_name_are_refused(tmp_path):
    folder = write_model(tmp_path / "nameless")
    (folder / "model.safetensors").unlink()
    start(folder)
    with pytest.raises(ValueError, match="neither files nor a commit identify the weights"):
        HiCacheBackend(storage_config({"store": "mem://?capacity=1MiB"}), {})
