"""Gathering and scattering within the device's memory, against the device's own copy of as many bytes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import lmcache_mm as lmc
from bench_gpu_transfers import CHUNK_TOKENS, PAGE_TOKENS, checked, pages_of
from device import DEVICE, SIZES, Work, compare, do
from lmcache_mm import ops
from rivals import PageCopies, Rivals


@pytest.mark.parametrize("direction", ["gather", "scatter"])
@pytest.mark.parametrize("run_bytes", SIZES.run_bytes)
def test_copies_in_memory(benchmark, direction, run_bytes):
    """Each byte is read once and written once."""
    pages = SIZES.payload_bytes // run_bytes
    cache = torch.randint(0, 256, (2 * pages, PAGE_TOKENS, run_bytes // PAGE_TOKENS), dtype=torch.uint8, device=DEVICE)
    layout = lmc.KVLayout.from_tensors([cache], page_tokens=PAGE_TOKENS, page_dim=0, token_dim=1)
    ids = torch.randperm(2 * pages)[:pages].to(DEVICE)
    rows = cache.view(2 * pages, run_bytes)
    payload, other = (torch.empty(SIZES.payload_bytes, dtype=torch.uint8, device=DEVICE) for _ in range(2))
    sums = torch.zeros(1, dtype=torch.int64, device=DEVICE)
    want = rows[ids].view(-1)
    if direction == "scatter":
        payload.copy_(want)
        whole = cache.clone()

    def check(work: Work) -> None:
        if direction == "gather":
            payload.fill_(0xA5)
        else:
            cache.copy_(whole)
            rows.index_fill_(0, ids, 0xA5)
        do(work)
        assert torch.equal(payload, want) if direction == "gather" else torch.equal(cache, whole), (
            "it copies wrong bytes"
        )

    ops.gather_pages(layout, [ids], [other], checksums=sums)
    rivals = Rivals({"memcpy": lambda: other.copy_(payload)})
    addresses = np.arange(pages, dtype=np.uint64) * run_bytes + payload.data_ptr()
    in_cache = ids.cpu().numpy().astype(np.uint64) * run_bytes + cache.data_ptr()
    if direction == "gather":
        rivals.add("torch", lambda: lambda: torch.index_select(rows, 0, ids, out=payload.view(pages, -1)), check)
        PageCopies(addresses, in_cache, run_bytes).add_to(rivals, check, to_host=None)
        copy: Any = lambda **given: ops.gather_pages(layout, [ids], [payload], **given)  # noqa: E731
    else:
        rivals.add("torch", lambda: lambda: rows.index_copy_(0, ids, payload.view(pages, -1)), check)
        PageCopies(in_cache, addresses, run_bytes).add_to(rivals, check, to_host=None)
        copy = lambda **given: ops.scatter_pages(layout, [ids], [payload], **given)  # noqa: E731
    ours = checked({"ours": copy, "with checksum": lambda: copy(checksums=sums)}, check)
    facts = {"gpu": direction, "run_bytes": run_bytes, "bytes": 2 * SIZES.payload_bytes}
    compare(benchmark, ours.works, rivals.works, "stream", rivals.missing, ours.missing, **facts)


@pytest.mark.parametrize("direction", ["gather", "scatter"])
def test_a_chunk_of_all_layers(benchmark, direction):
    """256 tokens of Qwen2-VL-7B: one launch for all layers, against torch's one per layer: the cost of launches."""
    pages = pages_of("Qwen2-VL-7B", CHUNK_TOKENS)
    (ids,), (on_device,), layers = pages.chunks, pages.on_device, pages.by_layer
    parts = pages.want.view(torch.int16).view(*layers.shape[:2], len(ids), *layers.shape[3:])

    def by_torch() -> None:
        if direction == "gather":
            rows = [layer.index_select(1, on_device).view(-1) for layer in layers]
            torch.cat(rows, out=pages.scratch.view(torch.int16))
        else:
            for layer, part in zip(layers, parts, strict=True):
                layer.index_copy_(1, on_device, part)

    def check(work: Work) -> None:
        if direction == "scatter":
            return pages.check_load(work)
        pages.scratch.fill_(0xA5)
        do(work)
        assert torch.equal(pages.scratch, pages.want), "it gathers wrong bytes"

    ours: dict[str, Work] = {
        "gather": lambda: ops.gather_pages(pages.layout, ids, pages.scratch),
        "scatter": lambda: ops.scatter_pages(pages.layout, ids, pages.want),
    }
    rivals = Rivals()
    rivals.add("torch layer by layer", lambda: by_torch, check)
    check(ours[direction])
    facts = {"gpu": f"{direction} of a chunk, all layers", "bytes": 2 * pages.bytes}
    compare(benchmark, {"ours": ours[direction]}, rivals.works, "cold", rivals.missing, **facts)
