"""Cases of keys: BLAKE3, ids that are overwritten, and prefix keys."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch

from driver_cases import Case, Region, as_bytes, text, u64s
from lmcache_mm import Item, reference

VECTORS = json.loads((Path(__file__).parent / "vectors.json").read_text())
ROOT = bytes(range(32))


def blake3_cases() -> Iterator[Case]:
    published = VECTORS["blake3"]
    for vector in published["cases"]:
        data = bytes(i % 251 for i in range(vector["bytes"]))
        for op, name in (("keyed_hash", "key"), ("derive_key", "context")):
            fields = {name: published[name].encode(), "data": data, "hash": bytes.fromhex(vector[op])}
            yield Case(f"published {op} of {len(data)} bytes", f"blake3_{op}", fields, small=True)


def packed_items(items: Sequence[Item]) -> bytes:
    return b"".join(u64s([i.offset, i.length]) + text(i.modality) + text(i.identifier) for i in items)


def overwrite_case(name: str, ids: Sequence[int], items: Sequence[Item], small: bool = False) -> Case:
    """Ids that are no token ids stay unchanged; reference.py does not cover them, since positions are independent."""
    good = [i if 0 <= i < 1 << 32 else 0 for i in ids]
    after = reference.apply_mm_hashes_to_token_ids(torch.tensor(good, dtype=torch.int64), items)
    before = torch.tensor(ids, dtype=torch.int64)
    after = torch.where(before == torch.tensor(good, dtype=torch.int64), after, before)
    region = Region("token_ids", as_bytes(before), as_bytes(after))
    fields = {"count": u64s([len(ids)]), "items": packed_items(items)}
    if good != list(ids):
        fields["cpu_refused"] = b""
    return Case(f"overwrite {name}", "apply_mm_hashes_to_token_ids", fields, [region], small)


def keys_case(
    name: str, ids: Sequence[int], items: Sequence[Item], cuts: Sequence[int], wide: bool = True, small: bool = False
) -> Case:
    bad = next((p for p, i in enumerate(ids) if not 0 <= i < 1 << 32), len(ids))
    good = reference.prefix_keys(ids[:bad], items, ROOT, [cut for cut in cuts if cut <= bad])
    keys = as_bytes(good) + bytes(32 * (len(cuts) - len(good)))
    given = as_bytes(torch.tensor(ids, dtype=torch.int64 if wide else torch.int32))
    fields = {"count": u64s([len(ids)]), "wide": u64s([wide]), "items": packed_items(items), "root": ROOT}
    if cuts and bad < max(cuts):
        fields["cpu_refused"] = b""
    regions = [Region("token_ids", given, given), Region("keys", b"\xee" * len(keys), keys)]
    return Case(f"keys {name}", "prefix_keys", {**fields, "cuts": u64s(cuts)}, regions, small)


def some_ids(count: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(0, 1 << 32, count).tolist()


def scattered_items(number: int, count: int) -> list[Item]:
    """Items of all lengths at all offsets, many of them overlapping."""
    rng = np.random.default_rng(number)
    modalities = ["image", "video", "audio"]
    return [
        Item(f"{i:064x}", int(rng.integers(0, count)), int(rng.integers(0, max(2, count // 7))), modalities[i % 3])
        for i in range(number)
    ]


LONG = [Item("катя.png", 3, 70, "video"), Item("x" * 3000, 40, 500, "audio"), Item("y" * 1024, 41, 1)]
EDGES = [0, 1, 7, 8, 9, 63, 64, 65, 127, 128, 129, 255, 256, 257, 1023, 1024, 1025, 4095, 4096, 4097]


def identity_cases() -> Iterator[Case]:
    for count in EDGES:
        ids, items = some_ids(count, count), [Item("a", 0, 5), Item("b", count // 3, count // 2 + 1), Item("c", 4, 9)]
        yield overwrite_case(f"{count} ids", ids, items, small=count < 200)
        cuts = [edge for edge in EDGES if edge <= count]
        yield keys_case(f"{count} ids", ids, items, cuts, small=count in (1, 129, 4097))
    for number in (0, 1, 5, 300):  # 300 exceed the kernel's parameters
        count = 1500
        ids, items = some_ids(count, number), scattered_items(number, count)
        yield overwrite_case(f"{number} items", ids, items)
        yield keys_case(f"{number} items", ids, items, range(0, count + 1, 16), small=number == 5)
    narrow = [i % (1 << 31) for i in some_ids(700)]
    yield overwrite_case("long identifiers", narrow, LONG, small=True)
    yield keys_case("long identifiers, int32", narrow, LONG, [0, 3, 40, 41, 42, 540, 700], wide=False, small=True)
    yield keys_case("no cuts", narrow, LONG, [])
    yield keys_case("cut 0 alone", narrow, LONG, [0], small=True)
    yield keys_case("items behind the prompt and of no length", narrow, [Item("a", 700, 9), Item("b", 8, 0)], [8, 700])
    yield keys_case("fewer than the ids", some_ids(5000), LONG, [100, 4200])
    yield keys_case("every cut", some_ids(300), LONG, range(301))
    # Levels above a block's 32 leaves: 9 K ids are two groups of leaves and a part, 29 K seven.
    items = scattered_items(5, 9000)
    yield keys_case("9000 ids", some_ids(9000), items, [*range(0, 9000, 16), 9000], small=True)
    yield keys_case("29000 ids", some_ids(29000), items, [4096, 8192, 12288, 12289, 16384, 20480, 28672, 28673, 29000])
    for bad in (-1, 1 << 32, (1 << 63) - 1, -(1 << 63)):
        for at in (0, 130, 699):
            ids = some_ids(700)
            ids[at] = bad
            name = f"{bad} at {at}"
            yield overwrite_case(name, ids, LONG, small=at == 130)
            cuts = sorted({0, 1, at, at + 1, 256, 512, 700})
            yield keys_case(name, ids, LONG, cuts, small=at == 130)
    ids = some_ids(700)
    ids[300] = ids[5] = ids[600] = -7
    yield keys_case("several bad ids", ids, LONG, range(0, 701, 5), small=True)
    yield keys_case("a bad id behind the last cut", ids, LONG, [3, 5])
    more_than_fit = keys_case("more than 2**21 ids", [0], [], [])
    more_than_fit.fields |= {"cuts": u64s([(1 << 21) + 4096]), "count": u64s([(1 << 21) + 4096]), "refused": b""}
    yield more_than_fit
