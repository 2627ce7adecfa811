"""Prefix keys on the GPU, or on the CPU if there is none."""

from __future__ import annotations

import time

import numpy as np
import pytest
import torch

import lmcache_mm as lmc
from device import DEVICE, SIZES, compare
from lmcache_mm import ops


@pytest.mark.parametrize("tokens", SIZES.keys)
def test_prefix_keys_in_memory(benchmark, tokens):
    """Ids and keys in the device's memory, against the CPU's operation, which needs no ids on the device."""
    rng = np.random.default_rng(0)
    ids = torch.from_numpy(rng.integers(0, 150_000, tokens))
    items = [lmc.Item(f"{i:064x}", i * tokens // 4 + 64, tokens // 5) for i in range(4)]
    cuts, root = list(range(256, tokens + 1, 256)), bytes(range(32))
    on_device, on_cpu = ids.to(DEVICE), []
    for _ in range(5):
        begun = time.perf_counter()
        want = ops.prefix_keys(ids, items, root, cuts)
        on_cpu.append(time.perf_counter() - begun)
    assert torch.equal(ops.prefix_keys(on_device, items, root, cuts).cpu(), want)
    ours = {"ours": lambda: ops.prefix_keys(on_device, items, root, cuts)}
    facts = {"gpu": "keys", "tokens": tokens, "cuts": len(cuts), "on_cpu_s": float(np.median(on_cpu))}
    compare(benchmark, ours, {}, "cold", **facts)
