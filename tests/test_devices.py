"""The same operations on every device of this machine: always on the CPU, and on a GPU if there is one."""

from __future__ import annotations

import importlib
import importlib.util
import os
import threading
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import lmcache_mm as lmc
from layouts import LAYOUTS, TOKENS, PagedCache, opaque, period_251, token_major
from lmcache_mm import _C, codec, ops, reference
from lmcache_mm.copies import HostCopies, Ring, current_event
from lmcache_mm.transfer_paths import Paths
from test_stores import new_store

HAS_GPU = torch.cuda.is_available() and bool(_C.cuda_version)
REHEARSAL = "LMCACHE_MM_REHEARSAL" in os.environ  # see tests/rehearsal
NO_GPU = pytest.mark.skipif(not HAS_GPU, reason="no GPU, or a build without CUDA kernels")
BLOCKS = [[], [3], [0, 6], [6, 2, 0, 5], [1, -1, 4], [-1], [0, 1, 2, 3, 4, 5, 6]]
ROOT = bytes(range(32))


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=NO_GPU)])
def device(request: pytest.FixtureRequest) -> torch.device:
    return torch.device(request.param, 0) if request.param == "cuda" else torch.device(request.param)


class OnDevice:
    """One of layouts' caches in a device's memory."""

    def __init__(self, cache: PagedCache, device: torch.device) -> None:
        self.host = cache
        self.memory = cache.memory.to(device, copy=True)
        by = self.memory.data_ptr() - cache.memory.data_ptr()
        planes = tuple(plane + by for plane in cache.layout.planes)
        self.layout = replace(cache.layout, planes=planes, device=device, tensors=())


@pytest.fixture(params=LAYOUTS, ids=lambda make: make.__name__)
def cache(request: pytest.FixtureRequest, device: torch.device) -> OnDevice:
    return OnDevice(request.param(), device)


@pytest.mark.parametrize("wide", [True, False], ids=["int64", "int32"])
@pytest.mark.parametrize("tokens", [1, 7, 128, 129, 1000, 4097, 30_000])
def test_keys_and_content_ids_equal_the_reference(device: torch.device, tokens: int, wide: bool):
    rng = np.random.default_rng(tokens)
    ids = torch.from_numpy(rng.integers(0, 1 << 31, tokens)).to(torch.int64 if wide else torch.int32)
    items = [lmc.Item("a", 0, 5), lmc.Item("b", tokens // 3, tokens // 2 + 1, "video"), lmc.Item("c", 4, 9)]
    cuts = sorted({1, tokens // 2 + 1, tokens, *range(256, tokens + 1, 256)})
    keys = ops.prefix_keys(ids.to(device), items, ROOT, cuts)
    assert keys.device == device
    assert torch.equal(keys.cpu(), reference.prefix_keys(ids.tolist(), items, ROOT, cuts))
    if wide:
        overwritten = ids.to(device, copy=True)
        positions = [(item.offset, item.length) for item in items]
        names, kinds = [item.identifier for item in items], [item.modality for item in items]
        ops.apply_mm_hashes_to_token_ids(overwritten, names, positions, kinds)
        assert torch.equal(overwritten.cpu(), reference.apply_mm_hashes_to_token_ids(ids.clone(), items))


@pytest.mark.parametrize("ids_on_device", [False, True], ids=["host ids", "device ids"])
@pytest.mark.parametrize("block_ids", BLOCKS, ids=str)
def test_pages_are_gathered_and_scattered_bit_by_bit(cache: OnDevice, block_ids: list[int], ids_on_device: bool):
    ids = torch.tensor(block_ids, dtype=torch.int64, device=cache.layout.device if ids_on_device else "cpu")
    sums = torch.zeros(1, dtype=torch.int64, device=cache.layout.device)
    (payload,) = ops.gather_pages(cache.layout, [ids], checksums=sums)
    want = reference.gather_pages(cache.host.layout, cache.host.memory, block_ids, len(block_ids) * TOKENS)
    assert torch.equal(payload.cpu(), want)
    assert sums.item() == reference.checksum(want)
    cache.memory.fill_(0x5A)
    cache.host.memory.fill_(0x5A)
    assert ops.scatter_pages(cache.layout, [ids], [payload], checksums=sums).tolist() == [True]
    reference.scatter_pages(cache.host.layout, cache.host.memory, block_ids, want)
    assert torch.equal(cache.memory.cpu(), cache.host.memory)
    assert ops.scatter_pages(cache.layout, [ids], [payload], checksums=sums + 1).tolist() == [False]


@pytest.mark.parametrize("make", [make for make in LAYOUTS if make is not opaque], ids=lambda make: make.__name__)
def test_tokens_and_tails_are_gathered_and_scattered_bit_by_bit(device: torch.device, make):
    cache = OnDevice(make(), device)
    slots = [5, -1, 27, 6, 0]
    payload = ops.gather_tokens(cache.layout, slots)
    want = reference.gather_tokens(cache.host.layout, cache.host.memory, slots)
    assert torch.equal(payload.cpu(), want)
    for missing in range(1, TOKENS):
        got = ops.gather_pages(cache.layout, [6, 2], tokens=2 * TOKENS - missing)
        want_tail = reference.gather_pages(cache.host.layout, cache.host.memory, [6, 2], 2 * TOKENS - missing)
        assert torch.equal(got.cpu(), want_tail)
    cache.memory.fill_(0x5A)
    cache.host.memory.fill_(0x5A)
    ops.scatter_tokens(cache.layout, slots, payload)
    reference.scatter_tokens(cache.host.layout, cache.host.memory, slots, want)
    assert torch.equal(cache.memory.cpu(), cache.host.memory)


def test_copies_of_a_gigabyte_of_short_runs_equal_plain_indexing(device: torch.device):
    """As large as a prompt's; smaller on the CPU and in a rehearsal, to save time."""
    pages = (256 if REHEARSAL else 65_536) if device.type == "cuda" else 1024
    kv = torch.randint(0, 256, (4, pages, 16, 256), dtype=torch.uint8, device=device)
    layout = lmc.KVLayout.from_tensors(list(kv), page_tokens=16, page_dim=0, token_dim=1)
    ids = torch.randperm(pages)[: pages // 2]
    payload = ops.gather_pages(layout, ids)
    assert torch.equal(payload, kv[:, ids.to(device)].reshape(-1))
    kv.zero_()
    ops.scatter_pages(layout, ids, payload)
    assert torch.equal(payload, kv[:, ids.to(device)].reshape(-1))


class Loop:
    """An inference loop on a device, whose KV encodes the prompt and position that it was computed for; it has its own
    stream if the device has streams."""

    def __init__(self, device: torch.device, store: object) -> None:
        self.kv = torch.full((3, 64, 4, 6), float("nan"), device=device)
        named = {f"layer{i}": layer for i, layer in enumerate(self.kv)}
        layout = lmc.KVLayout.from_tensors(named, page_tokens=4, page_dim=0, token_dim=1)
        self.cache = lmc.KVCache(layout, store, lmc.Namespace(model="m"), 16)
        self.on_stream = nullcontext()
        if device.type == "cuda":
            stream = torch.cuda.Stream(device)
            stream.wait_stream(torch.cuda.current_stream(device))
            self.on_stream = torch.cuda.stream(stream)

    def compute(self, tokens: int, block_ids: torch.Tensor, value: float) -> None:
        for position in range(tokens):
            self.kv[:, block_ids[position // 4], position % 4] = value + position / 1024

    def holds(self, tokens: int, block_ids: torch.Tensor, value: float) -> bool:
        rows = torch.stack([self.kv[:, block_ids[p // 4], p % 4] for p in range(tokens)], 1)
        want = value + torch.arange(tokens, device=self.kv.device)[None, :, None] / 1024
        return bool((rows == want.expand_as(rows)).all())


@pytest.fixture(params=["mem", "shm", "file", "shm,file"])
def loop(request: pytest.FixtureRequest, device: torch.device, tmp_path) -> Iterator[Loop]:
    store, remove = new_store(request.param, tmp_path, capacity="4MiB")
    loop = Loop(device, store)
    yield loop
    loop.cache.close()
    remove()


def test_a_loop_stores_and_retrieves_without_waiting_for_its_own_work(loop: Loop):
    """Pages are read after they have been computed, and written after earlier work has read them."""
    prompt = lmc.Prompt([1] * 20 + [9] * 30 + [5] * 13, [lmc.Item("a", 20, 30)])
    first, second = torch.randperm(64)[:16], torch.randperm(64)[:16]
    with loop.on_stream:
        for value in (1.0, 2.0, 3.0):
            tenant = lmc.Prompt(prompt.token_ids, prompt.items, salt=str(value))
            loop.compute(63, first, value)
            assert loop.cache.store(tenant, first).result() > 0
            loop.kv.fill_(float("nan"))
            assert loop.cache.match(tenant) == 63
            assert loop.cache.retrieve(tenant, second).result() == 63
            assert loop.holds(63, second, value)


def test_a_loop_retrieves_layer_by_layer(loop: Loop):
    prompt = lmc.Prompt([1] * 48)
    ids = torch.randperm(64)[:12]
    with loop.on_stream:
        loop.compute(48, ids, 1.0)
        loop.cache.store(prompt, ids).result()
        loop.kv.fill_(float("nan"))
        job = loop.cache.retrieve(prompt, ids, by_layer=True)
        assert job.layer_ready("layer0", 10)
        assert not torch.isnan(loop.kv[0, ids]).any()
        assert job.result() == 48
        assert loop.holds(48, ids, 1.0)


def test_a_loop_stores_layer_by_layer(loop: Loop):
    prompt = lmc.Prompt([1] * 48)
    ids = torch.randperm(64)[:12]
    with loop.on_stream:
        job = loop.cache.store(prompt, ids, by_layer=True)
        for i in range(3):
            for position in range(48):
                loop.kv[i, ids[position // 4], position % 4] = 2.0 + position / 1024
            assert job.layer_written(f"layer{i}", 10)
        loop.kv.fill_(float("nan"))
        assert job.result() == 48
        assert loop.cache.retrieve(prompt, ids).result() == 48
        assert loop.holds(48, ids, 2.0)


@NO_GPU
@pytest.mark.parametrize("paths", [Paths(((1, 1),), ((1, 1),)), Paths((), (), 4, 4)], ids=["batches", "kernels"])
def test_every_path_restores_what_was_stored(paths: Paths, tmp_path):
    store, remove = new_store("shm", tmp_path, capacity="4MiB")
    loop = Loop(torch.device("cuda", 0), store)
    prompt, ids = lmc.Prompt([1] * 48), torch.randperm(64)[:12]
    for ring in (loop.cache._transfer._payloads._loading, loop.cache._transfer._payloads._storing):
        ring.paths = paths
    with loop.on_stream:
        loop.compute(48, ids, 1.0)
        for by_layer in (False, True):
            job = loop.cache.store(prompt, ids, by_layer=by_layer)
            assert not by_layer or job.layer_written("layer2")
            assert job.result() == 48
            loop.kv.fill_(float("nan"))
            assert loop.cache.retrieve(prompt, ids, by_layer=by_layer).result() == 48
            assert loop.holds(48, ids, 1.0)
            store.clear()
    loop.cache.close()
    remove()


@NO_GPU
def test_no_thread_waits_for_a_transfer_but_the_one_that_lets_it_go():
    pages = torch.zeros(64, 1 << 20, dtype=torch.uint8, device="cuda:0")
    layout = lmc.KVLayout.from_tensors([pages], page_tokens=1, page_dim=0, opaque=True)
    ring, ids = Ring(layout, 64 << 20, urgent=True), torch.arange(64)
    payload = torch.empty(64 << 20, dtype=torch.uint8, pin_memory=True)
    passed, stop = [0], threading.Event()

    def pass_time() -> None:
        while not stop.wait(1e-3):
            passed[0] += 1

    with torch.cuda.stream(torch.cuda.Stream()):
        copies = [ring.store([(ids.data_ptr(), True, 64, 64, payload.data_ptr(), 0)], [1], True) for _ in range(64)]
        for one in copies:
            one.go_on(1, _C.CudaEvent(0, torch.cuda.current_stream().cuda_stream))
    thread = threading.Thread(target=pass_time, daemon=True)
    thread.start()
    try:
        before = passed[0]
        begun = time.perf_counter()
        while copies:
            del copies[-1]  # the last, which ends after all others
        waited_s = time.perf_counter() - begun
        assert passed[0] - before > waited_s / 1e-2
    finally:
        stop.set()
        thread.join()


@NO_GPU
def test_a_transfer_refuses_to_be_part_of_a_graph_and_breaks_nobody_elses():
    loop = Loop(torch.device("cuda", 0), "mem://?capacity=4MiB")
    prompt, ids = lmc.Prompt([1] * 48), torch.randperm(64)[:12]
    assert loop.cache.store(prompt, ids).result() == 48
    stream, x = torch.cuda.Stream(), torch.zeros(64, device="cuda:0")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.stream(stream):
        graph.capture_begin(capture_error_mode="global")
        with pytest.raises(RuntimeError, match="the stream is being captured"):
            loop.cache.retrieve(prompt, ids)
        x.add_(1)
        other = threading.Thread(target=lambda: loop.cache.retrieve(prompt, ids).result())
        other.start()
        other.join()
        graph.capture_end()
    graph.replay()
    torch.cuda.synchronize()
    assert x.unique().tolist() == [1]
    loop.cache.close()


def test_an_early_store_holds_what_was_computed_when_its_pages_were_asked_for(loop: Loop):
    """As in vLLM's connector: later work on the same stream may overwrite the pages at once."""
    with loop.on_stream:
        ids = torch.randperm(64)[:12]
        prompt = lmc.Prompt([7] * 48)
        chunks = loop.cache._chunks(loop.cache._records(prompt), ids)
        job = loop.cache._transfer.store(chunks, b"", early=True)
        loop.compute(48, ids, 4.0)
        assert job.pages_free(10)
        loop.kv.fill_(float("nan"))
        assert job.result() == 48
        assert loop.cache.retrieve(prompt, ids).result() == 48
        assert loop.holds(48, ids, 4.0)


def test_a_damaged_payload_is_not_restored(device: torch.device, tmp_path):
    store, remove = new_store("shm", tmp_path, capacity="4MiB")
    loop = Loop(device, store)
    prompt, ids = lmc.Prompt([1] * 48), torch.arange(12)
    loop.compute(48, ids, 1.0)
    loop.cache.store(prompt, ids).result()
    key = loop.cache._records(prompt)[1].key
    (slot,) = store.lend([key], [loop.cache.layout.payload_bytes(4)])
    store.view(slot)[100] ^= 1
    store.release([slot])
    assert loop.cache.retrieve(prompt, ids).result() == 16
    assert store.contains([key]) == [False]
    loop.cache.close()
    remove()


class Coded:
    """Coded payloads of chunks of a layout, copied as caches copy them."""

    def __init__(self, layout: lmc.KVLayout, chunks: list[torch.Tensor]) -> None:
        self.layout, self.chunks, self._planes = layout, chunks, len(layout.planes)
        on_gpu = layout.device.type == "cuda"
        self._copies = [Ring(layout, 1 << 20, urgent) if on_gpu else HostCopies(layout) for urgent in (False, True)]
        self.payloads = []
        for ids in chunks:
            size = codec.coded_bytes(self._planes, len(ids) * layout.page_bytes)
            self.payloads.append(torch.full((size,), 0xEE, dtype=torch.uint8, pin_memory=on_gpu))
        tiles = [payload.data_ptr() + codec.HEADER_BYTES for payload in self.payloads]
        self._parts = [
            (ids.data_ptr(), True, len(ids), len(ids) * layout.page_tokens, place, 0)
            for ids, place in zip(chunks, tiles, strict=True)
        ]

    def store(self) -> list[list[int]]:
        """The three sums of each chunk."""
        copies = self._copies[0].store(self._parts, [self._planes], True, [True] * len(self.chunks))
        copies.go_on(self._planes, current_event(self.layout.device))
        return torch.tensor(copies.wait()).view(-1, codec.SUMS).tolist()

    def load(self) -> list[int]:
        """The checksum of what each chunk's pages now hold."""
        behind, coded = current_event(self.layout.device), [True] * len(self.chunks)
        copies = self._copies[1].load(self._parts, [self._planes], True, behind, coded)
        copies.go_on(self._planes)
        return copies.wait()


def test_every_number_is_coded_as_by_the_reference_and_comes_back(device: torch.device):
    """All 65,536 bf16 numbers, a tile of each exponent's 256, and a tile that has exceptions."""
    exponents, patterns = torch.arange(256)[:, None], torch.arange(2048) % 256
    numbers = (patterns & 0x80) << 8 | exponents << 7 | (patterns & 0x7F)
    numbers[128, torch.arange(36) * 53] = torch.arange(36) * 7 << 7
    kv = numbers.to(torch.int32).to(torch.int16).view(torch.bfloat16).to(device)
    layout = lmc.KVLayout.from_tensors([kv.view(256, 1, 2048)], page_tokens=1, page_dim=0, token_dim=1)
    coded = Coded(layout, list(torch.randperm(256).split(100)))
    sums = coded.store()
    want = [numbers[ids].to(torch.int32).to(torch.int16).view(-1).view(torch.uint8) for ids in coded.chunks]
    for raw, payload, (raw_sum, tiles_sum, unfit) in zip(want, coded.payloads, sums, strict=True):
        assert unfit == 0
        assert codec.put_header(payload, raw_sum, tiles_sum, len(raw)) == reference.checksum(payload)
        assert payload.numpy().tobytes() == reference.encode_payload(raw, 1)
    before = kv.clone()
    kv.fill_(1.0)
    assert coded.load() == [one[0] for one in sums]
    assert torch.equal(kv.view(torch.int16), before.view(torch.int16))


@pytest.mark.parametrize("seed", range(4))
def test_any_coded_bytes_are_decoded_as_by_the_reference(device: torch.device, seed: int):
    kv = torch.ones(2, 5, 4, 776, dtype=torch.bfloat16, device=device)
    layout = lmc.KVLayout.from_tensors(list(kv), page_tokens=4, page_dim=0, token_dim=1)
    coded = Coded(layout, [torch.tensor([4, 0]), torch.tensor([1, -1, 3])])
    want = kv.cpu().view(torch.uint8)
    rng, sums = np.random.default_rng(seed), []
    for payload, ids in zip(coded.payloads, coded.chunks, strict=True):
        payload.copy_(torch.from_numpy(rng.integers(0, 256 >> seed, len(payload), np.uint8)))
        raw, at = [], codec.HEADER_BYTES
        for _ in range(2):
            left = len(ids) * layout.page_bytes // 2
            while left:
                here = min(left, reference.TILE_NUMBERS)
                size = _C.coded_plane_bytes(2 * here)
                raw.append(reference.decode_tile(payload[at : at + size].numpy().tobytes(), here))
                at, left = at + size, left - here
        pages = torch.from_numpy(np.concatenate(raw).view(np.uint8).copy())
        sums.append(reference.checksum(pages))
        there = ids >= 0
        want[:, ids[there]] = pages.view(2, len(ids), 4, -1)[:, there]
    assert coded.load() == sums
    assert torch.equal(kv.cpu().view(torch.uint8), want)


@pytest.fixture(params=["mem", "shm", "file"])
def store(request: pytest.FixtureRequest, tmp_path) -> Iterator[object]:
    opened, remove = new_store(request.param, tmp_path, capacity="8MiB")
    yield opened
    remove()


@pytest.mark.parametrize("how", ["at once", "early", "by layer"])
@pytest.mark.parametrize("noise", [False, True], ids=["all fits", "a chunk that does not fit"])
def test_a_cache_with_a_codec_stores_what_the_reference_does(device: torch.device, store, noise: bool, how: str):
    layers = torch.randn(2, 2, 10, 4, 2, 200, generator=torch.Generator().manual_seed(7)).bfloat16()
    if noise:
        layers[1, 1, 2].view(torch.int16).random_(generator=torch.Generator().manual_seed(8))
    kv = layers.to(device, copy=True)
    layout = lmc.KVLayout.from_tensors(
        {f"layer{i}": layer for i, layer in enumerate(kv)}, page_tokens=4, page_dim=1, token_dim=2
    )
    prompt, ids = lmc.Prompt(list(range(30))), torch.arange(8)  # three chunks and a tail
    with lmc.KVCache(layout, store, lmc.Namespace(model="m"), 8, codec="split") as cache:
        assert cache.codec == "split"
        records = cache._records(prompt)
        if how == "early":
            job = cache._transfer.store(cache._chunks(records, ids), b"", early=True)
        else:
            job = cache.store(prompt, ids, by_layer=how == "by layer")
        if how == "by layer":
            assert job.layer_written("layer0", 10)
            assert job.layer_written("layer1", 10)
        assert job.pages_free(10)
        kv.fill_(float("nan"))
        assert job.result() == 30
        cache.backend.flush()
        for i, record in enumerate(records):
            raw = layers[:, :, 2 * i : 2 * i + 2].clone()
            raw[:, :, 1, 2:] = 0 if i == 3 else raw[:, :, 1, 2:]  # past the tail
            layers[:, :, 2 * i : 2 * i + 2] = raw
            payload = raw.view(-1).view(torch.uint8)
            want = reference.encode_payload(payload, 4)
            assert (want is None) == (noise and i == 1)
            want = payload.numpy().tobytes() if want is None else want
            found = np.empty(len(want), np.uint8)
            assert cache.backend.get_into([record.key], [found]) == [True]
            assert found.tobytes() == want
        job = cache.retrieve(prompt, ids, by_layer=how == "by layer")
        if how == "by layer":
            assert job.layer_ready("layer0", 10)
            assert not torch.isnan(kv[0, :, :8]).any() or noise
        assert job.result() == 30
        assert torch.equal(kv[:, :, :8].cpu().view(torch.int16), layers[:, :, :8].view(torch.int16))


def test_a_coded_payload_that_is_wrong_is_not_restored(device: torch.device, tmp_path):
    """The store's own checksum is right: what it was given was wrong."""
    store, remove = new_store("shm", tmp_path, capacity="4MiB")
    kv = torch.randn(2, 12, 4, 400, generator=torch.Generator().manual_seed(7)).bfloat16().to(device)
    layout = lmc.KVLayout.from_tensors(list(kv), page_tokens=4, page_dim=0, token_dim=1)
    prompt = lmc.Prompt([1] * 48)
    with lmc.KVCache(layout, store, lmc.Namespace(model="m"), 16, codec="split") as cache:
        assert cache.store(prompt, range(12)).result() == 48
        key = cache._records(prompt)[1].key
        payload = np.empty(codec.coded_bytes(2, 4 * 3200), np.uint8)
        assert store.get_into([key], [payload]) == [True]
        store.delete([key])
        payload[64:] = 255
        store.put([key], [payload])
        assert cache.retrieve(prompt, range(12)).result() == 16
        assert store.contains([key]) == [False]
    remove()


def test_pages_that_kernels_cannot_code_are_stored_raw(device: torch.device):
    memory = torch.randn(5000, generator=torch.Generator().manual_seed(7)).bfloat16().to(device)
    pages = memory[4 : 4 + 4 * 1024].view(4, 4, 256)  # at a multiple of 8 bytes
    layout = lmc.KVLayout.from_tensors([pages], page_tokens=4, page_dim=0, token_dim=1)
    want = pages.clone()
    with lmc.KVCache(layout, "mem://?capacity=4MiB", lmc.Namespace(model="m"), 8, codec="split") as cache:
        assert cache.codec == (None if device.type == "cuda" else "split")
        assert cache.store(lmc.Prompt([1] * 16), range(4)).result() == 16
        pages.zero_()
        assert cache.retrieve(lmc.Prompt([1] * 16), range(4)).result() == 16
    assert torch.equal(pages, want)


@NO_GPU
def test_operations_on_a_gpu_wait_for_nobody_and_keep_the_stream(tmp_path):
    """They are enqueued after long products on the stream, and return before these are done."""
    device = torch.device("cuda", 0)
    cache = OnDevice(token_major(), device)
    stream = torch.cuda.Stream(device)
    with torch.cuda.stream(stream):
        a = torch.randn(*(2 * [128 if REHEARSAL else 4096]), device=device)
        products = torch.cuda.Event()
        # Pinned, since a copy from other memory waits for the stream.
        flipped = period_251(len(cache.memory)).flip(0).pin_memory()
        ops.gather_pages(cache.layout, [3, 1])  # the first call may load the kernel, and wait
        for _ in range(50):
            a = a @ a / 64
        products.record()
        cache.memory.copy_(flipped, non_blocking=True)
        payload = ops.gather_pages(cache.layout, [3, 1])
        assert not products.query()
    stream.synchronize()
    cache.host.memory.copy_(period_251(len(cache.memory)).flip(0))
    want = reference.gather_pages(cache.host.layout, cache.host.memory, [3, 1], 2 * TOKENS)
    assert torch.equal(payload.cpu(), want)


# --- What else has code for GPUs


ARRAYS = ["__cuda_array_interface__", *(["cupy"] if importlib.util.find_spec("cupy") else [])]


@NO_GPU
@pytest.mark.parametrize("library", ARRAYS)
def test_arrays_of_other_libraries_on_a_gpu_are_used_in_place(library: str):
    kept = torch.arange(5 * 4 * 16, dtype=torch.uint8, device="cuda:0").view(5, 4, 16)
    ids = torch.arange(300, device="cuda:0")
    if library == "cupy":
        cupy = importlib.import_module("cupy")
        array, array_of_ids = cupy.asarray(kept), cupy.asarray(ids)
    else:
        interfaces = kept.__cuda_array_interface__, ids.__cuda_array_interface__
        array, array_of_ids = (SimpleNamespace(__cuda_array_interface__=one) for one in interfaces)
    layout = lmc.KVLayout.from_tensors([array], page_tokens=4, page_dim=0, token_dim=1)
    ops.scatter_pages(layout, [3], torch.full((64,), 7, dtype=torch.uint8, device="cuda:0"))
    torch.cuda.synchronize()
    assert (kept[3] == 7).all()
    assert torch.equal(ops.prefix_keys(array_of_ids, [], ROOT, [256]), ops.prefix_keys(ids, [], ROOT, [256]))


@NO_GPU
def test_a_compiled_step_on_a_gpu_does_what_it_does_outside():
    def step(layout, kv, ids, blocks, payload):
        keys = ops.prefix_keys(ids, [lmc.Item("a", 3, 20)], ROOT, [4, 16])
        intact = ops.scatter_pages(layout, [blocks], [payload], checksums=sums)
        kv[2] = kv[1] + 1
        return keys, intact, ops.gather_pages(layout, blocks.flip(0))

    ids, blocks = torch.arange(40, device="cuda:0"), torch.tensor([1, 3], device="cuda:0")
    payload = period_251(2 * 4 * 16 * 4).to("cuda:0")
    sums = torch.tensor([reference.checksum(payload.cpu())], device="cuda:0")
    found = []
    for run in (step, torch.compile(step, backend="aot_eager", fullgraph=True)):
        kv = torch.zeros(5, 4, 16, dtype=torch.int32, device="cuda:0")
        layout = lmc.KVLayout.from_tensors([kv], page_tokens=4, page_dim=0, token_dim=1)
        found.append((*run(layout, kv, ids, blocks, payload), kv))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    assert found[1][1].tolist() == [True]


@NO_GPU
def test_encoder_outputs_go_to_a_gpu_and_back():
    """After the stream's earlier work, from and to pinned memory, with any strides."""
    outputs = [torch.randn(5, 7, device="cuda"), torch.arange(12, dtype=torch.int16, device="cuda").view(3, 4).t()]
    want = [one.cpu() for one in outputs]
    cache = lmc.EncoderCache("mem://?capacity=1MiB", lmc.Namespace(model="m"))
    with cache, torch.cuda.stream(torch.cuda.Stream()):
        outputs[0].copy_(want[0].pin_memory(), non_blocking=True)
        assert cache.save("item", outputs)
        loaded = cache.load("item", device="cuda")
        assert [(one.device.type, one.cpu().tolist()) for one in loaded] == [("cuda", one.tolist()) for one in want]
        for one in outputs:
            one.zero_()
        assert cache.load_into("item", outputs)
        assert all(torch.equal(one.cpu(), same) for one, same in zip(outputs, want, strict=True))
