"""Shared by the benchmarks: peers are timed in turn with what they are compared to, in the same run."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

# Read when torch is loaded: its idle workers would spin for milliseconds on the cores that the next call needs.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch

from lmcache_mm import _C


@pytest.fixture
def against(benchmark: Any) -> Callable[..., None]:
    """against(ours, {name: peer, ...}, rounds, warm, **facts) times `ours`, and before each round each peer once.

    warm: each timed call, ours and the peers', directly follows an untimed one of its own, so that none is charged with
    the cache misses that another caused; for what is short. Medians of the peers go to extra_info["peers_s"], `facts`
    beside them. What is compared must have been checked equal before.
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


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    cpu = machine_info.get("cpu", {})
    machine_info["node"] = ""  # the host's name is nobody's business
    machine_info["lmcache_mm"] = {
        "cpu": cpu.get("brand_raw", platform.processor()),
        "cores": torch.get_num_threads(),
        "simd": _C.simd_variants(),
        "cuda_build": _C.cuda_version,
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
