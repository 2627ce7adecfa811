"""The machine code of the kernels: no spills, wide loads and stores, enough bytes in flight."""

import re
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
import machine_code
from lmcache_mm import _C

ARCHS = [arch for arch in (80, 90, 100, 120) if str(arch) in _C.cuda_archs.split(",")]
pytestmark = pytest.mark.skipif(not ARCHS, reason="built without kernels for these architectures")


@pytest.fixture(scope="module", params=ARCHS, ids=lambda arch: f"sm_{arch}")
def kernels(request):
    return machine_code.kernels(request.param)


def test_all_kernels_are_there(kernels):
    wide = {f"{direction}_kernel<{mode}>" for direction in ("gather", "scatter") for mode in ("page", "token")}
    others = {f"{direction}_{what}_kernel" for direction in ("gather", "scatter") for what in ("bulk", "coded")}
    assert {k.name for k in kernels} == wide | others | {"copy_units_kernel", "hash_leaves", "fold_keys", "overwrite"}


def test_no_kernel_has_a_stack_or_spills(kernels):
    assert {k.name: k.stack_bytes for k in kernels if k.stack_bytes} == {}
    assert [k.name for k in kernels if re.search(r"\b(LDL|STL)\b", k.sass)] == []


def test_copies_of_whole_lanes_load_and_store_128_bits_of_global_memory(kernels):
    for kernel in kernels:
        if "<" in kernel.name:
            accesses = re.findall(r"\b(LDG|STG)\.E\.128", kernel.sass)
            assert accesses[:4] == ["LDG"] * 4, f"{kernel.name}: it stores before four loads are under way"
            assert accesses.count("STG") >= 4, kernel.name
            assert not re.search(r"\b(LD|ST)\.E\.128", kernel.sass), kernel.name


def test_copies_of_whole_lanes_keep_32_kib_in_flight(kernels):
    assert all(k.bytes_in_flight >= 32 << 10 for k in kernels if "<" in k.name)


def test_a_warp_has_all_of_a_coded_tile_in_flight_and_stores_whole_lanes(kernels):
    """8 raw lanes per thread; of a coded tile 6, besides the head."""
    for kernel in (k for k in kernels if "coded" in k.name):
        gathers = kernel.name.startswith("gather")
        loads, stores = (8, 7) if gathers else (6, 8)
        accesses = re.findall(r"\b(LDG|STG)\.E\.128", kernel.sass)
        assert accesses.count("LDG") >= loads, kernel.name
        assert accesses.count("STG") >= stores, kernel.name
        assert set(accesses[:loads]) == {"LDG"}, kernel.name
        before = kernel.sass[: list(re.finditer(r"\bLDG\.E\.128", kernel.sass))[loads - 1].start()]
        assert "SHFL" not in before, f"{kernel.name}: threads exchange words before all loads are issued"
        assert not re.search(r"\b(LD|ST)\.E\.128", kernel.sass), kernel.name
        assert kernel.bytes_in_flight >= 64 << 10


def test_copies_synchronise_no_block(kernels):
    names = "(gather|scatter)_(coded_)?kernel"
    assert [k.name for k in kernels if re.search(names, k.name) and "BAR." in k.sass] == []


def test_bulk_copies_are_made_by_the_engine_alone(kernels):
    for kernel in (k for k in kernels if "bulk" in k.name):
        if kernel.arch < 90:
            assert not re.search(r"\b(STG|LDG|LD)\b", kernel.sass)
            continue
        assert re.search(r"\bUBLKCP\.S\.G", kernel.sass)
        assert re.search(r"\bUBLKCP\.G\.S", kernel.sass)
        assert re.search(r"\bSYNCS\.\S*TRYWAIT", kernel.sass)
        assert len(re.findall(r"\bLDS\.(128|64)", kernel.sass)) >= 4
        assert not re.search(r"\b(STG|ST)\.E\.128", kernel.sass)


def test_blocks_that_hash_leaves_share_a_multiprocessor(kernels):
    assert next(k for k in kernels if k.name == "hash_leaves").blocks_of_sm >= 2
