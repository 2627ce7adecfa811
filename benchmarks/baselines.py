"""Rivals' methods for the same job, written from descriptions; the benchmarks run them in the same process."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
from blake3 import blake3

from lmcache_mm import Item


def sha256_chain_keys(token_ids: np.ndarray, items: Sequence[Item], chunk_tokens: int = 256) -> list[bytes]:
    """The scheme of LMCache 0.5.6 in Python: seed = SHA-256(identifier), value block c = SHA-256(seed || c as 8 bytes
    big-endian), eight 32-bit values per block, kept below 2**31, written over the item's positions; then one chained
    SHA-256 over every `chunk_tokens` ids. Its keys differ from ours."""
    ids = token_ids.tolist()
    for item in items:
        seed = hashlib.sha256(item.identifier.encode()).digest()
        values: list[int] = []
        for c in range(-(-item.length // 8)):
            block = hashlib.sha256(seed + c.to_bytes(8, "big")).digest()
            values += [int.from_bytes(block[4 * k : 4 * k + 4], "big") & 0x7FFFFFFF for k in range(8)]
        end = min(item.offset + item.length, len(ids))
        ids[item.offset : end] = values[: max(0, end - item.offset)]
    keys = []
    prefix = bytes(32)
    for begin in range(0, len(ids), chunk_tokens):
        chunk = np.array(ids[begin : begin + chunk_tokens], dtype=np.int64).tobytes()
        prefix = hashlib.sha256(prefix + chunk).digest()
        keys.append(prefix)
    return keys


def blake3_numpy_keys(token_ids: np.ndarray, items: Sequence[Item], root: bytes, cuts: Sequence[int]) -> np.ndarray:
    """Our keys from the blake3 package and numpy: uint8 [len(cuts), 32]. Items must not overlap. The package hashes
    incrementally, so that a prefix costs only what it adds to the one before."""
    ids = token_ids.astype(np.uint64)
    links = []
    for item in items:
        material = b"".join(
            len(f).to_bytes(4, "little") + f for f in (item.modality.encode(), item.identifier.encode())
        )
        end = min(item.offset + item.length, len(ids))
        lanes = blake3(material, derive_key_context="lmcache_mm v1 item").digest(length=8 * max(0, end - item.offset))
        ids[item.offset : end] += np.frombuffer(lanes, dtype="<u8")
        ids[item.offset : end] |= np.uint64(1 << 63)
        digest = blake3(material, derive_key_context="lmcache_mm v1 item digest").digest()
        links.append((item.offset, item.length, digest))
    links.sort()
    chains = [bytes(32)]
    for offset, length, digest in links:
        link = chains[-1] + digest + offset.to_bytes(8, "little") + length.to_bytes(8, "little")
        chains.append(blake3(link, derive_key_context="lmcache_mm v1 items").digest())
    offsets = [offset for offset, _, _ in links]
    hasher = blake3(key=root)
    words = memoryview(ids.view(np.uint8).data)
    keys = bytearray()
    before = 0
    for cut in cuts:
        hasher.update(words[8 * before : 8 * cut])
        before = cut
        begun = sum(offset < cut for offset in offsets)
        keys += blake3(hasher.digest() + chains[begun], key=root).digest()
    return np.frombuffer(bytes(keys), dtype=np.uint8).reshape(-1, 32)
