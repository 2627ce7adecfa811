"""What records by groups of heads would cost: python benchmarks/head_groups.py

Stores and loads the KV of one rank once as one record per chunk, as the connectors do, and once as one record per chunk
and KV head, which engines of any tensor-parallel size that divides the heads could share. Prints how many times as long
the second way takes, in the same run, on the CPU and in mem:.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from operator import methodcaller

import torch

import lmcache_mm as lmc

LAYERS, HEADS, HEAD_DIM, PAGE_TOKENS, TOKENS, ROUNDS = 8, 8, 128, 16, 4096, 15
PAGES = TOKENS // PAGE_TOKENS
SHAPES = {  # of a page, and the dimensions of tokens and heads in it, counted from the cache's first one
    "heads of a token together": ((2, PAGE_TOKENS, HEADS, HEAD_DIM), 2, 3),
    "tokens of a head together": ((2, HEADS, PAGE_TOKENS, HEAD_DIM), 3, 2),
}


def cache_of(tensors: Sequence[torch.Tensor], token_dim: int, store: lmc.stores.Store, name: str) -> lmc.KVCache:
    layout = lmc.KVLayout.from_tensors(tensors, page_tokens=PAGE_TOKENS, page_dim=0, token_dim=token_dim)
    return lmc.KVCache(layout, store, lmc.Namespace(model=name))


def seconds(begin: Callable[[lmc.KVCache], lmc.Job[int]], caches: Sequence[lmc.KVCache]) -> float:
    """Of one job after another, so that a single thread copies in both ways."""
    begun = time.perf_counter()
    for cache in caches:
        assert begin(cache).result() == TOKENS
    return time.perf_counter() - begun


def ratios(shape: tuple[int, ...], token_dim: int, head_dim: int) -> tuple[float, float]:
    """How many times as long stores and loads by heads take."""
    kv = [torch.rand(PAGES, *shape).bfloat16() for _ in range(LAYERS)]
    blocks = torch.randperm(PAGES)
    with closing(lmc.stores.open_store("mem://?capacity=512MiB")) as store, ExitStack() as opened:
        ways = {
            "one": [cache_of(kv, token_dim, store, "one")],
            "by heads": [
                cache_of([tensor.narrow(head_dim, head, 1) for tensor in kv], token_dim, store, f"head {head}")
                for head in range(HEADS)
            ],
        }
        for caches in ways.values():
            for cache in caches:
                opened.enter_context(cache)
        times: dict[tuple[str, str], list[float]] = {}
        for number in range(ROUNDS):
            for way, caches in list(ways.items())[:: 1 if number % 2 else -1]:
                prompt = lmc.Prompt(torch.arange(TOKENS), salt=f"{number}")
                store_all, load_all = (methodcaller(name, prompt, blocks) for name in ("store", "retrieve"))
                times.setdefault(("store", way), []).append(seconds(store_all, caches))
                times.setdefault(("load", way), []).append(seconds(load_all, caches))
    store_s, load_s = (
        statistics.median(times[what, "by heads"]) / statistics.median(times[what, "one"]) for what in ("store", "load")
    )
    return store_s, load_s


def main() -> None:
    print(f"{HEADS} KV heads of {HEAD_DIM} numbers, {LAYERS} layers, bf16, {TOKENS:,} tokens, {ROUNDS} rounds")
    for name, (shape, token_dim, head_dim) in SHAPES.items():
        stores, loads = ratios(shape, token_dim, head_dim)
        print(f"{name}: records by heads take {stores:.1f} times as long to store, {loads:.1f} times to load")


if __name__ == "__main__":
    main()
