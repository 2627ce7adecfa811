"""Cases of copies between a paged cache and coded payloads."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import product

import numpy as np
import torch

from copy_cases import Chunks, moved
from driver_cases import Case, Region, as_bytes, u64s
from layouts import PAGES, TOKENS, PagedCache
from lmcache_mm import KVLayout, reference


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
    blank = torch.full_like(work, 0xEE)
    here, given = moved(layout, work, places), moved(layout, blank, places)
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
