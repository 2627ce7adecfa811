"""KVCache over stores of this host, in the shape of Qwen2-VL-2B: the cost of match, retrieve and store, against copying
the same bytes with the same threads."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import lmcache_mm as lmc
from bench_copies import memcpy
from lmcache_mm import operands
from lmcache_mm.commands import cli

LAYERS, KV_HEADS, HEAD_DIM, PAGE_TOKENS, TOKENS = 28, 2, 128, 16, 4096


STORES = ["mem", "shm"]


@pytest.fixture(scope="module", params=STORES)
def filled(request):
    """A cache that has stored one prompt of 4,096 tokens, most of them under an image."""
    pages = TOKENS // PAGE_TOKENS
    kv = [torch.rand(pages, 2, PAGE_TOKENS, KV_HEADS, HEAD_DIM).bfloat16() for _ in range(LAYERS)]
    layout = lmc.KVLayout.from_tensors(kv, page_tokens=PAGE_TOKENS, page_dim=0, token_dim=2)
    prompt = lmc.Prompt(torch.arange(TOKENS), [lmc.Item("a", 10, TOKENS - 100)])
    url = {"mem": "mem://", "shm": f"shm:///bench-{os.getpid()}"}[request.param]
    namespace = lmc.Namespace(model="m", dtype=torch.bfloat16)
    with lmc.KVCache(layout, f"{url}?capacity=1GiB", namespace) as cache:
        if request.param == "shm":
            cache.backend._mapped.wait()  # maps the slab's pages, once per process
        block_ids = torch.randperm(pages)
        cache.store(prompt, block_ids).result()
        before = [t.clone() for t in kv]
        for t in kv:
            t.zero_()
        assert cache.retrieve(prompt, block_ids).result() == TOKENS
        assert all(torch.equal(a, b) for a, b in zip(kv, before, strict=True))
        yield cache, prompt, block_ids, request.param
    if request.param == "shm":
        assert cli.main(["clear", url]) == 0


@pytest.fixture(scope="module")
def pool():
    with ThreadPoolExecutor(operands.THREADS) as pool:
        yield pool


def memcpy_of(size: int, pool: ThreadPoolExecutor):
    source, to = torch.ones(size, dtype=torch.uint8), torch.zeros(size, dtype=torch.uint8)
    return {"memcpy": lambda: memcpy(to, source, operands.THREADS, pool)}


def test_match(benchmark, filled):
    cache, prompt, _, store = filled
    benchmark.extra_info["store"] = store
    assert benchmark(cache.match, prompt) == TOKENS


def test_retrieve(against, filled, pool):
    cache, prompt, block_ids, store = filled
    size = cache.layout.payload_bytes(TOKENS // PAGE_TOKENS)
    against(
        lambda: cache.retrieve(prompt, block_ids, TOKENS).result(), memcpy_of(size, pool), 30, bytes=size, store=store
    )


def test_store(against, filled, pool):
    cache, prompt, block_ids, store = filled
    size = cache.layout.payload_bytes(TOKENS // PAGE_TOKENS)
    salts = iter(range(10**6))

    def store_new() -> None:
        new = lmc.Prompt(prompt.token_ids, prompt.items, salt=str(next(salts)))
        assert cache.store(new, block_ids).result() >= TOKENS

    for _ in range(10):  # until it is full and evicts
        store_new()
    against(store_new, memcpy_of(size, pool), 30, bytes=size, store=store)
