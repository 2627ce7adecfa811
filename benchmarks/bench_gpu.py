"""Keys, copies and transfers on a GPU, each beside what the device itself does in the same run.

Times are of CUDA events. Before each timed call the L2 cache is written over. On a machine without a GPU the same code
runs on small CPU tensors with LMCACHE_MM_BENCH_GPU_ON_CPU=1, to see that it is right; those times mean nothing.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

import lmcache_mm as lmc
from lmcache_mm import _C, ops
from lmcache_mm.transfer import Chunk

ON_CPU = os.environ.get("LMCACHE_MM_BENCH_GPU_ON_CPU") == "1"
HAS_GPU = torch.cuda.is_available() and bool(_C.cuda_version)
pytestmark = pytest.mark.skipif(not (HAS_GPU or ON_CPU), reason="no GPU, or a build without CUDA kernels")

DEVICE = torch.device("cpu") if ON_CPU else torch.device("cuda", 0)
PAYLOAD_BYTES = (1 << 20) if ON_CPU else (512 << 20)
ROUNDS = 3 if ON_CPU else 30


class Clock:
    """Times of calls on the current stream, in seconds: by events on a GPU, the L2 cache being cold."""

    def __init__(self) -> None:
        self._cold = torch.empty(256 << 20, dtype=torch.uint8, device=DEVICE) if not ON_CPU else None

    def __call__(self, work: Callable[[], Any]) -> float:
        if self._cold is None:
            begun = time.perf_counter()
            work()
            return time.perf_counter() - begun
        self._cold.zero_()
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        work()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3


def compare(benchmark: Any, ours: Callable[[], Any], peers: dict[str, Callable[[], Any]], **facts: Any) -> None:
    """Medians of `ours` and of each peer, timed in turn."""
    clock = Clock()
    times: dict[str, list[float]] = {name: [] for name in ("ours", *peers)}
    for _ in range(ROUNDS + 2):
        for name, peer in peers.items():
            times[name].append(clock(peer))
        times["ours"].append(clock(ours))
    medians = {name: float(np.median(values[2:])) for name, values in times.items()}
    benchmark.pedantic(lambda: None, rounds=1)  # its own clock is the host's
    benchmark.extra_info.update(facts, device_s=medians.pop("ours"), peers_s=medians)


@pytest.mark.parametrize("tokens", [4096] if ON_CPU else [16_384, 32_768, 131_072, 1 << 20])
def test_prefix_keys_in_memory(benchmark, tokens):
    rng = np.random.default_rng(0)
    ids = torch.from_numpy(rng.integers(0, 150_000, tokens)).to(DEVICE)
    items = [lmc.Item(f"{i:064x}", i * tokens // 4 + 64, tokens // 5) for i in range(4)]
    cuts, root = list(range(256, tokens + 1, 256)), bytes(range(32))
    keys = ops.prefix_keys(ids, items, root, cuts)
    assert torch.equal(keys.cpu(), ops.prefix_keys(ids.cpu(), items, root, cuts))
    compare(benchmark, lambda: ops.prefix_keys(ids, items, root, cuts), {}, gpu="keys", tokens=tokens, cuts=len(cuts))


@pytest.mark.parametrize("run_bytes", [256, 2048, 8192, 65_536])
@pytest.mark.parametrize("direction", ["gather", "scatter"])
@pytest.mark.parametrize("checksum", [False, True], ids=["plain", "checksum"])
def test_copies_in_memory(benchmark, direction, run_bytes, checksum):
    pages = PAYLOAD_BYTES // run_bytes
    cache = torch.randint(0, 256, (2 * pages, 16, run_bytes // 16), dtype=torch.uint8, device=DEVICE)
    layout = lmc.KVLayout.from_tensors([cache], page_tokens=16, page_dim=0, token_dim=1)
    ids = torch.randperm(2 * pages)[:pages].to(DEVICE)
    payload, other = (torch.empty(PAYLOAD_BYTES, dtype=torch.uint8, device=DEVICE) for _ in range(2))
    sums = torch.zeros(1, dtype=torch.int64, device=DEVICE)
    ops.gather_pages(layout, [ids], [payload], checksums=sums)
    assert torch.equal(payload, cache[ids].view(-1))
    given = {"checksums": sums} if checksum else {}
    rows = cache.view(2 * pages, run_bytes)
    peers = {"memcpy": lambda: other.copy_(payload)}
    if direction == "gather":
        peers["index_select"] = lambda: torch.index_select(rows, 0, ids, out=other.view(pages, run_bytes))
        compare_with = lambda: ops.gather_pages(layout, [ids], [payload], **given)  # noqa: E731
    else:
        peers["index_copy_"] = lambda: rows.index_copy_(0, ids, payload.view(pages, run_bytes))
        compare_with = lambda: ops.scatter_pages(layout, [ids], [payload], **given)  # noqa: E731
    facts = {"gpu": direction, "run_bytes": run_bytes, "checksum": checksum, "bytes": 2 * PAYLOAD_BYTES}
    compare(benchmark, compare_with, peers, **facts)


MODELS = {  # layers, KV heads of one rank, head size; 16-bit KV, pages of 16 tokens
    "Qwen2-VL-2B": (28, 2, 128),
    "Qwen2-VL-7B": (28, 4, 128),
    "Qwen2.5-VL-72B TP4": (80, 2, 128),
    "Llama-3.1-8B": (32, 8, 128),
}


@pytest.mark.skipif(ON_CPU, reason="transfers are between a GPU and the host")
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("direction", ["store", "load"])
def test_transfers_to_pinned_memory(benchmark, model, direction):
    """16,384 tokens in chunks of 256, checksums computed and compared; beside one pinned DMA of the same bytes."""
    from lmcache_mm.transfer import _Ring  # noqa: PLC0415

    layers, heads, size = MODELS[model]
    tokens, page_tokens = 16_384, 16
    pages = tokens // page_tokens
    kv = [
        torch.randint(-100, 100, (2, 2 * pages, page_tokens, heads, size), dtype=torch.int16, device=DEVICE)
        for _ in range(layers)
    ]
    layout = lmc.KVLayout.from_tensors(kv, page_tokens=page_tokens, page_dim=1, token_dim=2)
    order = torch.randperm(2 * pages)[:pages]
    chunks = [Chunk(b"", part.contiguous(), 256) for part in order.split(256 // page_tokens)]
    chunk_bytes = layout.payload_bytes(256 // page_tokens)
    total = chunk_bytes * len(chunks)
    host, plain = (torch.empty(total, dtype=torch.uint8).pin_memory() for _ in range(2))
    payloads = list(host.split(chunk_bytes))
    device = torch.empty(total, dtype=torch.uint8, device=DEVICE)
    ring = _Ring(layout, chunk_bytes)
    sums = [ops.checksum_of_parts([part]) for part in ring.store(chunks, payloads, False, wait=True).wait()]
    assert sums == [ops.checksum(payload) for payload in payloads]
    assert torch.equal(payloads[3], ops.gather_pages(layout, chunks[3].pages).cpu())
    if direction == "store":
        ours = lambda: ring.store(chunks, payloads, False, wait=True)  # noqa: E731
        peers = {"one DMA": lambda: plain.copy_(device, non_blocking=True)}
    else:
        assert all(ring.load(chunks, payloads, sums).wait())
        ours = lambda: ring.load(chunks, payloads, sums).wait()  # noqa: E731
        peers = {"one DMA": lambda: device.copy_(plain, non_blocking=True)}
    compare(benchmark, ours, peers, gpu=direction, model=model, bytes=total)
