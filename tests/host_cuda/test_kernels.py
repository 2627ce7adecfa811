"""The CUDA kernels, whole and unmodified, on the host: every op against reference.py under ASan, UBSan and TSan."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from builds import DRIVERS, HOST_CUDA, Builds
from driver_cases import write_cases
from identity_cases import keys_case, some_ids
from lmcache_mm import Item
from programs import REPO, must_run, run


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
