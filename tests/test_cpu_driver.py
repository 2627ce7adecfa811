"""The CPU operations against reference.py under ASan, UBSan and TSan, and built for another processor."""

from __future__ import annotations

import os
import platform
import shutil
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from coded_cases import coded_cases
from copy_cases import copy_cases
from driver_cases import write_cases
from identity_cases import identity_cases
from lmcache_mm import _C
from programs import CXX, REPO, SANITIZERS, must_run, run

AARCH64_CXX = os.environ.get("AARCH64_CXX", "aarch64-linux-gnu-g++")
AARCH64_EMULATOR = os.environ.get("AARCH64_EMULATOR", "qemu-aarch64")
VARIANTS = {"portable": (4, []), "avx2": (8, ["-mavx2"]), "avx512": (16, ["-mavx512f", "-mavx512vl", "-mavx512bw"])}
SMALL_IS_LARGE = ("-DLMC_THREAD_BYTES=64", "-DLMC_STREAM_BYTES=1")  # uses threads and streaming stores in every case


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
        *((REPO / "csrc" / f"{name}.cpp", folder / f"{name}.o", []) for name in ("simd", "host_keys", "host_copies")),
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
