"""Cases of copies between a paged cache and payloads."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import product
from typing import NamedTuple

import torch

from driver_cases import Case, Region, as_bytes, u64s
from layouts import LAYOUTS, PAGES, TOKENS, PagedCache, mla, opaque, period_251, token_major
from lmcache_mm import KVLayout, reference


def clip(cache: PagedCache) -> tuple[bytes, list[int]]:
    """The cache's bytes from its first plane to its last page, without margins, and the planes' offsets."""
    layout = cache.layout
    extent = (layout.num_pages - 1) * layout.page_stride + (layout.runs - 1) * layout.run_stride + layout.run_bytes
    first = min(layout.planes)
    at = first - cache.memory.data_ptr()
    return as_bytes(cache.memory[at : at + max(layout.planes) - first + extent]), [p - first for p in layout.planes]


def moved(layout: KVLayout, memory: torch.Tensor, planes: Sequence[int]) -> KVLayout:
    """The layout, with planes at these offsets in `memory`."""
    fields = ("num_pages", "page_stride", "page_tokens", "runs", "run_stride", "run_bytes", "token_bytes")
    moved_planes = tuple(memory.data_ptr() + plane for plane in planes)
    return KVLayout(planes=moved_planes, **{name: getattr(layout, name) for name in fields})


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
    here = moved(layout, work, planes)
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
