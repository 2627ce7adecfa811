"""KVCache over mem://, the shape of Qwen2-VL-2B: what match, retrieve and store cost beside copying the same bytes."""

from __future__ import annotations

import ctypes

import pytest
import torch

import lmcache_mm as lmc

LAYERS, KV_HEADS, HEAD_DIM, PAGE_TOKENS, TOKENS = 28, 2, 128, 16, 4096


@pytest.fixture(scope="module")
def filled():
    """A cache that has stored one prompt of 4,096 tokens, most of them under an image."""
    pages = TOKENS // PAGE_TOKENS
    kv = [torch.rand(pages, 2, PAGE_TOKENS, KV_HEADS, HEAD_DIM).bfloat16() for _ in range(LAYERS)]
    layout = lmc.KVLayout.from_tensors(kv, page_tokens=PAGE_TOKENS, page_dim=0, token_dim=2)
    prompt = lmc.Prompt(torch.arange(TOKENS), [lmc.Item("a", 10, TOKENS - 100)])
    with lmc.KVCache(layout, "mem://?capacity=512MiB", lmc.Namespace(model="m", dtype=torch.bfloat16)) as cache:
        block_ids = torch.randperm(pages)
        cache.store(prompt, block_ids).wait()
        before = [t.clone() for t in kv]
        for t in kv:
            t.zero_()
        assert cache.retrieve(prompt, block_ids).wait() == TOKENS
        assert all(torch.equal(a, b) for a, b in zip(kv, before, strict=True))
        yield cache, prompt, block_ids


def memcpy_of(size: int):
    source, to = torch.ones(size, dtype=torch.uint8), torch.zeros(size, dtype=torch.uint8)
    return lambda: ctypes.memmove(to.data_ptr(), source.data_ptr(), size)


def test_match(benchmark, filled):
    cache, prompt, _ = filled
    assert benchmark(cache.match, prompt) == TOKENS


def test_retrieve(against, filled):
    cache, prompt, block_ids = filled
    size = cache.layout.payload_bytes(TOKENS // PAGE_TOKENS)
    against(lambda: cache.retrieve(prompt, block_ids, TOKENS).wait(), {"memcpy": memcpy_of(size)}, 20, bytes=size)


def test_store(against, filled):
    cache, prompt, block_ids = filled
    size = cache.layout.payload_bytes(TOKENS // PAGE_TOKENS)
    salts = iter(range(10**6))

    def store() -> None:
        new = lmc.Prompt(prompt.token_ids, prompt.items, salt=str(next(salts)))
        assert cache.store(new, block_ids).wait() >= TOKENS

    against(store, {"memcpy": memcpy_of(size)}, 20, bytes=size)
