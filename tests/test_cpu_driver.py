"""The CPU operations against reference.py under ASan, UBSan and TSan, and built for another processor."""

from __future__ import annotations

import os
import platform
import shutil
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

from lmcache_mm import _C, reference
from test_host_cuda import (
    CXX,
    REPO,
    SANITIZERS,
    Case,
    Region,
    as_bytes,
    copy_cases,
    identity_cases,
    must_run,
    run,
    u64s,
    write_cases,
)

AARCH64_CXX = os.environ.get("AARCH64_CXX", "aarch64-linux-gnu-g++")
AARCH64_EMULATOR = os.environ.get("AARCH64_EMULATOR", "qemu-aarch64")
VARIANTS = {"portable": (4, []), "avx2": (8, ["-mavx2"]), "avx512": (16, ["-mavx512f", "-mavx512vl", "-mavx512bw"])}
SMALL_IS_LARGE = ("-DLMC_THREAD_BYTES=64", "-DLMC_STREAM_BYTES=1")  # uses threads and streaming stores in every case


def coded_cases() -> Iterator[Case]:
    """Coded payloads of pages that tiles cross, and payloads of any bytes."""
    pages, page_bytes, ids = 5, 6160, [4, 0, -1, 3]
    packed = as_bytes(torch.tensor(ids))
    numbers = torch.randn(2 * pages * page_bytes // 2, generator=torch.Generator().manual_seed(5)).bfloat16()
    for name, outside in (("as usual", 0), ("with exceptions", 30)):
        kv = numbers.clone()
        kv[:outside] = float("inf")
        memory = kv.view(torch.uint8).reshape(2, pages, page_bytes).roll(4, 1)  # the first numbers are of page 4
        raw = torch.where(torch.tensor(ids)[:, None] < 0, 0, memory[:, ids]).reshape(-1)
        size = 2 * _C.coded_plane_bytes(len(raw) // 2)
        coded = reference.encode_payload(raw, 2)
        header = reference.coded_header(raw)
        assert coded is not None
        raw_sum, tiles_sum = reference.checksum(raw), reference.checksum(torch.tensor(list(coded)))
        tiles_sum -= reference.checksum(torch.tensor(list(header)))
        sums = u64s([raw_sum % 2**64, tiles_sum % 2**64, 0])
        cache, tiles = as_bytes(memory), coded[len(header) :]
        yield coded_case(f"gather, {name}", "gather_coded", ids, packed, (cache, cache), (b"\xee" * size, tiles), sums)
        blank = torch.full_like(memory, 0xEE)
        blank[:, [4, 0, 3]] = memory[:, [4, 0, 3]]
        scattered = u64s([raw_sum % 2**64, 0, 0])
        places = (b"\xee" * len(cache), as_bytes(blank))
        yield coded_case(f"scatter, {name}", "scatter_coded", ids, packed, places, (tiles, tiles), scattered)
    for seed in range(8):
        noise = np.random.default_rng(seed).integers(0, 256, size, np.uint8)
        if seed % 2:
            noise[:112] = 255
        planes = []
        for plane in noise.reshape(2, -1):
            at, left = 0, len(ids) * page_bytes // 2
            while left:
                here = min(left, reference.TILE_NUMBERS)
                whole = _C.coded_plane_bytes(2 * here)
                planes.append(reference.decode_tile(plane[at : at + whole].tobytes(), here))
                at, left = at + whole, left - here
        raw = torch.from_numpy(np.concatenate(planes).view(np.uint8).copy()).reshape(2, len(ids), page_bytes)
        blank = torch.full((2, pages, page_bytes), 0xEE, dtype=torch.uint8)
        blank[:, [4, 0, 3]] = raw[:, [0, 1, 3]]
        sums = u64s([reference.checksum(raw.reshape(-1)) % 2**64, 0, 0])
        places = (b"\xee" * blank.numel(), as_bytes(blank))
        yield coded_case(f"any bytes, {seed}", "scatter_coded", ids, packed, places, (noise.tobytes(),) * 2, sums)


def coded_case(
    name: str,
    op: str,
    ids: Sequence[int],
    packed: bytes,
    cache: tuple[bytes, bytes],
    tiles: tuple[bytes, bytes],
    sums: bytes,
) -> Case:
    page_bytes = len(cache[0]) // 10
    return Case(
        name,
        op,
        {
            "token_mode": u64s([0]),
            "planes": u64s([0, 5 * page_bytes]),
            "layout": u64s([5, page_bytes, page_bytes, page_bytes, 0, 1, page_bytes]),
            "chunks": u64s([1, 1, len(ids), len(ids), 2, 0]),
            "sums": u64s([3]),
        },
        [
            Region("cache", *cache),
            Region("ids", packed, packed),
            Region("tiles", *tiles, misalignment=16),
            Region("sums", b"\xee" * 24, sums),
        ],
    )


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_cases(tmp_path_factory.mktemp("cpu") / "cases", [*identity_cases(), *copy_cases(), *coded_cases()])


def build(folder: Path, compiler: str, variants: Sequence[str], *flags: str) -> Path:
    """cpu_driver with what is compiled for each of `variants`."""
    flags = ("-std=c++17", "-O2", "-g", "-Wall", "-Wno-ignored-attributes", f"-I{REPO / 'csrc'}", *flags)
    if len(variants) > 1:
        flags = (*flags, "-DLMCACHE_MM_X86")
    jobs = [
        (REPO / "tests" / "cpu_driver.cpp", folder / "driver.o", []),
        (REPO / "csrc/host.cpp", folder / "host.o", []),
    ]
    for name in variants:
        lanes, isa = VARIANTS[name]
        options = [f"-DLMC_SIMD={name}", f"-DLMC_LANES={lanes}", *isa]
        for source in ("hash_many", "lane_copy", "tile_codec"):
            jobs.append((REPO / "csrc" / f"{source}.cpp", folder / f"{source}_{name}.o", options))
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda job: must_run([compiler, *flags, *job[2], "-c", job[0], "-o", job[1]]), jobs))
    program = folder / "cpu_driver"
    must_run([compiler, *flags, *(job[1] for job in jobs), "-o", program])
    return program


def drive(cases: Path, command: Sequence[object], threads: int) -> None:
    variants = run([*command, cases, "?", 1]).stdout.split()
    assert "portable" in variants
    for name in variants:
        done = run([*command, cases, name, threads])
        assert done.returncode == 0, f"{name}\n{done.stdout[-8000:]}"
        assert " 0 failures" in done.stdout


@pytest.mark.skipif(platform.machine() != "x86_64", reason="the variants are for x86-64")
@pytest.mark.skipif(shutil.which(CXX) is None, reason=f"no {CXX}")
@pytest.mark.parametrize("sanitizer", SANITIZERS)
def test_the_cpu_operations_equal_the_reference_under_sanitizers(sanitizer: str, cases: Path, tmp_path: Path):
    flags = (f"-fsanitize={SANITIZERS[sanitizer]}", "-fno-sanitize-recover=all", *SMALL_IS_LARGE)
    program = build(tmp_path, CXX, ["portable", "avx2", "avx512"], *flags)
    assert run([program, cases, "?", 1]).stdout.split() == _C.simd_variants()
    drive(cases, [program], threads=3)


def test_the_cpu_operations_equal_the_reference_on_aarch64(cases: Path, tmp_path: Path):
    for program in (AARCH64_CXX, AARCH64_EMULATOR):
        if shutil.which(program) is None:
            pytest.skip(f"no {program} (Debian: g++-aarch64-linux-gnu, qemu-user)")
    program = build(tmp_path, AARCH64_CXX, ["portable"], "-static", *SMALL_IS_LARGE)
    drive(cases, [AARCH64_EMULATOR, program], threads=3)
