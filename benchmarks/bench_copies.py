"""Gather and scatter on the CPU, against a large memcpy of the same bytes with the same threads."""

from __future__ import annotations

import ctypes
import os
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import lmcache_mm as lmc
from lmcache_mm import ops

PAYLOAD_BYTES = 128 << 20
THREADS = sorted({1, min(8, len(os.sched_getaffinity(0)))})


class Case:
    """Half of a cache's pages, shuffled, and their payload."""

    def __init__(self, page_bytes: int) -> None:
        pages = PAYLOAD_BYTES // page_bytes
        cache = torch.empty(2 * PAYLOAD_BYTES, dtype=torch.uint8).random_(generator=torch.Generator().manual_seed(0))
        self.pages = cache.view(2 * pages, 16, page_bytes // 16)
        self.layout = lmc.KVLayout.from_tensors([self.pages], page_tokens=16, page_dim=0, token_dim=1)
        self.block_ids = torch.randperm(2 * pages, generator=torch.Generator().manual_seed(1))[:pages]
        self.payload = torch.zeros(PAYLOAD_BYTES, dtype=torch.uint8)
        self.other = torch.ones(PAYLOAD_BYTES, dtype=torch.uint8)

    def expected(self) -> torch.Tensor:
        return self.pages[self.block_ids].view(-1)


def memcpy(to: torch.Tensor, source: torch.Tensor, threads: int, pool: ThreadPoolExecutor) -> None:
    """glibc's memcpy of a share of the bytes in each thread (ctypes releases the GIL)."""
    share = len(to) // threads
    addresses = [(to.data_ptr() + i * share, source.data_ptr() + i * share, share) for i in range(threads)]
    if threads == 1:
        ctypes.memmove(*addresses[0])
    else:
        list(pool.map(lambda part: ctypes.memmove(*part), addresses))


@pytest.fixture(scope="module")
def pool():
    with ThreadPoolExecutor(max(THREADS)) as pool:
        yield pool


@pytest.fixture(scope="module", params=[256, 4096, 16384, 65536])
def case(request):
    return Case(request.param)


@pytest.mark.parametrize("checksum", [False, True], ids=["plain", "checksum"])
@pytest.mark.parametrize("threads", THREADS)
@pytest.mark.parametrize("direction", ["gather", "scatter"])
def test_copy_of_shuffled_pages(against, pool, case, direction, threads, checksum):
    sums = torch.zeros(1, dtype=torch.int64) if checksum else None
    ops.gather_pages(case.layout, case.block_ids, case.payload, checksums=sums, threads=threads)
    assert torch.equal(case.payload, case.expected())
    if direction == "gather":

        def ours() -> None:
            ops.gather_pages(case.layout, case.block_ids, case.payload, checksums=sums, threads=threads)

        peers = {"torch indexing": lambda: torch.index_select(case.pages, 0, case.block_ids)}
        assert torch.equal(peers["torch indexing"]().view(-1), case.payload)
    else:
        before = case.pages.clone()
        case.pages[case.block_ids] = 0

        def ours() -> None:
            ops.scatter_pages(case.layout, case.block_ids, case.payload, checksums=sums, threads=threads)

        ours()
        assert torch.equal(case.pages, before)
        pages = case.payload.view(-1, *case.pages.shape[1:])
        peers = {"torch indexing": lambda: case.pages.index_copy_(0, case.block_ids, pages)}
        case.pages[case.block_ids] = 0
        peers["torch indexing"]()
        assert torch.equal(case.pages, before)
        del before
    torch.set_num_threads(threads)
    memcpy(case.other, case.payload, threads, pool)
    assert torch.equal(case.other, case.payload)
    peers = {"memcpy": lambda: memcpy(case.other, case.payload, threads, pool), **peers}
    facts = {"page_bytes": case.layout.page_bytes, "direction": direction, "threads": threads, "checksum": checksum}
    against(ours, peers, 12, bytes=PAYLOAD_BYTES, **facts)
    torch.set_num_threads(max(THREADS))
