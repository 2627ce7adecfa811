"""The specification: every operation in plain torch, numpy and the `blake3` package, written to be read.

Tests compare kernels and their host twins with this file bit by bit. Nothing else uses it.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from blake3 import blake3

from lmcache_mm.layout import KVLayout
from lmcache_mm.prompt import Item

MASK63 = (1 << 63) - 1


def _str(text: str) -> bytes:
    encoded = text.encode()
    return len(encoded).to_bytes(4, "little") + encoded


def _material(item: Item) -> bytes:
    return _str(item.modality) + _str(item.identifier)


def lanes(item: Item, first: int, count: int) -> list[int]:
    """lane(item, j) for j in [first, first + count): words of the extended output, which can be read from any j."""
    output = blake3(_material(item), derive_key_context="lmcache_mm v1 item").digest(length=8 * count, seek=8 * first)
    return [int.from_bytes(output[8 * k : 8 * k + 8], "little") for k in range(count)]


def item_digest(item: Item) -> bytes:
    return blake3(_material(item), derive_key_context="lmcache_mm v1 item digest").digest()


def content_ids(token_ids: Sequence[int], items: Sequence[Item]) -> list[int]:
    """The unsigned 64-bit id of every position."""
    n = len(token_ids)
    sums = [int(t) for t in token_ids]
    covered = [False] * n
    for item in items:
        end = min(item.offset + item.length, n)
        for p, lane in zip(range(item.offset, end), lanes(item, 0, max(0, end - item.offset)), strict=True):
            sums[p] += lane
            covered[p] = True
    return [1 << 63 | (s & MASK63) if c else s for s, c in zip(sums, covered, strict=True)]


def items_chain(items: Sequence[Item], end: int) -> bytes:
    """T of the prefix of `end` tokens."""
    chain = bytes(32)
    begun = [item for item in items if item.offset < end]
    for item in sorted(begun, key=lambda i: (i.offset, i.length, item_digest(i))):
        link = chain + item_digest(item) + item.offset.to_bytes(8, "little") + item.length.to_bytes(8, "little")
        chain = blake3(link, derive_key_context="lmcache_mm v1 items").digest()
    return chain


def prefix_keys(token_ids: Sequence[int], items: Sequence[Item], root: bytes, cuts: Sequence[int]) -> torch.Tensor:
    """uint8 [len(cuts), 32]."""
    words = b"".join(i.to_bytes(8, "little") for i in content_ids(token_ids, items))
    keys = []
    for end in cuts:
        prefix_hash = blake3(words[: 8 * end], key=root).digest()
        keys.append(blake3(prefix_hash + items_chain(items, end), key=root).digest())
    return torch.tensor([list(key) for key in keys], dtype=torch.uint8).reshape(len(keys), 32)


def apply_mm_hashes_to_token_ids(token_ids: torch.Tensor, items: Sequence[Item]) -> torch.Tensor:
    """A new int64 tensor, the content ids in two's complement."""
    ids = content_ids(token_ids.tolist(), items)
    return torch.tensor([i - (1 << 64) if i >> 63 else i for i in ids], dtype=torch.int64)


def checksum(payload: torch.Tensor) -> int:
    """The payload checksum, version 1, as a signed 64-bit integer. payload: uint8, 1-D."""
    low = high = 0
    padded = bytes(payload.tolist()) + bytes(-len(payload) % 16)
    for index in range(len(padded) // 16):
        a = int.from_bytes(padded[16 * index : 16 * index + 8], "little")
        b = int.from_bytes(padded[16 * index + 8 : 16 * index + 16], "little")
        x = a ^ ((0xBBB03F7D4E2B280B + index * 0x9E3779B97F4A7C15) % 2**64)
        y = b ^ ((0x96A5B51F8EFAD769 + index * 0x6A09E667F3BCC909) % 2**64)
        low += (x % 2**32) * (x >> 32) + b
        high += (y % 2**32) * (y >> 32) + a
    total = (low + high * 0x12DE34EC4F9BA061 + len(payload) * 0xF0F7D78E3E3EAFAD) % 2**64
    return total - 2**64 if total >> 63 else total


def encoder_key(root: bytes, item: Item) -> bytes:
    """The key of the output of an item's encoder. It does not depend on the item's position."""
    return blake3(root + item_digest(item), derive_key_context="lmcache_mm v1 encoder output").digest()


def encoder_description(tensors: Sequence[torch.Tensor], is_list: bool) -> bytes:
    """The payload of the record under an encoder key."""
    out = bytes([is_list]) + len(tensors).to_bytes(4, "little")
    for tensor in tensors:
        out += _str(str(tensor.dtype).removeprefix("torch.")) + tensor.ndim.to_bytes(4, "little")
        out += b"".join(size.to_bytes(8, "little") for size in tensor.shape)
    return out + bytes(4096 - len(out))


def encoder_payload(tensors: Sequence[torch.Tensor]) -> bytes:
    """The payload of the record under `encoder_payload_key`."""
    out = b""
    for tensor in tensors:
        out += bytes(-len(out) % 64)
        out += bytes(tensor.contiguous().reshape(-1).view(torch.uint8).tolist())
    return out


def encoder_payload_key(key: bytes, description: bytes) -> bytes:
    return blake3(key + description, derive_key_context="lmcache_mm v1 encoder payload").digest()


def page_addresses(layout: KVLayout) -> np.ndarray:
    """int64 [page byte]: the offset of each byte of a page from the page's beginning."""
    runs = np.arange(layout.runs, dtype=np.int64)[:, None] * layout.run_stride
    return (runs + np.arange(layout.run_bytes, dtype=np.int64)).reshape(-1)


def page_slots(layout: KVLayout) -> np.ndarray:
    """int64 [page byte]: the slot that each byte of a page belongs to. Not for opaque layouts."""
    return np.arange(layout.page_bytes, dtype=np.int64) // layout.token_bytes % layout.page_tokens


def gather_pages(layout: KVLayout, memory: torch.Tensor, block_ids: Sequence[int], tokens: int) -> torch.Tensor:
    """uint8 payload [plane][page][page byte]. memory: uint8, 1-D, the bytes that contain every plane."""
    origin = memory.data_ptr()
    payload = torch.zeros(len(layout.planes), len(block_ids), layout.page_bytes, dtype=torch.uint8)
    inside = torch.from_numpy(page_addresses(layout))
    for i, plane in enumerate(layout.planes):
        for k, block in enumerate(block_ids):
            if 0 <= block < layout.num_pages:
                payload[i, k] = memory[plane - origin + block * layout.page_stride + inside]
            if not layout.opaque:
                payload[i, k, torch.from_numpy(page_slots(layout) >= tokens - k * layout.page_tokens)] = 0
    return payload.reshape(-1)


def scatter_pages(layout: KVLayout, memory: torch.Tensor, block_ids: Sequence[int], payload: torch.Tensor) -> None:
    origin = memory.data_ptr()
    pages = payload.reshape(len(layout.planes), len(block_ids), layout.page_bytes)
    inside = torch.from_numpy(page_addresses(layout))
    for i, plane in enumerate(layout.planes):
        for k, block in enumerate(block_ids):
            if 0 <= block < layout.num_pages:
                memory[plane - origin + block * layout.page_stride + inside] = pages[i, k]


def row_addresses(layout: KVLayout, slot: int) -> torch.Tensor:
    """int64 [row byte]: the offset of each byte of a slot's row from the plane's beginning."""
    in_page = page_addresses(layout)[page_slots(layout) == slot % layout.page_tokens]
    return torch.from_numpy(slot // layout.page_tokens * layout.page_stride + in_page)


def gather_tokens(layout: KVLayout, memory: torch.Tensor, slots: Sequence[int]) -> torch.Tensor:
    """uint8 payload [plane][token][row byte]."""
    origin = memory.data_ptr()
    payload = torch.zeros(len(layout.planes), len(slots), layout.row_bytes, dtype=torch.uint8)
    for i, plane in enumerate(layout.planes):
        for k, slot in enumerate(slots):
            if 0 <= slot < layout.num_pages * layout.page_tokens:
                payload[i, k] = memory[plane - origin + row_addresses(layout, slot)]
    return payload.reshape(-1)


def scatter_tokens(layout: KVLayout, memory: torch.Tensor, slots: Sequence[int], payload: torch.Tensor) -> None:
    origin = memory.data_ptr()
    rows = payload.reshape(len(layout.planes), len(slots), layout.row_bytes)
    for i, plane in enumerate(layout.planes):
        for k, slot in enumerate(slots):
            if 0 <= slot < layout.num_pages * layout.page_tokens:
                memory[plane - origin + row_addresses(layout, slot)] = rows[i, k]


TILE_NUMBERS, TILE_EXCEPTIONS, WINDOW = 2048, 36, 15


def encode_tile(numbers: np.ndarray) -> bytes | None:
    """A coded tile of at most TILE_NUMBERS bf16 numbers, uint16; None if there are more exceptions than fit."""
    padded = np.concatenate([numbers, np.zeros(-len(numbers) % 32, np.uint16)]).astype(np.uint16)
    exponents = (padded >> 7 & 0xFF).astype(int)
    for top in range(max(WINDOW, int(exponents.max())), WINDOW - 1, -1):
        codes = exponents - (top - WINDOW)
        codes[(codes < 1) | (codes > WINDOW)] = 0
        outside = [i for i in range(len(padded)) if exponents[i] != 0 and codes[i] == 0]
        if len(outside) <= TILE_EXCEPTIONS:
            break
    else:
        return None
    head = bytes([top, len(outside), 0, 0])
    head += b"".join(i.to_bytes(2, "little") for i in outside).ljust(2 * TILE_EXCEPTIONS, b"\0")
    head += bytes(exponents[i] for i in outside).ljust(TILE_EXCEPTIONS, b"\0")
    rest = (padded << 1 | padded >> 15).astype(np.uint8)
    return head + bytes(rest) + bytes((codes[0::2] | codes[1::2] << 4).astype(np.uint8))


def decode_tile(coded: bytes, count: int) -> np.ndarray:
    """The `count` numbers of a coded tile. Any bytes decode to some numbers."""
    padded, head = -(-count // 32) * 32, 4 + 3 * TILE_EXCEPTIONS
    assert len(coded) == head + padded + padded // 2
    rest = np.frombuffer(coded, np.uint8, padded, head).astype(int)
    pairs = np.frombuffer(coded, np.uint8, padded // 2, head + padded).astype(int)
    codes = np.stack([pairs & 15, pairs >> 4], axis=1).reshape(-1)
    exponents = np.where(codes == 0, 0, codes + coded[0] - WINDOW) % 256
    for n in range(min(coded[1], TILE_EXCEPTIONS)):
        index = int.from_bytes(coded[4 + 2 * n : 6 + 2 * n], "little")
        if index < count:
            exponents[index] = coded[4 + 2 * TILE_EXCEPTIONS + n]
    return ((rest & 1) << 15 | exponents << 7 | rest >> 1).astype(np.uint16)[:count]


def coded_header(raw: torch.Tensor) -> bytes:
    """The header of the coded payload of `raw`."""
    facts = (checksum(raw) % 2**64).to_bytes(8, "little") + len(raw).to_bytes(8, "little")
    return b"lmcache_mm" + (2).to_bytes(2, "little") + bytes(4) + facts + bytes(32)


def encode_payload(raw: torch.Tensor, planes: int) -> bytes | None:
    """The coded payload of a raw payload of `planes` planes; None if it is stored raw."""
    tiles: list[bytes | None] = []
    for plane in raw.reshape(planes, -1):
        numbers = plane.numpy().view(np.uint16)
        tiles += [encode_tile(numbers[i : i + TILE_NUMBERS]) for i in range(0, len(numbers), TILE_NUMBERS)]
    coded = [tile for tile in tiles if tile is not None]
    payload = coded_header(raw) + b"".join(coded)
    return payload if len(coded) == len(tiles) and len(payload) < len(raw) else None
