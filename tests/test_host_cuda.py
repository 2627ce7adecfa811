"""The CUDA kernels, whole and unmodified, on the host: every op against reference.py under ASan, UBSan and TSan."""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import struct
import subprocess
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch

from layouts import LAYOUTS, PAGES, TOKENS, PagedCache, mla, opaque, period_251, token_major
from lmcache_mm import Item, KVLayout, reference

REPO = Path(__file__).resolve().parent.parent
HOST_CUDA = REPO / "tests" / "host_cuda"
VECTORS = json.loads((REPO / "tests" / "vectors.json").read_text())
ROOT = bytes(range(32))

pytestmark = pytest.mark.skipif(platform.machine() != "x86_64", reason="the emulated device supports x86-64 only")


# --- Cases, and the file of them that driver.cpp reads


class Region(NamedTuple):
    name: str
    before: bytes
    after: bytes
    host: bool = False
    misalignment: int = 0


@dataclass
class Case:
    name: str
    op: str
    fields: dict[str, bytes]
    regions: list[Region] = field(default_factory=list)
    small: bool = False  # small enough for TSan, which is slow


def text(value: str) -> bytes:
    return struct.pack("<I", len(value.encode())) + value.encode()


def u64s(values: Iterable[int]) -> bytes:
    return b"".join(struct.pack("<Q", value) for value in values)


def as_bytes(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def write_cases(path: Path, cases: Sequence[Case]) -> Path:
    with path.open("wb") as out:
        out.write(struct.pack("<I", len(cases)))
        for case in cases:
            out.write(text(case.name) + text(case.op) + struct.pack("<I", len(case.fields)))
            for name, value in case.fields.items():
                out.write(text(name) + struct.pack("<Q", len(value)) + value)
            out.write(struct.pack("<I", len(case.regions)))
            for region in case.regions:
                assert len(region.before) == len(region.after), region.name
                out.write(text(region.name) + struct.pack("<BQQ", region.host, region.misalignment, len(region.before)))
                out.write(region.before + region.after)
    return path


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


def clip(cache: PagedCache) -> tuple[bytes, list[int]]:
    """The cache's bytes from its first plane to its last page, without margins, and the planes' offsets."""
    layout = cache.layout
    extent = (layout.num_pages - 1) * layout.page_stride + (layout.runs - 1) * layout.run_stride + layout.run_bytes
    first = min(layout.planes)
    at = first - cache.memory.data_ptr()
    return as_bytes(cache.memory[at : at + max(layout.planes) - first + extent]), [p - first for p in layout.planes]


ON_DEVICE, ON_HOST, NONE = range(3)  # where payloads are


class Chunks(NamedTuple):
    """Chunks of one call. missing: tokens that the last page of each chunk lacks (page mode). offset: the offset of the
    n-th payload (from 1) in a longer one is n times this."""

    ids: list[list[int]]
    wide: bool = True
    host_ids: bool = False
    missing: int = 0
    offset: int = 0


def copy_case(
    name: str,
    cache: PagedCache,
    gather: bool,
    token_mode: bool,
    chunks: Chunks,
    *,
    clipped: bool = False,
    cache_misalignment: int = 0,
    payload_misalignment: int = 0,
    max_blocks: int = 0,
    checksums: bool = True,
    payloads: int = ON_DEVICE,
    partial_sums: bool = False,
    small: bool = False,
) -> Case:
    layout, memory = cache.layout, cache.memory
    before, planes = as_bytes(memory), [plane - memory.data_ptr() for plane in layout.planes]
    if clipped:
        before, planes = clip(cache)
    work = torch.frombuffer(bytearray(before), dtype=torch.uint8)
    fields = ("num_pages", "page_stride", "page_tokens", "runs", "run_stride", "run_bytes", "token_bytes")
    here = KVLayout(
        planes=tuple(work.data_ptr() + plane for plane in planes), **{name: getattr(layout, name) for name in fields}
    )
    unit_bytes = layout.row_bytes if token_mode else layout.page_bytes
    regions, table, sums = [], [], []
    for i, ids in enumerate(chunks.ids):
        tokens = len(ids) * layout.page_tokens - (chunks.missing if ids else 0)
        size = len(planes) * len(ids) * unit_bytes
        if gather:
            given = b"\xee" * size
            payload = (
                reference.gather_tokens(here, work, ids)
                if token_mode
                else reference.gather_pages(here, work, ids, tokens)
            )
        else:
            payload = (period_251(size + 7 * i) ^ (i * 37))[7 * i :].contiguous()
            given = as_bytes(payload)
            if token_mode:
                reference.scatter_tokens(here, work, ids, payload)
            else:
                reference.scatter_pages(here, work, ids, payload)
        offset = chunks.offset * (i + 1)
        before_it = torch.zeros(offset, dtype=torch.uint8)
        whole, part = (reference.checksum(t) for t in (torch.cat([before_it, payload]), before_it))
        sums.append((whole - part + (1 << 63)) % (1 << 64) - (1 << 63))  # the part's contribution
        packed = as_bytes(torch.tensor(ids, dtype=torch.int64 if chunks.wide else torch.int32))
        table += [1 + 2 * i, chunks.wide, len(ids), tokens, 2 + 2 * i, offset]
        regions.append(Region(f"ids of chunk {i}", packed, packed, chunks.host_ids))
        after = given if payloads == NONE else as_bytes(payload)
        regions.append(Region(f"payload {i}", given, after, False, payload_misalignment))
    regions.insert(0, Region("cache", before, as_bytes(work), False, cache_misalignment))
    numbers = (layout.num_pages, layout.page_stride, layout.page_bytes, layout.run_bytes, layout.run_stride)
    case = Case(
        f"{'gather' if gather else 'scatter'} {'tokens' if token_mode else 'pages'}, {name}",
        "gather" if gather else "scatter",
        {
            "token_mode": u64s([token_mode]),
            "host_ids": u64s([chunks.host_ids]),
            "max_blocks": u64s([max_blocks]),
            "planes": u64s(planes),
            "layout": u64s([*numbers, layout.page_tokens, layout.token_bytes]),
            "chunks": u64s(table),
            "payloads": u64s([payloads]),
            "partial_sums": u64s([partial_sums and checksums]),
        },
        regions,
        small,
    )
    ids_end = layout.num_pages * (layout.page_tokens if token_mode else 1)
    if any(not -1 <= i < ids_end for ids in chunks.ids for i in ids):
        case.fields["cpu_refused"] = b""
    if checksums:
        right = torch.tensor(sums, dtype=torch.int64)
        case.fields["checksums"] = u64s([len(regions)])
        regions.append(Region("checksums", b"\xee" * 8 * len(sums), as_bytes(right), misalignment=8))
    return case


def thin_rows() -> PagedCache:
    """Pages of multiples of 16 bytes, tokens of 8: the width of a copy depends on whether it splits pages."""
    memory = period_251(64 + 2 * 1000)
    kv = [memory[64 + i * 1008 :][: PAGES * 64].view(torch.float16).view(PAGES, 2, TOKENS, 4) for i in range(2)]
    layout = KVLayout.from_tensors(kv, page_tokens=TOKENS, page_dim=0, token_dim=2)
    return PagedCache(memory, layout, lambda ids: torch.cat([t[ids].view(-1).view(torch.uint8) for t in kv]))


def many_tiles() -> PagedCache:
    """Pages so large that a few of them fill the stages of a ring in shared memory more than once."""
    memory = period_251(64 + 2 * PAGES * 32000)
    kv = [memory[64 + i * PAGES * 32000 :][: PAGES * 32000].view(PAGES, TOKENS, 8000) for i in range(2)]
    layout = KVLayout.from_tensors(kv, page_tokens=TOKENS, page_dim=0, token_dim=1)
    return PagedCache(memory, layout, lambda ids: torch.cat([t[ids].view(-1) for t in kv]))


def many_rows() -> PagedCache:
    """The same in runs of 160 of 192 bytes."""
    memory = period_251(64 + PAGES * TOKENS * 50 * 192)
    kv = [memory[64:].view(PAGES, TOKENS, 50, 192)[..., :160]]
    layout = KVLayout.from_tensors(kv, page_tokens=TOKENS, page_dim=0, token_dim=1)
    return PagedCache(memory, layout, lambda ids: kv[0][ids].reshape(-1))


def copy_cases() -> Iterator[Case]:
    slots = PAGES * TOKENS
    pages = {
        "one page": [[3]],
        "some pages": [[6, 2, 0, 5]],
        "one left out": [[1, -1, 4]],
        "nothing there": [[-1]],
        "no page": [[]],
        "many chunks": [[3, 1], [], [0], [-1, 6, 2], [5]],
        "no chunk": [],
    }
    tokens = {
        "one token": [[9]],
        "some tokens": [[slots - 1, 3, 4, 5]],
        "one left out": [[5, -1, 6, 0]],
        "all tokens": [list(range(slots))[::-1]],
        "many chunks": [[8, 1, 2], [], [27], [-1, 6], [5, 4, 3, 11, 12]],
    }
    narrow_bad = [PAGES, 2, -2, -(1 << 31), (1 << 31) - 1, 5]
    wide_bad = [PAGES, 2, -2, -(1 << 63), (1 << 63) - 1, (1 << 32) + 3, 5]
    for make in [*LAYOUTS, thin_rows]:
        for gather in (True, False):
            for token_mode in (False, True) if make is not opaque else (False,):
                for i, (what, ids) in enumerate((tokens if token_mode else pages).items()):
                    yield copy_case(
                        f"{make.__name__}, {what}",
                        make(),
                        gather,
                        token_mode,
                        Chunks(ids, wide=i % 2 == 0, host_ids=i % 3 == 0),
                        clipped=i % 2 == 1,
                        checksums=i % 4 != 3,
                        max_blocks=(0, 1, 3)[i % 3],
                        partial_sums=what == "many chunks" and gather,
                        small=what == "many chunks",
                    )
                for at in ((0, 4), (4, 0), (1, 0), (0, 1), (8, 8)):
                    yield copy_case(
                        f"{make.__name__}, misaligned by {at}",
                        make(),
                        gather,
                        token_mode,
                        Chunks([[3, 1], [6]]),
                        clipped=True,
                        cache_misalignment=at[0],
                        payload_misalignment=at[1],
                    )
                scale = TOKENS if token_mode else 1
                for host_ids in (False, True):
                    for wide in (False, True):
                        ids = [i * scale if 0 <= i < 1 << 30 else i for i in (wide_bad if wide else narrow_bad)]
                        yield copy_case(
                            f"{make.__name__}, ids outside, {wide=}, {host_ids=}",
                            make(),
                            gather,
                            token_mode,
                            Chunks([ids, [1]], wide, host_ids),
                            clipped=True,
                            small=host_ids == wide,
                        )
                if gather and not token_mode and make is not opaque:
                    for missing in range(1, TOKENS):
                        yield copy_case(
                            f"{make.__name__}, {missing} missing of the last page",
                            make(),
                            gather,
                            token_mode,
                            Chunks([[3, 1], [6], [-1]], missing=missing),
                            small=missing == 1,
                        )
                ids = [list(range(PAGES))] if not token_mode else [list(range(slots))]
                for max_blocks in (0, 1, 2):
                    yield copy_case(
                        f"{make.__name__}, several tiles, at most {max_blocks} blocks",
                        make(),
                        gather,
                        token_mode,
                        Chunks(ids * 3 if gather else ids),
                        max_blocks=max_blocks,
                        partial_sums=max_blocks == 2,
                        small=max_blocks == 2 and make in (token_major, mla),
                    )
                for offset in (16, 4096):
                    yield copy_case(
                        f"{make.__name__}, parts of payloads, at {offset}",
                        make(),
                        gather,
                        token_mode,
                        Chunks([*tokens["many chunks"]] if token_mode else pages["many chunks"], offset=offset),
                        small=offset == 16,
                    )
        for what in ("many chunks", "nothing there", "no chunk", "no page"):
            yield copy_case(
                f"{make.__name__}, {what}, checksums only", make(), True, False, Chunks(pages[what]), payloads=NONE
            )
    for make in (many_tiles, many_rows, token_major, mla):
        for (what, ids), gather in product(pages.items(), (True, False)):
            for max_blocks in (1, 2):
                yield copy_case(
                    f"{make.__name__}, {what}, payloads on the host, {max_blocks} blocks",
                    make(),
                    gather,
                    False,
                    Chunks(ids, missing=gather * (max_blocks - 1), offset=32 * (max_blocks - 1)),
                    max_blocks=max_blocks,
                    checksums=what != "some pages" or max_blocks == 2,
                    payloads=ON_HOST,
                    partial_sums=max_blocks == 2,
                    small=max_blocks == 2 and what in ("many chunks", "some pages", "nothing there"),
                )
    for gather in (True, False):
        ids = [[i] if i < slots else [-1] for i in range(300)]
        for partial_sums in (False, True):
            chunks = Chunks(ids, wide=False, host_ids=True)
            case = copy_case(f"300 chunks, {partial_sums=}", mla(), gather, True, chunks, partial_sums=partial_sums)
            case.fields["places_no_table"] = b""  # it takes several kernels instead
            yield case
        ids = [[*(i for i in range(slots) if i != 5), *[-1] * 1200], [-1, 5, -1]]
        yield copy_case(
            "ids that parameters do not hold", mla(), gather, True, Chunks(ids, host_ids=True), small=gather
        )


# --- The codec


def coded_tiles(raw: torch.Tensor, planes: int) -> list[bytes] | None:
    """The coded tiles of a payload; None if one does not fit."""
    tiles = []
    for plane in raw.reshape(planes, -1):
        numbers = plane.numpy().view(np.uint16)
        for i in range(0, len(numbers), reference.TILE_NUMBERS):
            tile = reference.encode_tile(numbers[i : i + reference.TILE_NUMBERS])
            if tile is None:
                return None
            tiles.append(tile)
    return tiles


def decoded(coded: bytes, planes: int, plane_bytes: int) -> torch.Tensor:
    """The raw payload that any coded tiles stand for."""
    at, numbers = 0, []
    for _ in range(planes):
        left = plane_bytes // 2
        while left:
            here = min(left, reference.TILE_NUMBERS)
            size = 112 + -(-here // 32) * 48
            numbers.append(reference.decode_tile(coded[at : at + size], here))
            at, left = at + size, left - here
    assert at == len(coded)
    return torch.from_numpy(np.concatenate(numbers or [np.zeros(0, np.uint16)]).view(np.uint8).copy())


def part_of_checksum(part: bytes, offset: int) -> int:
    """What a part of a longer payload contributes to its checksum, without the whole length's term."""
    before = torch.zeros(offset, dtype=torch.uint8)
    whole = torch.cat([before, torch.frombuffer(bytearray(part), dtype=torch.uint8)]) if part else before
    return reference.checksum(whole) - reference.checksum(before)


def coded_case(
    name: str,
    cache: PagedCache,
    gather: bool,
    chunks: Chunks,
    *,
    tiles: Sequence[bytes] = (),
    first_plane: int = 0,
    cache_misalignment: int = 0,
    payload_misalignment: int = 16,
    max_blocks: int = 0,
    small: bool = False,
) -> Case:
    """tiles: what a scatter is given, for each chunk; default: what a gather makes. first_plane: of the payload."""
    layout = cache.layout
    before, places = as_bytes(cache.memory), [plane - cache.memory.data_ptr() for plane in layout.planes]
    work = torch.frombuffer(bytearray(before), dtype=torch.uint8)
    fields = ("num_pages", "page_stride", "page_tokens", "runs", "run_stride", "run_bytes", "token_bytes")
    here = KVLayout(planes=tuple(work.data_ptr() + p for p in places), **{f: getattr(layout, f) for f in fields})
    blank = torch.full_like(work, 0xEE)
    given = KVLayout(planes=tuple(blank.data_ptr() + p for p in places), **{f: getattr(layout, f) for f in fields})
    planes, regions, table, sums = len(places), [], [], []
    for i, ids in enumerate(chunks.ids):
        tokens = len(ids) * layout.page_tokens - (chunks.missing if ids else 0)
        plane_bytes = len(ids) * layout.page_bytes
        raw = reference.gather_pages(here, work, ids, tokens)
        made = coded_tiles(raw, planes)
        coded = tiles[i] if tiles else b"".join(made or [])
        coded_bytes = planes * (
            plane_bytes // 4096 * 3184 + (112 + -(-(plane_bytes % 4096) // 64) * 48) * bool(plane_bytes % 4096)
        )
        in_coded = 64 + first_plane * (coded_bytes // planes)
        if not gather:
            raw = decoded(coded, planes, plane_bytes)
            reference.scatter_pages(given, blank, ids, raw)
        of_chunk = [part_of_checksum(as_bytes(raw), first_plane * plane_bytes), part_of_checksum(coded, in_coded), 0]
        if not gather:
            of_chunk[1] = 0
        elif made is None:
            of_chunk = [0, 0, 1]
        sums += [one % 2**64 for one in of_chunk]
        packed = as_bytes(torch.tensor(ids, dtype=torch.int64 if chunks.wide else torch.int32))
        table += [1 + 2 * i, chunks.wide, len(ids), tokens, 2 + 2 * i, first_plane * plane_bytes]
        regions.append(Region(f"ids of chunk {i}", packed, packed, chunks.host_ids))
        written = b"\xee" * coded_bytes if gather else coded
        name_of = f"garbage {i}" if gather and made is None else f"tiles {i}"
        after = written if gather and made is None else coded
        regions.append(Region(name_of, written, after, False, payload_misalignment))
    memory = (before, before) if gather else (b"\xee" * len(before), as_bytes(blank))
    regions.insert(0, Region("cache", *memory, False, cache_misalignment))
    numbers = (layout.num_pages, layout.page_stride, layout.page_bytes, layout.run_bytes, layout.run_stride)
    op = "gather_coded" if gather else "scatter_coded"
    case = Case(
        f"{op}, {name}",
        op,
        {
            "token_mode": u64s([0]),
            "host_ids": u64s([chunks.host_ids]),
            "max_blocks": u64s([max_blocks]),
            "planes": u64s(places),
            "layout": u64s([*numbers, layout.page_tokens, layout.token_bytes]),
            "chunks": u64s(table),
            "sums": u64s([len(regions)]),
        },
        regions,
        small,
    )
    if any(not -1 <= i < layout.num_pages for ids in chunks.ids for i in ids):
        case.fields["cpu_refused"] = b""
    regions.append(Region("sums", b"\xee" * 8 * len(sums), u64s(sums), misalignment=8))
    return case


def coded_pages(heads: int, size: int, planes: int = 2, gap: int = 0, outside: int = 0, seed: int = 5) -> PagedCache:
    """bf16 numbers of a normal distribution in pages of 4 tokens, in runs of a head if there are gaps. outside: how
    many numbers of page 3 are far larger than its others."""
    width, generator = heads * (size + gap), torch.Generator().manual_seed(seed)
    numbers = torch.randn(planes * PAGES * TOKENS * width, generator=generator).bfloat16()
    memory = torch.cat([torch.zeros(32), numbers, torch.zeros(32)]).bfloat16()
    pages = memory[32:-32].view(planes, PAGES, TOKENS, heads, size + gap)
    if outside:
        pages[0, 3] = 1.5
        pages[0, 3].view(-1)[1::2] = 0
        pages[0, 3].view(-1)[: 2 * outside : 2] = 1e30
    layout = KVLayout.from_tensors(list(pages[..., :size]), page_tokens=TOKENS, page_dim=0, token_dim=1)
    return PagedCache(memory.view(torch.uint8), layout, lambda ids: pages[:, ids, ..., :size].reshape(-1))


def coded_cases() -> Iterator[Case]:
    """Lanes, tiles, pages and planes of all lengths relative to one another."""
    ids: dict[str, list[list[int]]] = {
        "one page": [[3]],
        "some pages": [[6, 2, 0, 5]],
        "one left out": [[1, -1, 4]],
        "nothing there": [[-1]],
        "many chunks": [[3, 1], [], [0], [-1, 6, 2], [5]],
        "all pages": [list(range(PAGES))],
        "no chunk": [],
    }
    makes = {
        "a tile and a half per page": lambda: coded_pages(3, 256),
        "runs": lambda: coded_pages(2, 40, planes=3, gap=24),
        "many tiles": lambda: coded_pages(4, 500, planes=3),
        **{f"{n} lanes per token": lambda n=n: coded_pages(1, 8 * n) for n in (1, 3, 77)},
    }
    for (what, make), gather in product(makes.items(), (True, False)):
        for i, (name, chunks) in enumerate(ids.items()):
            yield coded_case(
                f"{what}, {name}",
                make(),
                gather,
                Chunks(chunks, wide=i % 2 == 0, host_ids=i % 3 != 0),
                max_blocks=(0, 1, 2)[i % 3],
                small=name == "many chunks" and what != "many tiles",
            )
        yield coded_case(f"{what}, planes of a longer payload", make(), gather, Chunks([[3, 1], [2]]), first_plane=5)
    for missing in range(1, TOKENS):
        chunks = Chunks([[3, 1], [6], [-1]], missing=missing)
        yield coded_case(f"{missing} missing of the last page", coded_pages(2, 40, gap=8), True, chunks)
    for outside in (1, 35, 36, 37, 300, 1024 - 36, 1024 - 37):
        make = coded_pages(3, 256, outside=outside)
        yield coded_case(f"{outside} large numbers", make, True, Chunks([[3], [2]]), small=outside in (36, 37))
        if outside <= 36:
            yield coded_case(f"{outside} large numbers", make, False, Chunks([[3], [2]]), small=outside == 36)
    for i, (spread, step) in enumerate(product((17, 31, 90), (1, 3, 50))):
        make = coded_pages(3, 256, seed=i)
        numbers = make.memory.view(torch.int16)[32:]
        places = torch.randperm(2 * PAGES * 3072)[: 2 * PAGES * 40 // step]
        numbers[places] = ((120 + torch.randint(-spread, spread, (len(places),))) << 7).to(torch.int16)
        yield coded_case(f"exponents spread by {spread}, {step}", make, True, Chunks([[i] for i in range(PAGES)]))
    noise = coded_pages(3, 256)
    noise.memory.copy_(torch.randint(0, 256, noise.memory.shape, dtype=torch.uint8))
    yield coded_case("noise", noise, True, Chunks([[3, 1], [0]]), small=True)
    least = coded_pages(3, 256)
    least.memory.view(torch.int16).bitwise_and_(0x087F)  # exponents below the least window's end, and zeros
    yield coded_case("the least exponents", least, True, Chunks([[3, 1], [0]]))
    generator = np.random.default_rng(3)
    for i in range(16):
        coded = [generator.integers(0, 256, 2 * size, np.uint8) for size in (3184 + 1648, 3184 + 3184 + 3184)]
        for one, size in zip(coded, (4832, 9552), strict=True):
            for at in (0, size, size - 1648):
                if i % 4 == 0:
                    one[at + 1] = i  # some exceptions
                if i % 4 == 1:
                    one[at + 4 : at + 76].view(np.uint16)[:] %= 40  # many at one place
                if i % 4 == 2:
                    one[at + 4 : at + 76].view(np.uint16)[:] %= 4096  # some outside of the tile
        yield coded_case(
            f"any bytes, {i}",
            coded_pages(3, 256),
            False,
            Chunks([[4], [1, -1]]),
            tiles=[one.tobytes() for one in coded],
            small=i < 4,
        )
    for what, bad in {
        "a cache": coded_case("", coded_pages(3, 256), True, Chunks([[3]]), cache_misalignment=8),
        "tiles": coded_case("", coded_pages(3, 256), True, Chunks([[3]]), payload_misalignment=8),
        "tails": coded_case("", coded_pages(2, 2), True, Chunks([[3, 1]], missing=1)),
    }.items():
        bad.name += f"{what} not in lanes"
        bad.fields["refused"] = b""
        bad.regions = [region._replace(after=region.before) for region in bad.regions]
        yield bad


def blake3_cases() -> Iterator[Case]:
    published = VECTORS["blake3"]
    for vector in published["cases"]:
        data = bytes(i % 251 for i in range(vector["bytes"]))
        for op, name in (("keyed_hash", "key"), ("derive_key", "context")):
            fields = {name: published[name].encode(), "data": data, "hash": bytes.fromhex(vector[op])}
            yield Case(f"published {op} of {len(data)} bytes", f"blake3_{op}", fields, small=True)


# --- Builds


CXX = os.environ.get("CXX", "g++")
SANITIZERS = {"asan": "address,undefined", "tsan": "thread"}
ENVIRONMENT = {"TSAN_OPTIONS": "halt_on_error=1 atexit_sleep_ms=0", "UBSAN_OPTIONS": "print_stacktrace=1"}
# Each driver, with its files of csrc/.
DRIVERS = {"driver.cpp": ["prefix_keys.cu", "page_copy.cu"], "transfer_driver.cpp": ["page_copy.cu", "transfer.cu"]}


def run(command: Sequence[object], timeout: int = 300, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs a command; stdout has both outputs."""
    return subprocess.run(
        [str(word) for word in command],
        check=False,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=timeout,
        env={**os.environ, **ENVIRONMENT, **environment},
    )


def must_run(command: Sequence[object]) -> None:
    done = run(command)
    assert done.returncode == 0, f"{' '.join(str(word) for word in command)}\n{done.stdout}"


class Builds:
    """Programs, each built at its first use."""

    def __init__(self, folder: Path, cases: Path, small_cases: Path) -> None:
        self.folder = folder
        self.cases = {"asan": cases, "tsan": small_cases}
        self._done: set[Path] = set()

    def _object(self, source: Path, sanitizer: str | None) -> Path:
        out = self.folder / f"{source.parent.name}_{source.name}_{sanitizer}.o"
        if out not in self._done:
            flags = ["-std=c++17", "-g", "-fno-omit-frame-pointer", "-DLMC_HOST_CUDA", "-Wall", "-Wno-unknown-pragmas"]
            flags += [f"-I{HOST_CUDA}", f"-I{source.parent}", f"-I{REPO / 'csrc'}"]
            if sanitizer:
                flags += ["-O1", f"-fsanitize={SANITIZERS[sanitizer]}", "-fno-sanitize-recover=all"]
            else:
                flags += ["-O2"]  # the emulated runtime itself is not sanitized
            must_run([CXX, *flags, "-x", "c++", "-c", source, "-o", out])
            self._done.add(out)
        return out

    def _program(self, name: str, sanitizer: str, sources: Sequence[Path]) -> Path:
        out = self.folder / f"{name}_{sanitizer}"
        if out not in self._done:
            jobs = [(source, sanitizer) for source in sources]
            jobs += [(HOST_CUDA / source, None) for source in ("kernels.cpp", "streams.cpp")]
            with ThreadPoolExecutor(2) as pool:
                objects = list(pool.map(lambda job: self._object(*job), jobs))
            must_run([CXX, f"-fsanitize={SANITIZERS[sanitizer]}", *objects, "-o", out])
            self._done.add(out)
        return out

    def driver(self, sanitizer: str, name: str = "driver.cpp") -> Path:
        return self._program(name, sanitizer, [HOST_CUDA / name, *(REPO / "csrc" / file for file in DRIVERS[name])])

    def selftest(self, sanitizer: str) -> Path:
        return self._program("selftest", sanitizer, [HOST_CUDA / "selftest.cu", REPO / "csrc" / "host_memory.cu"])

    def mutants(self, sanitizer: str, name: str) -> Path:
        csrc = self.folder / "mutants"
        if csrc not in self._done:
            write_mutants(csrc)
            self._done.add(csrc)
        files = [csrc / file for file in DRIVERS[name]]
        return self._program(f"mutants_{name}", sanitizer, [HOST_CUDA / name, *files])


@pytest.fixture(scope="module")
def builds(tmp_path_factory: pytest.TempPathFactory) -> Builds:
    if shutil.which(CXX) is None:
        pytest.skip(f"no {CXX}")
    folder = tmp_path_factory.mktemp("host_cuda")
    cases = [*blake3_cases(), *identity_cases(), *copy_cases(), *coded_cases()]
    small = [case for case in cases if case.small]
    return Builds(folder, write_cases(folder / "cases", cases), write_cases(folder / "small_cases", small))


# --- The kernels


def drive(builds: Builds, sanitizer: str, *options: object) -> None:
    done = run([builds.driver(sanitizer), builds.cases[sanitizer], *options])
    assert done.returncode == 0, done.stdout[-8000:]
    assert " 0 failures" in done.stdout


def test_kernels_equal_the_reference_under_asan_and_ubsan(builds: Builds):
    drive(builds, "asan", "--schedules", 9)


def test_keys_of_a_million_ids_equal_the_reference(builds: Builds, tmp_path: Path):
    count = 1 << 20
    cuts = [1, 4096, count // 2, count // 2 + 1, count - 4096, count - 1, count]
    case = keys_case("a million ids", some_ids(count), [Item("a", 9, 1000), Item("b", count - 700, 900)], cuts)
    done = run([builds.driver("asan"), write_cases(tmp_path / "cases", [case])])
    assert done.returncode == 0, done.stdout[-8000:]


def test_kernels_equal_the_reference_under_tsan(builds: Builds):
    drive(builds, "tsan", "--schedules", 3)


def test_two_threads_may_call_at_once(builds: Builds):
    drive(builds, "tsan", "--threads", 2, "--schedules", 3)


def test_a_cuda_graph_captures_all_but_long_tables_and_replays(builds: Builds):
    drive(builds, "asan", "--graphs", "--schedules", 3)


def test_every_cuda_error_is_thrown_and_leaves_nothing_behind(builds: Builds):
    drive(builds, "asan", "--api-failures", "--schedules", 3)


@pytest.mark.parametrize("sanitizer, schedules", [("asan", 200), ("tsan", 40)])
def test_transfers_move_every_byte_in_any_order_of_events(builds: Builds, sanitizer: str, schedules: int):
    done = run([builds.driver(sanitizer, "transfer_driver.cpp"), "--schedules", schedules])
    assert done.returncode == 0, done.stdout[-8000:]
    assert f"{schedules} schedules, 0 failures" in done.stdout


@pytest.mark.parametrize("seed", range(12))  # one process each: the emulated device remembers all events
def test_every_cuda_error_of_a_transfer_leaves_nothing_under_way(builds: Builds, seed: int):
    done = run([builds.driver("asan", "transfer_driver.cpp"), "--api-failures", "--seed", seed])
    assert done.returncode == 0, done.stdout[-8000:]


@pytest.mark.parametrize("driver", DRIVERS)
def test_the_driver_builds_for_a_gpu(tmp_path: Path, driver: str):
    nvcc = shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")
    if nvcc is None:
        pytest.skip("no nvcc")
    must_run([nvcc, "-std=c++17", "-x", "cu", f"-I{REPO / 'csrc'}", "-c", HOST_CUDA / driver, "-o", tmp_path / "o"])


# --- The emulated device itself


RIGHT = [
    *(
        "graph_replays",
        "block_sum",
        "reuse_pinned",
        "two_streams",
        "null_stream",
        "pageable_is_staged",
        "event_means_its_last_record",
    ),
    *(
        "host_function_runs_in_its_place",
        "registered_memory_is_pinned",
        "host_memory_is_registered_in_pieces",
        "errors_are_those_of_cuda",
        "add_to_same_word",
    ),
    *("copy_in_bulk", "read_unwritten_shared"),
]
WRONG_RESULT = r"^$"
RACE, OVERRUN, POISONED = "ThreadSanitizer: data race", "heap-buffer-overflow", "use-after-poison"
# What a run reports under one of six seeds; the last column: whether it does under all of them.
WRONG = [
    ("block_sum without its barrier", "asan", WRONG_RESULT, True),
    ("block_sum without its barrier", "tsan", RACE, True),
    ("block_sum without its warp barrier", "asan", WRONG_RESULT, True),
    ("block_sum without its warp barrier", "tsan", RACE, True),
    ("block_sum without its shuffle", "asan", WRONG_RESULT, True),
    ("reuse_pinned without its wait", "asan", WRONG_RESULT, False),
    ("reuse_pinned without its wait", "tsan", RACE, True),
    ("two_streams without their event", "asan", WRONG_RESULT, False),
    ("two_streams without their event", "tsan", RACE, False),
    ("null_stream and one that does not block", "asan", WRONG_RESULT, False),
    ("write_same_word", "tsan", RACE, True),
    ("wait_for_nobody", "asan", "the thread exits while lane|the mask names a lane that has exited", True),
    ("shuffle_in_part_of_a_warp", "asan", "the mask names a lane that the block does not have", True),
    ("shuffle_from_outside_the_mask", "asan", "it reads a lane that the mask leaves out", True),
    ("shuffle_at_two_places", "asan", "another lane of the mask waits in another collective", True),
    ("barrier_in_a_branch", "asan", "while others wait at that of", True),
    ("barrier_that_some_skip", "asan", "exits while others wait at the barrier|threads of the block are missing", True),
    ("barrier_and_collective", "asan", "no thread of the block can go on", True),
    ("too little shared memory", "asan", "kernel .*read_unwritten_shared.*: shared_memory of 4 bytes", True),
    ("shared memory overrun", "asan", OVERRUN, True),
    ("device memory overrun", "asan", OVERRUN, True),
    ("device memory underrun", "asan", "neither device nor pinned memory", True),
    ("misaligned vector", "asan", "store to misaligned address", True),
    ("more arrivals than expected", "asan", "more threads arrive at an mbarrier than it expects", True),
    ("a bulk copy that is not aligned", "asan", "multiples of 16 are needed", True),
    ("a bulk copy in front of shared memory", "asan", "of a bulk copy is not shared memory", True),
    ("a barrier outside of shared memory", "asan", "of an mbarrier is not shared memory", True),
    ("a batch of copies without a context", "asan", "cuMemcpyBatchAsync: error 201", True),
    ("an event of a capture", "asan", "an event that was recorded in a capture", True),
    ("loop", "tsan", "kernel .*loop.*: the watchdog ends", True),
    ("host pointer in a kernel", "asan", "neither device nor pinned memory", True),
    ("host pointer in a copy", "asan", "not on the side that its kind says", True),
    ("copy overrun", "asan", "run past the end of their allocation", True),
    ("device memory on the host", "asan", POISONED, True),
    ("freed too early", "asan", "heap-use-after-free", False),
    ("freed twice", "asan", "is freed twice", True),
    ("destroyed event", "asan", "an event is used that has been destroyed", True),
    ("destroyed stream", "asan", "a stream is used that has been destroyed", True),
]


@pytest.mark.parametrize("sanitizer", SANITIZERS)
@pytest.mark.parametrize("scenario", RIGHT)
def test_the_stand_in_takes_what_is_right(builds: Builds, scenario: str, sanitizer: str):
    for seed in range(6):
        done = run([builds.selftest(sanitizer), scenario, seed])
        assert done.returncode == 0, f"seed {seed}\n{done.stdout}"


@pytest.mark.parametrize("scenario, sanitizer, message, always", WRONG, ids=lambda value: str(value)[:40])
def test_the_stand_in_tells_what_is_wrong(builds: Builds, scenario: str, sanitizer: str, message: str, always: bool):
    runs = [run([builds.selftest(sanitizer), scenario, seed]) for seed in range(3 if always else 6)]
    told = [done.returncode not in (0, 2, 3) and re.search(message, done.stdout) is not None for done in runs]
    assert all(told) if always else any(told), "\n".join(f"{done.returncode} {done.stdout}" for done in runs)


# --- Mutations: each takes one safeguard away, and some test must fail


@dataclass
class Mutation:
    """In `file` of csrc/, `original` becomes `replacement`: an expression, or a statement where it ends with ;"""

    file: str
    what: str  # the safeguard
    original: str
    replacement: str
    within: str = ""  # text that occurs once and contains `original`, if that occurs more often
    args: tuple[str, ...] = ()  # the driver's

    driver: str = ""

    def __post_init__(self) -> None:
        self.driver = self.driver or ("transfer_driver.cpp" if self.file in (TRANSFER, FRAGMENTS) else "driver.cpp")


XOR_SHUFFLE = "__shfl_xor_sync(kAllLanes, value, step)"
EXCEPTION_SHUFFLE = "__shfl_sync(kAllLanes, n < kWarp ? first : second, n % kWarp)"
IN_PAGES = "in_pages(copy, work, tile.raw + lane)"
CODED_LENGTH = "is_coded(c) ? coded_plane_bytes(raw_plane_bytes(c)) : raw_plane_bytes(c)"
NO_TILE = "if (tile.lanes == 0) return;"
SUMMED = "ring.summed[stage].wait(begun / kStages - 1);"
PAYLOAD = "reinterpret_cast<uint4*>(work.chunk.payload)"
PUT_SUMS = "put_sums(copy, c, sums, length_term);"
KEYS, COPY, SPAN, TABLE, ERROR = "prefix_keys.cu", "page_copy.cu", "copy_span.h", "table.h", "error.h"
TRANSFER, FRAGMENTS, WARP = "transfer.cu", "batch_copy.h", "warp_codec.h"
CALLERS_EVENT = "cudaEventRecord(static_cast<cudaEvent_t>(event_), static_cast<cudaStream_t>(stream))"
FAILURES = ("--api-failures",)


STEP_ENDS = "__syncthreads();\n  }\n\n  if (thread < kGroupLeaves)"


def call(text: str) -> str:
    return f"LMC_CUDA_CHECK(op, {text});"


# Not among them, since they only save time: the check of items.reach before an item, `first >= count` in overwrite,
# leaving out nodes of partial leaves, and returning early if there are no items or no chunks to gather. Nor guards that
# only payloads of 16 GiB or caches of 2**31 pages would test, nor what destructors do when CUDA fails in them.
MUTATIONS = [
    # Barriers, shuffles, atomic accesses
    Mutation(KEYS, "a step before the next", "__syncthreads();", "", STEP_ENDS),
    Mutation(KEYS, "a level before the next", "__syncthreads();", "", "__syncthreads();\n    const u32 parents"),
    Mutation(KEYS, "all levels before keys", "__syncthreads();", "", "__syncthreads();\n\n  const u32 c ="),
    Mutation(KEYS, "left children", "__shfl_sync(kAllLanes, cv[w], 2 * thread % kGroupLeaves)", "cv[w]"),
    Mutation(KEYS, "right children", "__shfl_sync(kAllLanes, cv[w], (2 * thread + 1) % kGroupLeaves)", "cv[w]"),
    Mutation(KEYS, "the other lanes' bad ids", "__shfl_xor_sync(kAllLanes, value, step)", "value"),
    Mutation(KEYS, "the other warps' bad ids", "bad = at_most(bad, first_bad);", ""),
    Mutation(
        COPY,
        "the atomicity of a checksum",
        "atomicAdd(copy.sums + c, sum + (warp == 0 ? length_term : 0))",
        "(copy.sums[c] += sum + (warp == 0 ? length_term : 0))",
    ),
    # Tables
    Mutation(TABLE, "tables that parameters do not hold", "bytes_.size() <= sizeof parameters.bytes", "true"),
    Mutation(TABLE, "where such a table is", "elsewhere ? elsewhere : bytes", "bytes"),
    Mutation(TABLE, "aligning the parts of a table", "(bytes_.size() + 15) / 16 * 16 + part", "bytes_.size() + part"),
    Mutation(TABLE, "refusing captures", "is_captured(op, where.stream)", "false", args=("--graphs",)),
    Mutation(COPY, "the end of parameters", "part.table.bytes_after(more) > sizeof part.parameters.bytes", "false"),
    Mutation(COPY, "ids in a table", "ids_in_table", "false", "if (ids_in_table)"),
    Mutation(COPY, "ids outside the cache", "chunk.id(k) < ids_end", "true"),
    # Errors and devices
    Mutation(ERROR, "going back to the device before", "if (restore_) cudaSetDevice(before_);", ""),
    Mutation(ERROR, "going to the call's device", call("cudaSetDevice(device)"), ""),
    Mutation(
        ERROR,
        "leaving alone a device that nobody chose",
        "restore_ = has_context;",
        "restore_ = true;",
        driver="transfer_driver.cpp",
    ),
    Mutation(
        ERROR,
        "letting another thread capture",
        "cudaThreadExchangeStreamCaptureMode(&mode_);",
        "",
        "cudaThreadExchangeStreamCaptureMode(&mode_); }\n  ~RelaxedCapture",
        driver="transfer_driver.cpp",
    ),
    Mutation(
        ERROR,
        "going back to the mode of captures",
        "cudaThreadExchangeStreamCaptureMode(&mode_);",
        "",
        "~RelaxedCapture() { cudaThreadExchangeStreamCaptureMode(&mode_);",
        driver="transfer_driver.cpp",
    ),
    Mutation(
        ERROR,
        "clearing an error that is thrown",
        "cudaGetLastError()",
        "cudaSuccess",
        "cudaGetLastError();   ",
        ("--api-failures",),
    ),
    Mutation(ERROR, "looking at errors", "error_ != cudaSuccess", "false", args=("--api-failures",)),
    # Content ids
    Mutation(KEYS, "the end of the ids", "first + k < end", "true", "first + k < end ? static_cast<u64>(token_ids"),
    Mutation(KEYS, "finding bad ids", "if (ids[k] >= kTokenIdEnd) *bad = static_cast<u32>(first + k);", ""),
    Mutation(KEYS, "the end of the ids", "first + kBlockIds < end ? first + kBlockIds : end", "first + kBlockIds"),
    Mutation(KEYS, "an item's begin", "item.offset > first ? item.offset : first", "first"),
    Mutation(KEYS, "an item's end", "item.end < block_end ? item.end : block_end", "block_end"),
    Mutation(KEYS, "a thread's last position", "item.end < block_end ? item.end : block_end", "item.end"),
    Mutation(KEYS, "the end of a block of lanes", "lanes_end < to ? lanes_end : to", "to"),
    Mutation(KEYS, "the begin of a block of lanes", "first + k >= p", "true"),
    Mutation(KEYS, "the end of a block of lanes", "first + k < stop", "true", "first + k >= p && first + k < stop"),
    Mutation(KEYS, "writing covered ids only", "(covered >> k & 1)", "true", "(covered >> k & 1) && static_cast"),
    Mutation(KEYS, "leaving bad ids as they are", "static_cast<u64>(token_ids[first + k]) < kTokenIdEnd", "true"),
    Mutation(KEYS, "the mark of overwritten ids", "if (covered >> k & 1) ids[k] |= kOverwritten;", ""),
    # Keys
    Mutation(KEYS, "the first of a thread's bad ids", "at_most(bad, bad_here)", "bad_here"),
    Mutation(KEYS, "blocks of ids that all warps make", "made < blake3::kLeafBlocks", "true"),
    Mutation(KEYS, "blocks to chain", "at_most(begin + kMakers, blake3::kLeafBlocks)", "begin + kMakers"),
    Mutation(KEYS, "the end of cuts in steps", "cuts[regular] == cuts[regular - 1] + step", "true"),
    Mutation(KEYS, "cuts behind those in steps", "c < regular", "true", "c < regular ? first"),
    Mutation(KEYS, "the last chain value, which is not kept", "b + 1 < blake3::kLeafBlocks", "true"),
    Mutation(KEYS, "the nodes of a level", "thread < kGroupLeaves >> level", "true"),
    Mutation(KEYS, "the last cut of a block", "c < cuts_end", "true"),
    Mutation(KEYS, "the end of a prefix's last block", "w < 2 * ids", "true"),
    Mutation(
        KEYS,
        "the chain's begin",
        "b == 0 ? prefixes.root[w] : shared.running[b - 1][w][leaf]",
        "shared.running[b - 1][w][leaf]",
    ),
    Mutation(KEYS, "the last key", "if (c >= prefixes.cuts.count) return;", ""),
    Mutation(KEYS, "the empty prefix", "end == 0", "false", "if (end == 0) {"),
    Mutation(KEYS, "levels that a prefix has no subtree of", "if ((leaves >> level & 1) == 0) continue;", ""),
    Mutation(KEYS, "zeros behind a bad id", "bad >= end", "true"),
    Mutation(KEYS, "the most ids that fit", "cuts.back() > kMaxIds", "false"),
    Mutation(KEYS, "no cuts", "if (cuts.empty()) return;", ""),
    Mutation(KEYS, "no ids to hash", "prefixes.num_groups > 0", "true"),
    Mutation(KEYS, "no ids to overwrite", "count == 0", "false", "if (count == 0 ||"),
    # Spans
    Mutation(SPAN, "pages outside of the cache", "if (block >= layout.num_pages) return span;", ""),
    Mutation(SPAN, "slots outside of it", "if (position >= layout.num_pages * layout.page_tokens.d) return span;", ""),
    Mutation(SPAN, "the tail", "valid < layout.page_tokens.d", "false"),
    Mutation(SPAN, "slots behind the tail", "if (slot >= valid) return span;", ""),
    Mutation(SPAN, "sizes below a unit", "bytes < unit_bytes ? 1 : bytes / unit_bytes", "bytes / unit_bytes"),
    # Copies
    Mutation(
        COPY, "the payload's end", "lane < work.units", "true", "if (lane < work.units) {\n        const uint4* from"
    ),
    Mutation(COPY, "the payload's end", "lane < work.units", "true", "if (lane < work.units) {\n        uint4* to"),
    Mutation(COPY, "the payload's end", "y < work.units", "true"),
    *(
        Mutation(COPY, "what the cache has nothing or no place for", f"if ({pointer}) {statement}", statement)
        for pointer, statement in (
            ("from", "lanes[v] = *in_global_memory(from);"),
            ("to", "*in_global_memory(to) = lanes[v];"),
            ("from", "value = unit == 4 ? *reinterpret_cast<const u32*>(from) : *from;"),
            ("cache", "return filled.load(tile + at, cache, lanes * kLaneBytes);"),
            ("cache", "bulk_store(cache, tile + at, lanes * kLaneBytes);"),
        )
    ),
    Mutation(COPY, "what the cache has no place for", "to && unit == 4", "unit == 4"),
    Mutation(COPY, "what the cache has no place for", "to && unit == 1", "unit == 1"),
    Mutation(COPY, "a gather without payloads", "payload ? payload + lane : nullptr", "payload + lane"),
    Mutation(COPY, "a gather without payloads", PAYLOAD, f"in_global_memory({PAYLOAD})", f"payload = {PAYLOAD}"),
    Mutation(
        COPY,
        "a gather without payloads",
        "work.chunk.payload ? work.chunk.payload + y * unit : nullptr",
        "work.chunk.payload + y * unit",
    ),
    Mutation(COPY, "lanes behind the payload", "lane * units < work.units", "true"),
    Mutation(COPY, "a call without checksums", f"if (copy.sums) {PUT_SUMS}", PUT_SUMS),
    Mutation(COPY, "one lane for its warp", "if (threadIdx.x % kWarp != 0) return;", ""),
    Mutation(COPY, "the length once, by one warp", "warp == 0", "true"),
    Mutation(COPY, "the length once, by one block", "tile == chunk_begin", "true"),
    Mutation(COPY, "sums that begin at zero", call("cudaMemsetAsync(sums, 0, 8 * call.chunks.size(), stream)"), ""),
    Mutation(COPY, "a place for each partial sum", "(blockIdx.x + c)", "c"),
    Mutation(COPY, "the partial sums of the last block", "last_block + c + 1", "first_block + c + 1"),
    Mutation(COPY, "the partial sums of the first block", "(first_block + c)", "c"),
    Mutation(COPY, "partial sums of several kernels", "are_partial ? part.first_sum : first", "first"),
    Mutation(COPY, "chunks of no tiles", "if (begin == end) return {0, 0, 0};", ""),
    Mutation(COPY, "the end of a block's tiles", "tile < end", "true", "tile < end && tile < chunk_end"),
    Mutation(COPY, "the end of a chunk's tiles", "tile < chunk_end", "true", "tile < end && tile < chunk_end"),
    Mutation(COPY, "the chunk of a tile", "tile < chunk_end", "true", "if (tile < chunk_end) {"),
    Mutation(COPY, "chunks of no pages", "chunk.count ? chunk.count : 1", "chunk.count"),
    Mutation(COPY, "narrow units for narrow tokens", "all |= cache.token_bytes;", ""),
    Mutation(COPY, "narrow units for misaligned payloads", "all |= reinterpret_cast<u64>(chunk.payload);", ""),
    Mutation(COPY, "narrow units for misaligned planes", "all |= reinterpret_cast<u64>(plane);", ""),
    Mutation(COPY, "calls of no bytes", "if (part.tiles() == 0) continue;", ""),
    *(
        Mutation(COPY, "where a part has its lanes", f"work.first + {lane}", lane, f"work.first + {lane}{next}")
        for lane, next in (("lane", ", lanes[v]"), ("lane", ", low"), ("first", " + in_tile"))
    ),
    Mutation(COPY, "the cap of the grid", "most_blocks = std::min<u64>(most_blocks, call.where.max_blocks);", ""),
    # Coded payloads
    Mutation(WARP, "the other lanes' sums", XOR_SHUFFLE, "value", f"value += {XOR_SHUFFLE}"),
    Mutation(WARP, "the other lanes' maxima", XOR_SHUFFLE, "value", f"other = {XOR_SHUFFLE}"),
    Mutation(WARP, "a pair's words", "__shfl_xor_sync(kAllLanes, b, 1)", "b"),
    *(
        Mutation(WARP, "the words of four", f"__shfl_xor_sync(kAllLanes, words.{word}, {lanes})", f"words.{word}")
        for word, lanes in (("y", 1), ("z", 2), ("w", 3))
    ),
    Mutation(WARP, "the sums of those before", "__shfl_sync(kAllLanes, value, (thread - step) % kWarp)", "value"),
    Mutation(WARP, "that nobody is before the first", "thread >= step", "true"),
    Mutation(WARP, "counts that begin at zero", "counts[i * kWarp + thread] = 0;", ""),
    *(
        Mutation(WARP, f"{what}", "__syncwarp();", "", f"__syncwarp();\n{then}")
        for what, then in (
            ("zeros before counts", "  LMC_UNROLL"),
            ("all counts before their sums", "  u32* own"),
            ("all sums before they are read", "  u32 found"),
            ("a head's begin before its exceptions", "    list_exceptions"),
            ("all exceptions before they are read", "  }"),
        )
    ),
    Mutation(WARP, "the atomicity of a count", "atomicAdd(&counts[left & 0xFF], 1u)", "(counts[left & 0xFF] += 1u)"),
    Mutation(WARP, "zeros, which are no exceptions", "if (thread == 0) own[0] = 0;", ""),
    Mutation(WARP, "the least top", "top >= kWindow", "true"),
    Mutation(WARP, "the least top of all", "if (top < kWindow) top = kWindow;", ""),
    Mutation(WARP, "exceptions in all lanes of a smaller v", "__shfl_sync(kAllLanes, until, kWarp - 1)", "until"),
    Mutation(WARP, "exceptions that fit", "fits && exceptions", "exceptions != 0"),
    Mutation(WARP, "another top where too few fit", "exceptions > kMostExceptions", "false"),
    *(
        Mutation(WARP, f"the end of a tile that is {way}", bound, "true", within)
        for way, bound, within in (
            ("coded", "rest_lane(n) < 2 * fours", "rest_lane(n) < 2 * fours)\n      put"),
            ("coded", "code_lane(n) < fours", "code_lane(n) < fours) put"),
            ("decoded", "rest_lane(n) < 2 * fours", "rest_lane(n) < 2 * fours) rest"),
            ("decoded", "code_lane(n) < fours", "code_lane(n) < fours) codes"),
            ("coded", "thread < kHeadLanes", "thread < kHeadLanes) {"),
            ("coded", "thread < kHeadLanes", "thread < kHeadLanes) in_shared"),
        )
    ),
    Mutation(
        WARP,
        "as many exceptions as there are",
        "head.count < kMostExceptions ? head.count : kMostExceptions",
        "head.count",
    ),
    Mutation(WARP, "the last exceptions", "thread + kWarp < kMostExceptions", "true"),
    Mutation(WARP, "the other lanes' exceptions", EXCEPTION_SHUFFLE, "(n < kWarp ? first : second)"),
    Mutation(WARP, "the lane of an exception", "lane % kWarp == thread", "true"),
    Mutation(COPY, "a chunk's last tile, gathered", NO_TILE, "", f"{NO_TILE}\n    uint4 raw"),
    Mutation(COPY, "a chunk's last tile, scattered", NO_TILE, "", f"{NO_TILE}\n    const uint4"),
    Mutation(COPY, "planes that a chunk has", "plane * plane_lanes < work.units", "true"),
    *(
        Mutation(COPY, "the end of a plane", "lane < tile.lanes", "true", f"lane < tile.lanes){then}")
        for then in ("\n        if (const", " add_lane", " {\n        if (uint4")
    ),
    *(
        Mutation(
            COPY,
            "what the cache has nothing or no place for",
            f"if ({name} = {IN_PAGES}) {do.format(of)}",
            do.format(IN_PAGES),
        )
        for name, of, do in (
            ("const uint4* from", "from", "raw[v] = *in_global_memory({});"),
            ("uint4* to", "to", "*in_global_memory({}) = raw[v];"),
        )
    ),
    Mutation(COPY, "that a chunk does not fit", "if (!fits) ++sums.unfit;", ""),
    Mutation(COPY, "a place for each kind of sum", "copy.sums += copy.sums_stride;", ""),
    Mutation(COPY, "memory for all kinds of sums", "part.sums_stride() * call.sums_per_chunk()", "part.sums_stride()"),
    Mutation(COPY, "a part's first plane", "call.coded && plane_bytes ? plane_bytes : kLaneBytes", "kLaneBytes"),
    Mutation(COPY, "chunks of no pages", "call.coded && plane_bytes", "call.coded"),
    Mutation(COPY, "refusing what is not in lanes", "call.coded && unit != kLaneBytes", "false"),
    # Copies by the bulk copy engine
    Mutation(COPY, "barriers before their use", "__syncthreads();", ""),
    Mutation(COPY, "waiting for a tile to move out", "ring.filled[stage].wait(moved / kStages);", ""),
    Mutation(COPY, "waiting for a tile to sum up", "ring.filled[stage].wait(n / kStages);", ""),
    Mutation(COPY, "the phase of a tile to move out", "moved / kStages", "0"),
    Mutation(COPY, "the phase of a tile to sum up", "n / kStages", "0", "wait(n / kStages)"),
    Mutation(COPY, "waiting until a tile is summed up", f"if (copy.sums) {SUMMED}", ""),
    Mutation(COPY, "that nobody sums up", f"if (copy.sums) {SUMMED}", SUMMED),
    Mutation(COPY, "waiting until a tile is moved out", "wait_for_bulk_reads<kStages - kAhead>();", ""),
    Mutation(COPY, "a warp's tile out before the next", "__syncwarp();", "", "__syncwarp();\n    }"),
    Mutation(COPY, "a warp's sum before telling", "__syncwarp();", "", "__syncwarp();\n    if"),
    Mutation(COPY, "telling that a tile is summed up", "ring.summed[stage].arrive();", ""),
    Mutation(COPY, "arriving at a tile", "filled.arrive();", ""),
    Mutation(COPY, "zeros before they are moved out", "if (zeros) fence_for_bulk_copies();", ""),
    Mutation(COPY, "GPUs that have no engine", "code.ptxVersion >= 90", "true"),
    Mutation(COPY, "groups of stores", "commit_bulk_stores();", ""),
    Mutation(COPY, "waiting for all stores", "wait_for_bulk_stores();", ""),
    Mutation(COPY, "moving tiles out", "if (begun >= kAhead) move_out();", ""),
    Mutation(COPY, "moving the last tiles out", "while (moved < begun) move_out();", ""),
    Mutation(COPY, "the last stage", "begun >= kStages", "false"),
    Mutation(COPY, "the end of a chunk in a sum", "first + in_tile < work.units", "true"),
    *(
        Mutation(COPY, "the end of a chunk", "at_most(work.units - first, kTileLanes<u32>)", "kTileLanes<u32>", within)
        for within in (
            f"at_most(work.units - first, kTileLanes<u32>);\n    {next}" for next in ("filled", "bulk_store")
        )
    ),
    Mutation(COPY, "the end of a chunk", "at_most(work.units, first + kTileLanes<u32>)", "(first + kTileLanes<u32>)"),
    Mutation(COPY, "the begin of a tile in a run", "r * run.d < first ? first : r * run.d", "r * run.d"),
    Mutation(COPY, "the end of a tile in a run", "at_most(end, (r + 1) * run.d)", "(r + 1) * run.d"),
    Mutation(COPY, "the end of a piece", "at_most(span.units, stop - y)", "stop - y"),
    # Transfers: threads and devices
    *(
        Mutation(TRANSFER, f"the device {of}", device, "0", f"guard({op}, {device});\n  {then}")
        for of, op, device, then in [
            ("of an event", "op", "device", "refuse_capture"),
            ("of what begins", "j.op", "s.device", "  const Range"),
            ("of an order", "j.op", "j.staging->device", "refuse_capture"),
            ("of a wait", "j.op", "j.staging->device", "  LMC_CUDA_CHECK(j.op, cudaEventSynchronize"),
            ("of a ring", "op", "device", "if (max_blocks == 0)"),
            ("of what is prepared", "op", "staging->device", "  if (chunks.empty())"),
        ]
    ),
    Mutation(TRANSFER, "the device of what is destroyed", "device", "0", 'guard("transfer", device)'),
    Mutation(TRANSFER, "refusing to come behind a capture", "refuse_capture(op, stream);", ""),
    Mutation(TRANSFER, "refusing to be in a capture", "refuse_capture(j.op, stream);", ""),
    *(
        Mutation(
            TRANSFER,
            f"one thread at a time that {does}",
            mutex,
            "[]() -> std::mutex& { thread_local std::mutex own; return own; }()",
            f"lock({mutex});\n{then}",
        )
        for does, mutex, then in [
            ("enqueues", "s.one_job", "  try {"),
            ("takes pinned memory", "pinned_mutex", "      for (Pinned"),
        ]
    ),
    # Transfers: order
    Mutation(TRANSFER, "what the caller's stream holds", CALLERS_EVENT, "cudaSuccess"),
    Mutation(
        TRANSFER,
        "kernels behind the caller's stream",
        "LMC_CUDA_CHECK(j.op, cudaStreamWaitEvent(s.kernels, event));",
        "",
    ),
    Mutation(
        TRANSFER,
        "copies to pages behind the caller's stream",
        "LMC_CUDA_CHECK(j.op, cudaStreamWaitEvent(s.copies, event));",
        "",
    ),
    Mutation(TRANSFER, "a buffer that is free", call("cudaStreamWaitEvent(first, s.free[b])"), ""),
    Mutation(TRANSFER, "that a buffer is filled", call("cudaEventRecord(s.filled[b], first)"), ""),
    Mutation(TRANSFER, "a buffer that is filled", call("cudaStreamWaitEvent(second(), s.filled[b])"), ""),
    Mutation(TRANSFER, "that a buffer is free", call("cudaEventRecord(s.free[b], second())"), ""),
    Mutation(
        TRANSFER,
        "that layers are reached",
        call("cudaEventRecord(reached.back().event, is_store && !has_runs ? s.kernels : second())"),
        "",
    ),
    Mutation(TRANSFER, "that long runs are read after all else", "is_store && !has_runs", "is_store"),
    Mutation(
        TRANSFER,
        "that a job is finished",
        "LMC_CUDA_CHECK(j.op, cudaEventRecord(j.finished, j.second()));",
        "",
    ),
    Mutation(
        TRANSFER,
        "the caller's stream behind the pages",
        "LMC_CUDA_CHECK(j.op, cudaStreamWaitEvent(static_cast<cudaStream_t>(stream), found->event));",
        "",
    ),
    Mutation(TRANSFER, "waiting until layers are begun", "found != j.reached.end() || j.over", "true"),
    Mutation(
        TRANSFER,
        "waking those who wait for layers",
        "changed.notify_all();",
        "",
        "s.kernels : second()));\n    changed.notify_all();",
    ),
    Mutation(TRANSFER, "waiting for no layers of a job that is over", "j.over", "false", "j.over || j.chunks"),
    Mutation(TRANSFER, "waiting for no layers of no chunks", "j.chunks.empty()", "false", "j.over || j.chunks.empty()"),
    Mutation(TRANSFER, "the right layers", "one.planes >= planes", "true"),
    Mutation(TRANSFER, "layers that are not written yet", "if (step.end > planes) return false;", ""),
    Mutation(TRANSFER, "going on no more when it is over", "!j.over", "true", "!j.over && j.next_step"),
    Mutation(TRANSFER, "waiting for a job", "LMC_CUDA_CHECK(j.op, cudaEventSynchronize(j.finished));", ""),
    Mutation(
        TRANSFER,
        "waiting for a job that nobody waits for",
        "if (under_way) quietly(cudaEventSynchronize(finished));",
        "",
    ),
    Mutation(TRANSFER, "a job that was not begun whole", "j.plane != j.ends.back()", "false"),
    Mutation(TRANSFER, "that it is over when it was waited for", "j.end();", "", "j.end();\n  if (j.plane"),
    # Transfers: errors
    *(
        Mutation(
            TRANSFER, f"{what} under way at an error", f"quietly(cudaStreamSynchronize({what}));", "", args=FAILURES
        )
        for what in ("copies", "kernels")
    ),
    Mutation(TRANSFER, "jobs that outlive their ring", "state_->synchronize();", ""),
    Mutation(TRANSFER, "that a failed job is over", "j.end();", "", "j.end();\n    throw;", FAILURES),
    Mutation(TRANSFER, "that a failed job has no checksums", "j.plane = 0;", "", args=FAILURES),
    # Transfers: steps
    Mutation(TRANSFER, "the end of a buffer by chunks", "bytes + bytes_of(step.last, plane, *end) <= budget", "true"),
    Mutation(TRANSFER, "the end of a buffer by layers", "if (bytes > budget) break;", ""),
    Mutation(TRANSFER, "the first layer by itself", "plane > 0", "true", "chunk == 0 && plane > 0"),
    Mutation(TRANSFER, "steps of several layers", "whole && chunk == 0", "false"),
    Mutation(TRANSFER, "few blocks", "s.max_blocks = blocks_for_bus(op, device);", ""),
    Mutation(TRANSFER, "kernels before their first launch", "load_page_copies(op);", ""),
    Mutation(TRANSFER, "pinned memory before the first job", "i < kPinnedBlocks", "false"),
    Mutation(TRANSFER, "the end of pinned memory", "pinned_used + bytes > pinned.back().bytes", "false"),
    Mutation(TRANSFER, "memory that is not pinned", "is_pinned = false;", ""),
    Mutation(TRANSFER, "kernels that use pinned memory only", "!is_pinned", "false", "if (!is_pinned || std::find"),
    Mutation(
        TRANSFER, "the ring for coded chunks", "std::find(coded.begin(), coded.end(), true) != coded.end()", "false"
    ),
    Mutation(TRANSFER, "no long runs of coded chunks", "is_coded(c)", "false", "kernel_blocks || is_coded(c)"),
    Mutation(TRANSFER, "the length of coded planes", CODED_LENGTH, "raw_plane_bytes(c)"),
    Mutation(
        TRANSFER, "the raw offset of a coded part", "step.begin * raw_plane_bytes(c)", "step.begin * plane_bytes(c)"
    ),
    Mutation(TRANSFER, "all sums of a coded chunk", "is_store && !coded.empty() ? kCodedSums : 1", "1"),
    Mutation(TRANSFER, "the end of a store by kernels", "is_store && !kernel_blocks", "is_store"),
    Mutation(
        TRANSFER,
        "long runs or a kernel",
        "kernel_blocks || is_coded(c) ? 0 : fragment_bytes",
        "is_coded(c) ? 0 : fragment_bytes",
    ),
    Mutation(TRANSFER, "long runs of whole pages only", "chunk.id(i) >= cache.num_pages", "false"),
    Mutation(TRANSFER, "long runs that end", "runs.back().in_plane + runs.back().bytes == at", "true"),
    Mutation(TRANSFER, "refusing what does not fit", "bytes_of(c, from, end) > staging->buffer_bytes", "false"),
    Mutation(TRANSFER, "refusing layers within lanes", "end * one.count * cache.page_bytes % kLaneBytes", "0"),
    Mutation(
        FRAGMENTS,
        "reading device memory in the order of the stream",
        "to_payloads ? CU_MEMCPY_SRC_ACCESS_ORDER_STREAM : CU_MEMCPY_SRC_ACCESS_ORDER_ANY",
        "CU_MEMCPY_SRC_ACCESS_ORDER_ANY",
    ),
    Mutation(FRAGMENTS, "a driver that does not support batches", "result != CUDA_ERROR_NOT_SUPPORTED", "true"),
    Mutation(FRAGMENTS, "looking at the driver's errors", "result == CUDA_SUCCESS", "true"),
]


def find(mutation: Mutation, text: str) -> tuple[int, int]:
    within = mutation.within or mutation.original
    assert text.count(within) == 1, f"{mutation.file}: expected once, found {text.count(within)} times: {within}"
    assert within.count(mutation.original) == 1, within
    start = text.index(within) + within.index(mutation.original)
    return start, start + len(mutation.original)


def write_mutants(csrc: Path) -> None:
    """Writes a copy of csrc/ with all mutations in it, where LMC_MUTANT=n activates the n-th: one build for all."""
    shutil.copytree(REPO / "csrc", csrc)
    for file in {mutation.file for mutation in MUTATIONS}:
        text = (csrc / file).read_text()
        inserts: list[tuple[int, bool, int, int, str]] = []  # position, whether it opens, nesting order, text
        for number, mutation in enumerate(MUTATIONS, 1):
            if mutation.file != file:
                continue
            start, end = find(mutation, text)
            if mutation.original.endswith(";"):
                opening = f"{{ if (::lmc_mutant == {number}) {{ {mutation.replacement} }} else {{ "
                closing = " } }"
            else:
                opening, closing = f"(::lmc_mutant == {number} ? ({mutation.replacement}) : (", "))"
            inserts.append((start, True, -end, number, opening))
            inserts.append((end, False, -start, -number, closing))
        for where, *_, inserted in sorted(inserts, reverse=True):
            text = text[:where] + inserted + text[where:]
        (csrc / file).write_text("extern int lmc_mutant; " + text)


SYNCHRONISES = (
    r"__syncthreads|__syncwarp|__\w+_sync\b|__threadfence|\batomic[A-Z]\w*|cudaEvent(Query|Record|Synchronize)"
    r"|cudaStreamWaitEvent|(filled|summed)\S*\.(wait|arrive)|(?<!:)fence_for_bulk_copies\(\);"
)


def test_every_barrier_shuffle_atomic_access_and_event_has_a_mutation():
    missed = []
    for path in sorted((REPO / "csrc").iterdir()):
        text = path.read_text()
        spans = [find(mutation, text) for mutation in MUTATIONS if mutation.file == path.name]
        for match in re.finditer(SYNCHRONISES, re.sub(r"//.*", lambda comment: " " * len(comment[0]), text)):
            if not any(start <= match.start() and match.end() <= end for start, end in spans):
                missed.append(f"{path.name}:{text.count(chr(10), 0, match.start()) + 1}: {match[0]}")
    assert not missed


# `make mutations` tries all of them, in ten minutes; `make test` tries one in twelve.
CHOSEN = range(1, len(MUTATIONS) + 1, 1 if "TEST_MUTATIONS" in os.environ else 12)


@pytest.fixture(scope="module")
def verdicts(builds: Builds) -> dict[int, str | None]:
    """For each mutation, the failure that shows it, None if nothing fails; 0: the same without a mutation."""
    programs = {(name, sanitizer): builds.mutants(sanitizer, name) for name in DRIVERS for sanitizer in SANITIZERS}

    def verdict(driver: str, number: int) -> str | None:
        args = MUTATIONS[number - 1].args if number else ()
        for sanitizer in SANITIZERS:
            cases = [builds.cases[sanitizer]] if driver == "driver.cpp" else []
            options = [*args, "--schedules", 3 if cases else 12, "--fail-fast", "--watchdog", 5]
            done = run([programs[driver, sanitizer], *cases, *options], LMC_MUTANT=str(number))
            if done.returncode:
                return f"{sanitizer}: {done.stdout[:2000]}"
        return None

    def verdict_of(number: int) -> str | None:
        return (
            verdict(MUTATIONS[number - 1].driver, number)
            if number
            else " ".join(found for found in (verdict(driver, 0) for driver in DRIVERS) if found) or None
        )

    numbers = [0, *CHOSEN]
    with ThreadPoolExecutor(2) as pool:
        return dict(zip(numbers, pool.map(verdict_of, numbers), strict=True))


def test_nothing_is_missed_where_nothing_is_taken_away(verdicts: dict[int, str | None]):
    assert verdicts[0] is None


@pytest.mark.parametrize("number", CHOSEN, ids=lambda n: MUTATIONS[n - 1].what)
def test_what_is_taken_away_is_missed(verdicts: dict[int, str | None], number: int):
    mutation = MUTATIONS[number - 1]
    assert verdicts[number] is not None, f"{mutation.file}: {mutation.original} -> {mutation.replacement or 'nothing'}"
