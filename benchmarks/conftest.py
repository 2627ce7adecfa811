"""Shared by the benchmarks: peers are timed in turn with ours, in the same run.

LMCACHE_MM_BENCH_LINES names a file to which each case is appended when it ends, as one line of JSON, whether it
succeeds or fails. The first and last lines of a process describe the machine."""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest

# Read when torch is loaded: its idle workers would spin for milliseconds on the cores that the next call needs.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch

from device import ON_GPU, SIZES_NAME, machine, warm_up
from lmcache_mm import _C

LINES = os.environ.get("LMCACHE_MM_BENCH_LINES")
# The most informative first, since time on a GPU may run out.
FILES = ("bench_gpu_transfers.py", "bench_gpu_keys.py", "bench_gpu_copies.py", "bench_gpu_interference.py")


@pytest.fixture
def against(benchmark: Any) -> Callable[..., None]:
    """against(ours, {name: peer, ...}, rounds, warm, **facts) times `ours`, and before each round each peer once.

    warm, for short calls: each timed call, ours and the peers', directly follows an untimed call of the same, so that
    none pays for cache misses that another caused. The peers' medians go to extra_info["peers_s"], and `facts` beside
    them. The caller must have checked before that all results are equal.
    """

    def compare(
        ours: Callable[[], Any],
        peers: dict[str, Callable[[], Any]],
        rounds: int = 30,
        warm: bool = False,
        **facts: Any,
    ) -> None:
        times: dict[str, list[float]] = {name: [] for name in peers}

        def time_peers() -> None:
            for name, peer in peers.items():
                if warm:
                    peer()
                begin = time.perf_counter()
                peer()
                times[name].append(time.perf_counter() - begin)
            if warm:
                ours()

        benchmark.pedantic(ours, setup=time_peers, rounds=rounds, iterations=1, warmup_rounds=2)
        benchmark.extra_info["peers_s"] = {name: float(np.median(values[2:])) for name, values in times.items()}
        benchmark.extra_info.update(facts)

    return compare


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: FILES.index(item.path.name) if item.path.name in FILES else -1)


@pytest.fixture(scope="session", autouse=True)
def warm() -> Iterator[None]:
    warm_up()
    write_line({"machine": about() | {"sizes": SIZES_NAME}})
    yield
    write_line({"machine": about() | {"sizes": SIZES_NAME}})  # again, since clocks may have changed


@pytest.fixture(autouse=True)
def on_own_stream() -> Iterator[None]:
    """Runs on its own stream, as engines do; the default stream accepts no batches of copies."""
    with torch.cuda.stream(torch.cuda.Stream()) if ON_GPU else nullcontext():
        yield


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
    report = yield
    if report.when == "call" or report.outcome != "passed":
        benchmark = getattr(item, "funcargs", {}).get("benchmark")
        line = {"name": item.nodeid, "outcome": report.outcome, "seconds": round(report.duration, 2)}
        if report.outcome != "passed":
            line["why"] = str(report.longrepr)[-1000:]
        write_line(line | dict(benchmark.extra_info if benchmark else {}))
    return report


def write_line(line: dict[str, Any]) -> None:
    if LINES:
        with open(LINES, "a") as file:
            file.write(json.dumps(line) + "\n")


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    cpu = machine_info.get("cpu", {})
    machine_info["node"] = ""  # keep the host's name private
    machine_info["lmcache_mm"] = about() | {"cpu": cpu.get("brand_raw", platform.processor())}


def about() -> dict[str, Any]:
    return {
        "cores": len(os.sched_getaffinity(0)),
        "simd": _C.simd_variants(),
        "cuda_build": _C.cuda_version,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "gpu": None,
        **machine(),
    }
