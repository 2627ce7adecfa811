"""How much transfers slow decoding down: in the process that transfers, as in an engine's worker, and in another
process, whose kernels take turns with the transfers' kernels instead of running concurrently.

A decoding step reads its weights once, so that memory bounds it, and is a CUDA graph, so that the host does not.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from functools import cache
from itertools import pairwise
from multiprocessing import get_context
from typing import Any

import numpy as np
import pytest
import torch

from bench_gpu_transfers import Pages, one_copy, rivals_of, transfers
from device import BULK, DEVICE, ON_GPU, SIZES, SIZES_NAME, Work, do, finish, synchronize, warm_up

MODEL = "Qwen2-VL-7B"
ROWS = 32  # sequences decoded at once
AHEAD = 8  # steps enqueued before the first of them ends


class Decoding:
    def __init__(self) -> None:
        dtype = torch.bfloat16 if ON_GPU else torch.float32
        shape = (SIZES.matrices, SIZES.width, SIZES.width)
        self._weights = torch.randn(shape, device=DEVICE, dtype=dtype) * SIZES.width**-0.5
        self._x = torch.randn(ROWS, SIZES.width, device=DEVICE, dtype=dtype)
        self.bytes = self._weights.nbytes
        self._step: Callable[[], Any] = self._compute
        if ON_GPU:
            self._stream = torch.cuda.Stream()
            with torch.cuda.stream(self._stream):
                self._compute()  # lets its libraries make their workspaces
            synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=self._stream):
                self._compute()
            self._step = graph.replay

    def _compute(self) -> torch.Tensor:
        x = self._x
        for weights in self._weights:
            x = x @ weights
        return x

    def steps(self, count: int) -> dict[str, Any]:
        """The seconds of each step, on a GPU between events on its stream; and how many began late because the host had
        not enqueued them in time: those say nothing about the device."""
        if not ON_GPU:
            ends = [time.perf_counter()]
            for _ in range(count):
                self._step()
                ends.append(time.perf_counter())
            return {"steps_s": np.diff(ends).tolist(), "late": 0}
        events = [torch.cuda.Event(enable_timing=True) for _ in range(count + 1)]
        late = 0
        with torch.cuda.stream(self._stream):
            events[0].record()
            for i in range(count):
                if i >= AHEAD:
                    events[i - AHEAD].synchronize()
                late += i > 0 and events[i].query()
                self._step()
                events[i + 1].record()
            events[count].synchronize()
        return {"steps_s": [a.elapsed_time(b) / 1e3 for a, b in pairwise(events)], "late": late}


@cache
def decoding() -> Decoding:
    return Decoding()


def decode(count: int) -> dict[str, Any]:
    """Runs on a thread, or in another process, which has its own Decoding."""
    return decoding().steps(count) | {"bytes_of_step": decoding().bytes}


@cache
def kinds_of_transfers() -> tuple[dict[str, tuple[Work, int]], dict[str, str]]:
    """All kinds of transfers, with the bytes of one transfer; and the missing kinds."""
    pages, others = Pages(MODEL, SIZES.prompt), Pages(MODEL, SIZES.prompt)
    kinds: dict[str, tuple[Work, int]] = {}
    missing = {}
    by_direction = {}
    for direction, of in (("store", pages), ("load", others)):
        found = rivals_of(of, direction, MODEL)
        works = one_copy(of, direction) | found.works | transfers(of, direction, (2, 4, 8, 16))
        by_direction[direction] = works
        kinds |= {f"{direction}: {name}": (work, pages.bytes) for name, work in works.items()}
        missing |= {f"{direction}: {name}": why for name, why in found.missing.items()}
    for name in by_direction["store"].keys() & by_direction["load"]:
        both = [by_direction[direction][name] for direction in ("load", "store")]
        kinds[f"both: {name}"] = (lambda both=both: [work() for work in both], 2 * pages.bytes)
    return kinds, missing


BUS = "one DMA" if ON_GPU else "memcpy"
WAYS = ["ring", "batch"] if ON_GPU else ["ours"]
BLOCKS = [f"{d}: {n} blocks" for d in ("store", "load") for n in (2, 4, 8, 16)] if BULK else []
RIVALS = ["Triton", "bulk copies by 8 blocks", "LMCache straight"] if ON_GPU else []
OURS = [f"{direction}: {way}" for direction in ("store", "load", "both") for way in (BUS, *WAYS)]
KINDS = ["nothing", *OURS, *BLOCKS, *(f"{d}: {r}" for r in RIVALS for d in ("store", "load")), "nothing again"]
# For an engine while another process transfers: the ways that differ most.
KINDS_ELSEWHERE = ["nothing", *(f"both: {way}" for way in (BUS, *WAYS)), *BLOCKS[1::4], "nothing again"]


def measure(benchmark: Any, executor: Executor, where: str, kind: str) -> None:
    benchmark.pedantic(lambda: None, rounds=1)
    benchmark.extra_info.update(gpu="interference", device="gpu" if ON_GPU else "cpu", where=where, beside=kind)
    kinds, missing = kinds_of_transfers()
    if kind in missing:
        benchmark.extra_info.update(missing={kind: missing[kind]})
        pytest.skip(f"{kind}: {missing[kind]}")
    work, size = (None, 0) if kind in ("nothing", "nothing again") else kinds[kind]
    if work:
        do(work)  # so that the first step runs beside transfers
    moved, longest_s = 0, 0.0
    begun = time.perf_counter()
    steps = executor.submit(decode, SIZES.steps)
    while work and not steps.done():
        one = time.perf_counter()
        finish(work())
        if ON_GPU:
            torch.cuda.current_stream().synchronize()  # not the whole device, where decoding continues
        longest_s = max(longest_s, time.perf_counter() - one)
        moved += size
    found = steps.result()
    seconds = time.perf_counter() - begun
    assert moved or not work or SIZES_NAME == "tiny", "all steps ended before one transfer"
    of_step = found.pop("steps_s")
    benchmark.extra_info.update(
        found,
        steps=len(of_step),
        median_s=statistics.median(of_step),
        p99_s_of_step=float(np.quantile(of_step, 0.99)),
        transferred_bytes_per_s=moved / seconds,
        longest_transfer_s=longest_s,
    )


def ready(executor: Executor) -> Iterator[Executor]:
    with executor:
        executor.submit(decode, AHEAD).result()
        yield executor


@pytest.fixture(scope="module")
def here() -> Iterator[Executor]:
    yield from ready(ThreadPoolExecutor(1))


@pytest.fixture(scope="module")
def elsewhere() -> Iterator[Executor]:
    yield from ready(ProcessPoolExecutor(1, get_context("spawn"), warm_up))


@pytest.mark.parametrize("kind", KINDS)
def test_interference(benchmark, here, kind):
    """The kind "nothing again" shows the noise."""
    measure(benchmark, here, "this process", kind)


@pytest.mark.parametrize("kind", KINDS_ELSEWHERE)
def test_interference_with_another_process(benchmark, elsewhere, kind):
    measure(benchmark, elsewhere, "another process", kind)
