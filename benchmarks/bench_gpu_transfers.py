"""Transfers between pages and host memory (pinned if there is a GPU) in shapes of real models: every way that they can
go, against the bus itself and against rivals, in the same run. Without a GPU: the same on the CPU, with less data."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import nullcontext
from functools import cache, cached_property
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

import lmcache_mm as lmc
from device import BULK, DEVICE, ON_GPU, SIZES, Work, compare, do
from lmcache_mm import _C, codec, ops
from lmcache_mm.commands import cli
from lmcache_mm.copies import HostCopies, Ring, current_event, whole_pages
from rivals import PageCopies, Rivals, lmcache_calls

PAGE_TOKENS, CHUNK_TOKENS = 16, 256
NOTHING = 0x5A5A  # the pages' content before a load
Way = tuple[int, int] | None  # least length of fragments for a batch, blocks of kernels; None: the default


class Model(NamedTuple):
    layers: int
    planes: int  # separate for K and V, or one for both
    heads: int  # per rank
    size: int
    joined: bool = False  # all layers of a page are adjacent, in one allocation


MODELS = {
    "Qwen2-VL-7B": Model(28, 2, 4, 128),
    "Qwen2-VL-2B joined": Model(28, 2, 2, 128, joined=True),
    "Qwen2-VL-2B": Model(28, 2, 2, 128),
    "Llama-3.1-8B": Model(32, 2, 8, 128),
    "DeepSeek-V3 MLA": Model(61, 1, 1, 576),
}
FIRST = tuple(MODELS)[:2]
DIRECTIONS = pytest.mark.parametrize("direction", ["store", "load"])


class Pages:
    """The KV of one prompt of a model in shuffled pages, and host memory for its payloads."""

    def __init__(self, model: str, tokens: int) -> None:
        layers, planes, heads, size, joined = MODELS[model]
        layers, pages = min(layers, SIZES.most_layers), -(-tokens // PAGE_TOKENS)
        outside, page = (layers, planes), (PAGE_TOKENS, heads, size)
        shape = (2 * pages, *outside, *page) if joined else (*outside, 2 * pages, *page)
        self._dim = 0 if joined else 2
        self.kv = torch.randn(shape, dtype=torch.bfloat16, device=DEVICE).view(torch.int16)  # for the codec, like KV
        self.by_layer = self.kv.permute(1, 2, 0, 3, 4, 5) if joined else self.kv
        named = {f"layer{i}": layer for i, layer in enumerate(self.by_layer)}
        self.layout = lmc.KVLayout.from_tensors(named, page_tokens=PAGE_TOKENS, page_dim=1, token_dim=2)
        ids, others = torch.randperm(2 * pages).split(pages)
        self.chunks, self._others = ids.split(CHUNK_TOKENS // PAGE_TOKENS), others.to(DEVICE)
        self.on_device = [ids.to(DEVICE) for ids in self.chunks]
        self.chunk_bytes = self.layout.payload_bytes(CHUNK_TOKENS // PAGE_TOKENS)
        self.bytes = self.layout.payload_bytes(pages)
        self.want, self.scratch = (torch.empty(self.bytes, dtype=torch.uint8, device=DEVICE) for _ in range(2))
        self.gather(self.want)
        self.host = torch.empty(self.bytes, dtype=torch.uint8, pin_memory=ON_GPU).fill_(1)  # touches each page
        self.host.copy_(self.want)
        self._copies = {
            direction: Ring(self.layout, self.chunk_bytes, direction == "load") if ON_GPU else HostCopies(self.layout)
            for direction in ("store", "load")
        }

    def payloads(self, of_all: torch.Tensor) -> list[torch.Tensor]:
        """Splits a buffer into one payload per chunk."""
        return list(of_all.split(self.chunk_bytes))

    def _as_pages(self, payload: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        shape = list(self.kv.shape)
        shape[self._dim] = len(ids)
        return payload.view(torch.int16).view(shape)

    def gather(self, to: torch.Tensor, host: torch.Tensor | None = None) -> None:
        """Gathers by torch, chunk by chunk; if given, copies to the host."""
        rows = self.payloads(to)
        for i, ids in enumerate(self.on_device):
            torch.index_select(self.kv, self._dim, ids, out=self._as_pages(rows[i], ids))
            if host is not None:
                self.payloads(host)[i].copy_(rows[i], non_blocking=True)

    def scatter(self, source: torch.Tensor, host: torch.Tensor | None = None) -> None:
        rows = self.payloads(source)
        for i, ids in enumerate(self.on_device):
            if host is not None:
                rows[i].copy_(self.payloads(host)[i], non_blocking=True)
            self.kv.index_copy_(self._dim, ids, self._as_pages(rows[i], ids))

    def check_store(self, store: Work) -> None:
        """Checks that it fills the host's memory with exactly what torch gathers."""
        self.host.copy_(self.scratch.fill_(0xA5))
        do(store)
        self.scratch.copy_(self.host)
        assert torch.equal(self.scratch, self.want), "it stores wrong bytes"

    def check_load(self, load: Work) -> None:
        """Checks that it fills the pages exactly, and no others."""
        self.kv.fill_(NOTHING)
        self.host.copy_(self.want)
        try:
            self.check_loaded(load)
        finally:
            self.scatter(self.want)

    def check_loaded(self, load: Work) -> None:
        self.kv.fill_(NOTHING)
        do(load)
        self.gather(self.scratch)
        assert torch.equal(self.scratch, self.want), "it loads wrong bytes"
        assert bool((self.kv.index_select(self._dim, self._others) == NOTHING).all()), "it writes other pages"

    def check(self, direction: str, work: Work) -> None:
        (self.check_store if direction == "store" else self.check_load)(work)

    def start(self, direction: str, way: Way = None, by_layer: bool = False) -> Any:
        at, parts = self.host.data_ptr(), []
        for ids in self.chunks:
            parts.append((ids.data_ptr(), True, len(ids), len(ids) * PAGE_TOKENS, at, 0))
            at += self.layout.payload_bytes(len(ids))
        planes, behind = len(self.layout.planes), current_event(DEVICE)
        ends = sorted({*self.layout.planes_until.values()}) if by_layer else [planes]
        options = (True, *([behind] if direction == "load" else []))
        copies: Any = self._copies[direction]
        if way is None:
            job = getattr(copies, direction)(parts, ends, *options)
        else:
            job = getattr(copies._staging, direction)(self.layout._compiled, parts, ends, *options, *way)
        job.go_on(planes, behind)
        return job

    def start_coded(self, direction: str) -> Any:
        """The same with coded payloads, in memory of their own."""
        at, parts = self.coded.data_ptr(), []
        for ids, size in zip(self.chunks, self.coded_sizes, strict=True):
            place = at + codec.HEADER_BYTES
            parts.append((ids.data_ptr(), True, len(ids), len(ids) * PAGE_TOKENS, place, 0))
            at += whole_pages(size)
        planes, behind, coded = len(self.layout.planes), current_event(DEVICE), [True] * len(parts)
        options = (True, *([behind] if direction == "load" else []), coded)
        job = getattr(self._copies[direction], direction)(parts, [planes], *options)
        job.go_on(planes, behind)
        return job

    @cached_property
    def coded_sizes(self) -> list[int]:
        sizes = [codec.coded_bytes(len(self.layout.planes), len(i) * self.layout.page_bytes) for i in self.chunks]
        return [size for size in sizes if size is not None]

    @cached_property
    def coded(self) -> torch.Tensor:
        size = sum(map(whole_pages, self.coded_sizes))
        return torch.empty(size, dtype=torch.uint8, pin_memory=ON_GPU).fill_(1)

    def page_copies(self, direction: str) -> PageCopies:
        planes = np.array(self.layout.planes, dtype=np.uint64)[:, None]
        of_chunks = [(planes + ids.numpy().astype(np.uint64) * self.layout.page_stride).ravel() for ids in self.chunks]
        pages = np.concatenate(of_chunks)
        host = self.host.data_ptr() + np.arange(len(pages), dtype=np.uint64) * self.layout.page_bytes
        return PageCopies(*((host, pages) if direction == "store" else (pages, host)), self.layout.page_bytes)


@cache
def pages_of(model: str, tokens: int) -> Pages:
    pages_of.cache_clear()  # memory suffices for one
    return Pages(model, tokens)


def ways(blocks: tuple[int, ...] = ()) -> dict[str, Way]:
    """The ways of a transfer. blocks: numbers of blocks for kernels that do it alone."""
    if not ON_GPU:
        return {"ours": None}
    kernels: dict[str, Way] = {f"{n} blocks": (0, n) for n in blocks if BULK}
    return {"ours": None, "ring": (0, 0), "batch": (1, 0)} | kernels


def transfers(pages: Pages, direction: str, blocks: tuple[int, ...] = ()) -> dict[str, Work]:
    return {name: lambda way=way: pages.start(direction, way) for name, way in ways(blocks).items()}


def checked(works: dict[str, Work], check: Callable[[Work], None]) -> Rivals:
    """So that one way that fails costs no other."""
    ours = Rivals()
    for name, work in works.items():
        ours.add(name, lambda work=work: work, check)
    return ours


def one_copy(pages: Pages, direction: str) -> dict[str, Work]:
    """One copy of all bytes: the bus itself."""
    pair = (pages.host, pages.want) if direction == "store" else (pages.scratch, pages.host)
    return {"one DMA" if ON_GPU else "memcpy": lambda: pair[0].copy_(pair[1], non_blocking=True)}


def rivals_of(pages: Pages, direction: str, model: str) -> Rivals:
    rivals = Rivals(one_copy(pages, direction))
    by_torch = pages.gather if direction == "store" else pages.scatter

    def check(work: Work) -> None:
        pages.check(direction, work)

    rivals.add("torch", lambda: lambda: by_torch(pages.scratch, pages.host), check)
    pages.page_copies(direction).add_to(rivals, check, to_host=direction == "store")
    if not ON_GPU:
        return rivals

    def lmcache(buffered: bool) -> Work:
        if MODELS[model].joined or MODELS[model].planes != 2:
            raise RuntimeError("supports only separate K and V")
        transfer, payloads = lmcache_calls(list(pages.by_layer), list(pages.chunks), PAGE_TOKENS, pages.host, direction)
        for payload, ids in zip(payloads, pages.on_device, strict=True):
            want = pages.by_layer[:, :, ids].transpose(0, 1).reshape(payload.shape)
            if direction == "load":
                payload.copy_(want)
                continue
            transfer(buffered)
            assert torch.equal(payload.to(DEVICE), want), "it stores wrong bytes"
        return lambda: transfer(buffered)

    for name, buffered in (("LMCache straight", False), ("LMCache by a buffer", True)):
        rivals.add(name, lambda b=buffered: lmcache(b), pages.check_loaded if direction == "load" else do)
    pages.scatter(pages.want)
    return rivals


def measure(benchmark: Any, direction: str, model: str, tokens: int, all_rivals: bool = False) -> None:
    pages = pages_of(model, tokens)

    def check(work: Work) -> None:
        pages.check(direction, work)
        pages.host.copy_(pages.want)
        assert work().wait() == [ops.checksum(payload) for payload in pages.payloads(pages.host)]

    ours = checked(transfers(pages, direction, (2, 8)), check)
    rivals = rivals_of(pages, direction, model) if all_rivals else Rivals(one_copy(pages, direction))
    facts = {"gpu": direction, "model": model, "tokens": tokens, "bytes": pages.bytes}
    facts["fragment_bytes"] = pages.layout.page_bytes
    compare(benchmark, ours.works, rivals.works, "transfers", rivals.missing, ours.missing, **facts)


@DIRECTIONS
@pytest.mark.parametrize("model", FIRST)
def test_transfers(benchmark, direction, model):
    """All chunks of a prompt, checksums computed and compared."""
    measure(benchmark, direction, model, SIZES.prompt, all_rivals=True)


@DIRECTIONS
@pytest.mark.parametrize("model", [model for model in MODELS if model not in FIRST])
def test_transfers_of_other_models(benchmark, direction, model):
    measure(benchmark, direction, model, SIZES.prompt)


@DIRECTIONS
@pytest.mark.parametrize("tokens", SIZES.other_prompts)
def test_transfers_of_other_prompts(benchmark, direction, tokens):
    measure(benchmark, direction, "Qwen2-VL-2B", tokens)


@DIRECTIONS
def test_one_chunk(benchmark, direction):
    """total_s is its latency."""
    measure(benchmark, direction, "Qwen2-VL-2B", CHUNK_TOKENS, all_rivals=True)


@pytest.mark.parametrize("model", FIRST)
def test_stores_and_loads_at_once(benchmark, model):
    pages, others = Pages(model, SIZES.prompt), Pages(model, SIZES.prompt)
    loads, stores = transfers(others, "load"), transfers(pages, "store")
    both: dict[str, Work] = {name: lambda name=name: [loads[name](), stores[name]()] for name in loads}
    ours = checked(both, lambda work: others.check_load(lambda: pages.check_store(work)))
    load, store = (next(iter(one_copy(*of).values())) for of in ((others, "load"), (pages, "store")))
    stream = torch.cuda.Stream() if ON_GPU else None

    def plain() -> None:
        if stream:
            stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream) if stream else nullcontext():
            load()
        store()
        if stream:
            torch.cuda.current_stream().wait_stream(stream)

    facts = {"gpu": "both at once", "model": model, "bytes": 2 * pages.bytes}
    rivals = {"both DMAs" if ON_GPU else "both memcpys": plain}
    compare(benchmark, ours.works, rivals, "transfers", None, ours.missing, **facts)


@DIRECTIONS
@pytest.mark.parametrize("model", ["Qwen2-VL-7B", "Qwen2-VL-2B"])
def test_transfers_by_layers(benchmark, direction, model):
    """Transfers one layer's part of all payloads after another."""
    pages = pages_of(model, SIZES.prompt)
    works: dict[str, Work] = {
        name: lambda way=way: pages.start(direction, way, by_layer=True)
        for name, way in ways((2, 4, 8, 16)).items()
        if name != "batch"
    }

    def check(work: Work) -> None:
        pages.check(direction, work)
        assert work().wait() == [ops.checksum(payload) for payload in pages.payloads(pages.host)]

    ours = checked(works, check)
    facts = {"gpu": f"{direction} by layers", "model": model, "bytes": pages.bytes}
    compare(benchmark, ours.works, one_copy(pages, direction), "transfers", None, ours.missing, **facts)


@DIRECTIONS
@pytest.mark.parametrize("model", ["Qwen2-VL-7B", "Llama-3.1-8B"])
def test_coded_transfers(benchmark, direction, model):
    """As many bytes of KV by the codec: fewer on the bus."""
    pages = pages_of(model, SIZES.prompt)
    do(lambda: pages.start_coded("store"))
    sums = pages.start_coded("store").wait()
    raw = [ops.checksum(payload) for payload in pages.payloads(pages.want.cpu())]
    assert [total % 2**64 for total in sums[:: codec.SUMS]] == [total % 2**64 for total in raw]
    assert not any(sums[codec.SUMS - 1 :: codec.SUMS]), "a payload does not fit"
    try:
        pages.check_loaded(lambda: pages.start_coded("load"))
    finally:
        pages.scatter(pages.want)
    ours: dict[str, Work] = {
        "ours": lambda: pages.start_coded(direction),
        "without the codec": transfers(pages, direction)["ours"],
    }
    facts = {"gpu": f"{direction}, coded", "model": model, "bytes": pages.bytes}
    compare(benchmark, ours, one_copy(pages, direction), "transfers", **facts)


def test_a_retrieve_and_the_copies_in_it(benchmark):
    """The cost of keys, index, threads and Python in one retrieve from shm:, besides its copies."""
    pages = pages_of("Qwen2-VL-2B", SIZES.prompt)
    prompt, ids = lmc.Prompt(list(range(SIZES.prompt))), torch.cat(pages.chunks)
    url = f"shm:///bench-gpu-{os.getpid()}"
    with lmc.KVCache(pages.layout, f"{url}?capacity=1GiB", lmc.Namespace(model="m"), CHUNK_TOKENS) as cache:
        cache.store(prompt, ids).result()
        pages.check_load(lambda: cache.retrieve(prompt, ids))
        ours = {
            "ours": lambda: cache.retrieve(prompt, ids, len(prompt)),
            "its copies": transfers(pages, "load")["ours"],
        }
        facts = {"gpu": "retrieve", "bytes": pages.bytes, "tokens": len(prompt)}
        compare(benchmark, ours, one_copy(pages, "load"), "transfers", **facts)
    assert cli.main(["clear", url]) == 0


@pytest.mark.skipif(not ON_GPU, reason="a CPU has no counterpart")
def test_time_to_pin(benchmark):
    """Pins and unpins memory whose pages were touched before."""
    memory = np.ones(SIZES.pin_bytes, dtype=np.uint8)

    def pin() -> None:
        _C.cuda_register_host(0, memory.ctypes.data, memory.nbytes, memory.nbytes)
        _C.cuda_unregister_host(0, memory.ctypes.data, memory.nbytes, memory.nbytes)

    compare(benchmark, {"ours": pin}, {}, "host", gpu="pin and unpin", bytes=memory.nbytes)
