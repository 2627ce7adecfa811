"""Prefix keys on one core, from ids and items to a tensor of keys, Python included."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import lmcache_mm as lmc
from baselines import blake3_numpy_keys, sha256_chain_keys
from lmcache_mm import _C, reference

ROOT = bytes(range(32))
GOLDEN_SHA256_CHAIN = "cc696faaa700edc8"  # that peer's own last key of the 16,384-token prompt


def prompt(tokens: int, covered: int) -> tuple[np.ndarray, list[lmc.Item]]:
    """`covered` of `tokens` ids lie under 4 images."""
    ids = np.random.default_rng(0).integers(0, 151936, tokens)
    length = covered // 4
    return ids, [lmc.Item(f"{i:064x}", 100 + i * (tokens // 4), length) for i in range(4)]


@pytest.fixture
def simd():
    """Chooses an instruction set for one test."""
    yield _C.use_simd
    _C.use_simd(_C.simd_variants()[0])


@pytest.mark.parametrize("variant", _C.simd_variants())
@pytest.mark.parametrize("every", [256, 16])
def test_keys_of_16384_ids_with_12000_under_images(against, simd, variant, every):
    simd(variant)
    ids, items = prompt(16384, 12000)
    cuts = list(range(every, 16385, every))
    tensor = torch.from_numpy(ids)
    ours = lmc.ops.prefix_keys(tensor, items, ROOT, cuts)
    assert np.array_equal(ours.numpy(), blake3_numpy_keys(ids, items, ROOT, cuts))
    some = [every, 4096 + every, 16384]
    assert torch.equal(reference.prefix_keys(ids.tolist(), items, ROOT, some), ours[[end // every - 1 for end in some]])
    assert sha256_chain_keys(ids, items)[-1].hex()[:16] == GOLDEN_SHA256_CHAIN
    peers = {
        "blake3 package and numpy": lambda: blake3_numpy_keys(ids, items, ROOT, cuts),
        "chained SHA-256 in Python, every 256": lambda: sha256_chain_keys(ids, items),
    }
    against(
        lambda: lmc.ops.prefix_keys(tensor, items, ROOT, cuts),
        peers,
        warm=True,
        tokens=16384,
        cuts=len(cuts),
        simd=variant,
    )


@pytest.mark.parametrize("tokens", [32768, 1 << 20])
def test_keys_of_long_prompts(against, tokens):
    ids, items = prompt(tokens, tokens * 3 // 4)
    cuts = list(range(256, tokens + 1, 256))
    tensor = torch.from_numpy(ids)
    assert np.array_equal(
        lmc.ops.prefix_keys(tensor, items, ROOT, cuts).numpy(), blake3_numpy_keys(ids, items, ROOT, cuts)
    )
    peers = {"blake3 package and numpy": lambda: blake3_numpy_keys(ids, items, ROOT, cuts)}
    facts = {"tokens": tokens, "cuts": len(cuts), "simd": _C.simd_variants()[0]}
    against(lambda: lmc.ops.prefix_keys(tensor, items, ROOT, cuts), peers, 20, warm=True, **facts)


def test_overwrite_of_16384_ids_with_12000_under_images(against):
    ids, items = prompt(16384, 12000)
    raw, tensor = torch.from_numpy(ids), torch.from_numpy(ids.copy())
    hashes, positions = [item.identifier for item in items], [(item.offset, item.length) for item in items]
    lmc.ops.apply_mm_hashes_to_token_ids(tensor, hashes, positions)
    assert torch.equal(tensor, reference.apply_mm_hashes_to_token_ids(raw, items))

    def ours() -> None:
        tensor.copy_(raw)
        lmc.ops.apply_mm_hashes_to_token_ids(tensor, hashes, positions)

    against(ours, {"copy of the ids": lambda: tensor.copy_(raw)}, warm=True, tokens=16384, simd=_C.simd_variants()[0])
