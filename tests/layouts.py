"""Shared by the tests: paged caches in every layout that engines use, in memory that is checked for stray writes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from lmcache_mm import KVLayout

PAGES, TOKENS = 7, 4


def period_251(size: int) -> torch.Tensor:
    return torch.arange(251, dtype=torch.uint8).repeat(size // 251 + 1)[:size]


@dataclass
class PagedCache:
    """A layout over `memory`; `expected(block_ids)` is its payload by plain indexing of the tensors."""

    memory: torch.Tensor  # uint8, 1-D: all planes, with margins and gaps that must stay untouched
    layout: KVLayout
    expected: Callable[[list[int]], torch.Tensor]


def _tensors(memory: torch.Tensor, offset: int, dtype: torch.dtype, *shape: int) -> torch.Tensor:
    size = torch.Size(shape).numel() * dtype.itemsize
    return memory[offset : offset + size].view(dtype).view(shape)


def _bytes(t: torch.Tensor) -> torch.Tensor:
    return t.contiguous().view(-1).view(torch.uint8)


def token_major() -> PagedCache:
    """K and V in one page: [page, 2, token, head, dim], float32."""
    memory = period_251(64 + 3 * 20000)
    kv = [_tensors(memory, 64 + i * 20000, torch.float32, PAGES, 2, TOKENS, 3, 8) for i in range(3)]
    layout = KVLayout.from_tensors(kv, page_tokens=TOKENS, page_dim=0, token_dim=2)
    return PagedCache(memory, layout, lambda ids: torch.cat([_bytes(t[ids]) for t in kv]))


def planes_apart() -> PagedCache:
    """K and V outside the page: [2, page, token, head, dim], bfloat16."""
    memory = period_251(64 + 2 * 20000)
    kv = [_tensors(memory, 64 + i * 20000, torch.bfloat16, 2, PAGES, TOKENS, 5, 6) for i in range(2)]
    layout = KVLayout.from_tensors(kv, page_tokens=TOKENS, page_dim=1, token_dim=2)
    return PagedCache(memory, layout, lambda ids: torch.cat([_bytes(t[k, ids]) for t in kv for k in range(2)]))


def head_major() -> PagedCache:
    """[page, head, token, content], float16: a token's bytes are not contiguous."""
    memory = period_251(48 + 2 * 20000)
    kv = [_tensors(memory, 48 + i * 20000, torch.float16, PAGES, 3, TOKENS, 16) for i in range(2)]
    layout = KVLayout.from_tensors(kv, page_tokens=TOKENS, page_dim=0, token_dim=2)
    return PagedCache(memory, layout, lambda ids: torch.cat([_bytes(t[ids]) for t in kv]))


def permuted_view() -> PagedCache:
    """Logically [2, page, token, head, dim], in memory [page, head, token, 2, dim]: the memory order counts."""
    memory = period_251(64 + 2 * 20000)
    base = [_tensors(memory, 64 + i * 20000, torch.float16, PAGES, 3, TOKENS, 2, 8) for i in range(2)]
    kv = [b.permute(3, 0, 2, 1, 4) for b in base]
    layout = KVLayout.from_tensors(kv, page_tokens=TOKENS, page_dim=1, token_dim=2)
    return PagedCache(memory, layout, lambda ids: torch.cat([_bytes(b[ids]) for b in base]))


def strided_runs() -> PagedCache:
    """Odd runs with gaps between them: rows of 5 of 8 bytes, 1-byte type, misaligned base."""
    memory = period_251(37 + 2 * 4000)
    base = [_tensors(memory, 37 + i * 4000, torch.uint8, PAGES, TOKENS, 3, 8) for i in range(2)]
    kv = [b[..., :5] for b in base]
    layout = KVLayout.from_tensors(kv, page_tokens=TOKENS, page_dim=0, token_dim=1)
    return PagedCache(memory, layout, lambda ids: torch.cat([_bytes(t[ids]) for t in kv]))


def deep_strides() -> PagedCache:
    """More nested gaps than one run stride holds: the outermost dimension inside a page becomes planes."""
    memory = period_251(16 + 20000)
    base = _tensors(memory, 16, torch.uint8, PAGES, 3, TOKENS + 1, 2, 8)
    kv = [base[:, :, :TOKENS, :, 1:8]]
    layout = KVLayout.from_tensors(kv, page_tokens=TOKENS, page_dim=0, token_dim=2)
    return PagedCache(memory, layout, lambda ids: torch.cat([_bytes(kv[0][ids, h]) for h in range(3)]))


def blocks_outermost() -> PagedCache:
    """[page, layer, token, content] in one allocation: adjacent layers join to one plane of longer pages."""
    memory = period_251(64 + 20000)
    base = _tensors(memory, 64, torch.int8, PAGES, 4, TOKENS, 24)
    kv = {f"layer.{i}": base[:, i] for i in range(4)}
    layout = KVLayout.from_tensors(kv, page_tokens=TOKENS, page_dim=0, token_dim=1)
    return PagedCache(memory, layout, lambda ids: _bytes(base[ids]))


def mla() -> PagedCache:
    """[page, token, latent], one plane per layer, 1-byte type, odd row."""
    memory = period_251(5 + 2 * 2000)
    kv = [_tensors(memory, 5 + i * 2000, torch.uint8, PAGES, TOKENS, 57) for i in range(2)]
    layout = KVLayout.from_tensors(kv, page_tokens=TOKENS, page_dim=0, token_dim=1)
    return PagedCache(memory, layout, lambda ids: torch.cat([_bytes(t[ids]) for t in kv]))


def opaque() -> PagedCache:
    """Pages with unknown contents: only copied whole."""
    memory = period_251(64 + 2 * 8000)
    kv = [_tensors(memory, 64 + i * 8000, torch.int8, PAGES, 1001) for i in range(2)]
    layout = KVLayout.from_tensors(kv, page_tokens=TOKENS, page_dim=0, opaque=True)
    return PagedCache(memory, layout, lambda ids: torch.cat([_bytes(t[ids]) for t in kv]))


LAYOUTS = [
    *(token_major, planes_apart, head_major, permuted_view, strided_runs, deep_strides),
    *(blocks_outermost, mla, opaque),
]
