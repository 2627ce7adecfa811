"""Paged caches as engines lay them out: the arguments of `KVLayout.from_tensors`, and a round trip of each layout."""

from __future__ import annotations

import torch

import lmcache_mm as lmc

PAGES, TOKENS, HEADS, DIM, LAYERS = 32, 16, 4, 64, 3


def layouts() -> dict[str, tuple[list[torch.Tensor], lmc.KVLayout]]:
    """By name: one tensor per layer, and their layout."""

    def caches(*shape: int) -> list[torch.Tensor]:
        return [torch.randn(shape).to(torch.bfloat16) for _ in range(LAYERS)]

    fused, hnd = caches(PAGES, 2, TOKENS, HEADS, DIM), caches(2, PAGES, HEADS, TOKENS, DIM)
    apart, mla = caches(2, PAGES, TOKENS, HEADS, DIM), caches(PAGES, TOKENS, 576)
    from_tensors = lmc.KVLayout.from_tensors
    return {
        "K and V of a page side by side": (fused, from_tensors(fused, page_tokens=TOKENS, page_dim=0, token_dim=2)),
        "K and V apart": (apart, from_tensors(apart, page_tokens=TOKENS, page_dim=1, token_dim=2)),
        "HND, a head's tokens side by side": (hnd, from_tensors(hnd, page_tokens=TOKENS, page_dim=1, token_dim=3)),
        "MLA, one latent per token": (mla, from_tensors(mla, page_tokens=TOKENS, page_dim=0, token_dim=1)),
    }


def main() -> None:
    for name, (tensors, layout) in layouts().items():
        before = [tensor.clone() for tensor in tensors]
        prompt, block_ids = lmc.Prompt(list(range(100))), torch.randperm(PAGES)[:7]
        with lmc.KVCache(layout, "mem://?capacity=64MiB", lmc.Namespace(model=name)) as cache:
            cache.store(prompt, block_ids).result()
            for tensor in tensors:
                tensor.zero_()
            restored = cache.retrieve(prompt, block_ids).result()
        full = block_ids[: restored // TOKENS]  # the last page's unused slots are zeros now
        there = lmc.ops.gather_pages(layout, full)
        for tensor, old in zip(tensors, before, strict=True):
            tensor.copy_(old)
        assert torch.equal(there, lmc.ops.gather_pages(layout, full))
        print(f"{name}: {restored} tokens, {layout.payload_bytes(len(block_ids)):,} bytes")


if __name__ == "__main__":
    main()
