"""Shared by the benchmarks of a device: sizes, clocks, and the machine's description.

Three times are measured for every call:
  device_s  the device's time for one call: on a GPU by events, with enough enqueued that it never waits for a launch.
  call_s    how long the call occupies the host while the device is idle.
  total_s   from the call until the host knows that all is done, with the device idle before.
On a CPU the call does the work itself, so only total_s exists.
"""

from __future__ import annotations

import ctypes
import os
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from lmcache_mm import _C
from lmcache_mm.job import Job

ON_GPU = torch.cuda.is_available() and bool(_C.cuda_version)
DEVICE = torch.device("cuda", 0) if ON_GPU else torch.device("cpu")
# Set by scripts/gpu_check.py where the drivers of tests/host_cuda fail: the kernel of bulk copies might hang.
BULK = ON_GPU and os.environ.get("LMCACHE_MM_BENCH_NO_BULK") != "1"


class Sizes(NamedTuple):
    rounds: int  # the most per contestant
    case_s: float  # for the rounds of all contestants, at least 3 each
    warm_s: float  # of compute before anything is timed, to raise the clocks
    cold_bytes: int  # read to replace the L2 cache's contents; several times its size
    batch_bytes: int  # moved by the calls that are timed as one
    payload_bytes: int  # per copy within memory
    run_bytes: tuple[int, ...]
    prompt: int  # tokens in most transfers
    other_prompts: tuple[int, ...]
    most_layers: int
    keys: tuple[int, ...]  # tokens
    pin_bytes: int
    steps: int  # of decoding, beside each kind of transfer
    matrices: int  # per step
    width: int  # of each square matrix


GPU = Sizes(
    *(30, 1.5, 0.5, 256 << 20, 4 << 30, 512 << 20, (256, 2048, 8192, 65_536)),
    *(16_384, (1024, 131_072), 99, (16_384, 32_768, 131_072, 1 << 20), 1 << 30, 500, 32, 8192),
)
CPU = Sizes(
    *(7, 4.0, 0.0, 0, 0, 64 << 20, (256, 2048, 8192, 65_536)),
    *(1024, (16_384,), 99, (16_384, 32_768, 131_072, 1 << 20), 1 << 20, 200, 4, 512),
)
TINY = Sizes(
    *(1, 0.0, 0.0, 1 << 12, 1 << 13, 1 << 13, (256, 2048)),
    *(272, (16,), 2, (700,), 1 << 12, 3, 2, 16),
)
SIZES_NAME = "tiny" if os.environ.get("LMCACHE_MM_BENCH_TINY") == "1" else "gpu" if ON_GPU else "cpu"
SIZES = {"tiny": TINY, "gpu": GPU, "cpu": CPU}[SIZES_NAME]
LEAST_ROUNDS = 3
SPIN_HZ = 2e9  # the assumed rate of the clock that counts spins; a slower clock makes them longer

Work = Callable[[], Any]  # one call; what it returns may have a `wait` or be a Job, or a list of such


def finish(started: Any) -> None:
    for one in started if isinstance(started, (list, tuple)) else [started]:
        if isinstance(one, Job):
            one.result()
        elif hasattr(one, "wait"):
            one.wait()


def synchronize() -> None:
    if ON_GPU:
        torch.cuda.synchronize()


def do(work: Work) -> None:
    finish(work())
    synchronize()


class Clock:
    """How to time on a GPU. "cold", for calls that take microseconds: each call has its own events, and the L2 cache
    holds other data. "stream": events around `times` calls, whose data exceed the L2 cache. Both enqueue a spin first,
    which ends after the last call is enqueued, so that nothing waits for the host. "transfers": as "stream" but without
    a spin, since transfers have their own streams, which at once begin copies that need no pages; this includes the
    first call's launch and the host's last wakeup, some 100 us, little against batch_bytes. "host": for calls that do
    nothing on the device."""

    def __init__(self, how: str) -> None:
        self._how = how
        self._cold = torch.zeros(SIZES.cold_bytes // 4, device=DEVICE)
        self.ahead = True  # whether all spins so far were long enough

    def of_call(self, work: Work) -> tuple[float, float]:
        """call_s and total_s."""
        self._cool()
        synchronize()
        begun = time.perf_counter()
        started = work()
        called = time.perf_counter()
        finish(started)
        synchronize()
        return called - begun, time.perf_counter() - begun

    def of_device(self, work: Work, times: int, call_s: float) -> list[float]:
        """device_s, for each call or as the average of all."""
        spun = torch.cuda.Event()
        synchronize()
        if self._how != "transfers":
            spin_s = 2 * times * (call_s + 50e-6) + 100e-6
            torch.cuda._sleep(int(min(spin_s, 0.2) * SPIN_HZ))
            spun.record()
        around = []
        started = []
        for _ in range(times):
            if self._how == "cold":
                self._cool()
            if self._how == "cold" or not around:
                around.append((torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)))
                around[-1][0].record()
            started.append(work())
            if self._how == "cold":
                around[-1][1].record()
        if self._how != "transfers":
            self.ahead = self.ahead and not spun.query()
        for one in started:
            finish(one)
        if self._how != "cold":
            around[0][1].record()
        synchronize()
        calls = 1 if self._how == "cold" else times
        return [begin.elapsed_time(end) / 1e3 / calls for begin, end in around]

    def _cool(self) -> None:
        """Only reads: written lines would have to be written back during the next measurement."""
        if self._how != "stream":
            self._cold.sum()


def summary(values: list[float]) -> dict[str, float]:
    low, median, high = np.quantile(values, (0.25, 0.5, 0.75))
    return {"median": float(median), "iqr": float(high - low), "rounds": len(values)}


def compare(
    benchmark: Any,
    ours: Mapping[str, Work],
    rivals: Mapping[str, Work],
    how: str,
    missing: Mapping[str, str] | None = None,
    failed: Mapping[str, str] | None = None,
    **facts: Any,
) -> None:
    """Times all of `ours` and all rivals in turn, after the caller has checked their results. "ours" of `ours` is the
    way that users get. facts["bytes"]: moved by one call. missing: why a rival is missing, by name. failed: why one of
    ours is; then the case fails, after the others have been timed."""
    clock = Clock(how)
    works = {**rivals, **ours}
    found: dict[str, dict[str, list[float]]] = {name: {"device_s": [], "call_s": [], "total_s": []} for name in works}
    spent = dict.fromkeys(works, 0.0)
    timed = "device_s" if ON_GPU and how != "host" else "total_s"
    # The bus is slower than memory by at least this factor.
    batch_bytes = SIZES.batch_bytes // (4 if how == "transfers" else 1)
    most = 8 if how == "cold" else max(1, -(-batch_bytes // facts["bytes"]))
    for i in range(SIZES.rounds + 1):
        for name, work in works.items():
            times = found[name]
            if i > LEAST_ROUNDS and spent[name] > SIZES.case_s / len(works):
                continue
            begun = time.monotonic()
            call_s, total_s = clock.of_call(work)
            # A call that is slow because of the host is not repeated for seconds.
            calls = max(1, min(most, int(0.15 / total_s)))
            device_s = clock.of_device(work, calls, call_s) if timed == "device_s" else []
            if i == 0:  # warm-up: memory is allocated, code is loaded
                clock.ahead = True
                continue
            spent[name] += time.monotonic() - begun
            times["device_s"] += device_s
            times["call_s"].append(call_s)
            times["total_s"].append(total_s)
    medians = {name: statistics.median(times[timed]) for name, times in found.items()}
    benchmark.pedantic(lambda: None, rounds=1)  # pytest-benchmark's own clock is the host's
    benchmark.extra_info.update(
        facts,
        device="gpu" if ON_GPU else "cpu",
        device_s=medians.get("ours"),
        others_s={name: medians[name] for name in ours if name != "ours"},
        peers_s={name: medians[name] for name in rivals},
        times={name: {of: summary(values) for of, values in times.items() if values} for name, times in found.items()},
        how=how,
        queue_was_full=clock.ahead if how in ("cold", "stream") else None,
        missing=dict(missing or {}),
        failed=dict(failed or {}),
    )
    assert not failed, failed


# --- The machine


def warm_up() -> None:
    a = torch.randn(SIZES.width, SIZES.width, device=DEVICE)
    begun = time.monotonic()
    while time.monotonic() - begun < SIZES.warm_s:
        a @ a
        synchronize()


SMI = ["driver_version", "pcie.link.gen.current", "pcie.link.width.current", "ecc.mode.current", "power.draw"]
SMI += ["clocks.sm", "clocks.mem", "clocks.max.sm", "clocks_event_reasons.active"]


def state() -> dict[str, Any]:
    """The GPU's current state: what may differ between two GPUs of one name."""
    command = ["nvidia-smi", f"--query-gpu={','.join(SMI)}", "--format=csv,noheader", "--id=0"]
    try:
        told = subprocess.run(command, check=True, capture_output=True, text=True, timeout=20).stdout
        return dict(zip(SMI, told.strip().split(", "), strict=True))
    except Exception as error:
        return {"unknown": repr(error)}


def copy_engines() -> int | str:
    """How many copies can run at once; with fewer than two, loads wait for stores."""
    value = ctypes.c_int()
    try:
        error = ctypes.CDLL("libcuda.so.1").cuDeviceGetAttribute(ctypes.byref(value), 40, 0)
    except OSError as missing:
        return str(missing)
    return value.value if error == 0 else f"error {error}"


def machine() -> dict[str, Any]:
    if not ON_GPU:
        return {}
    device = torch.cuda.get_device_properties(0)
    return {
        "gpu": device.name,
        "l2_bytes": device.L2_cache_size,
        "multiprocessors": device.multi_processor_count,
        "copy_engines": copy_engines(),
        "numa_nodes": len(list(Path("/sys/devices/system/node").glob("node[0-9]*"))),  # pinned memory is on one of them
        "state": state(),
    }
