"""Layers, chunks of their pages, and stores that hang."""

import threading

import torch

import lmcache_mm as lmc
from lmcache_mm.transfer import Chunk

PAGES, PAGE_TOKENS, PATIENCE_S = 12, 4, 0.1
KEY = bytes(range(32))


class Gate:
    """A store whose methods wait while the gate is shut; with `slots`, also in place."""

    def __init__(self, store, shut=()):
        self.store, self.shut = store, set(shut)
        self.open = threading.Event()
        self.reached = threading.Event()

    def __getattr__(self, name):
        method = getattr(self.store, name)
        if name not in self.shut:
            return method

        def gated(*arguments, **more):
            self.reached.set()
            assert self.open.wait(30)
            return method(*arguments, **more)

        return gated


def hangs(store, direction):
    """The store's method that hangs before pages are touched."""
    in_place = hasattr(store, "lend")
    return {"load": "lend" if in_place else "get_into", "store": "reserve" if in_place else "contains"}[direction]


def layers(count=3, row=5, seed=0):
    """One tensor per layer, of odd sizes, so that layers of a payload begin anywhere."""
    generator = torch.Generator().manual_seed(seed)
    shape = (count, PAGES, PAGE_TOKENS, row)
    return torch.randint(0, 256, shape, generator=generator).to(torch.uint8)


def layout_of(kv):
    named = {f"layer{i}": layer for i, layer in enumerate(kv)}
    return lmc.KVLayout.from_tensors(named, page_tokens=PAGE_TOKENS, page_dim=0, token_dim=1)


def chunks_of(*page_lists):
    return [
        Chunk(KEY[i:] + KEY[:i], torch.tensor(pages), len(pages) * PAGE_TOKENS) for i, pages in enumerate(page_lists)
    ]


def are_equal(kv, want, chunks):
    """Whether the chunks' pages are."""
    return all(torch.equal(kv[:, chunk.pages], want[:, chunk.pages]) for chunk in chunks)
