"""lmcache-mm calibrate: finds the fastest way to copy between a GPU and the host, and saves it."""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch

from lmcache_mm import _C, transfer_paths
from lmcache_mm.layout import KVLayout
from lmcache_mm.transfer_paths import Paths

FRAGMENT_BYTES = tuple((16 << 10) << i for i in range(9))  # 16 KiB to 4 MiB
COUNTS = (16, 128, 1024)
MOST_BYTES = 512 << 20
LAYER_BLOCKS = (2, 4, 8, 16)
RING_BLOCKS = (4, 8, 16, 32, 64)
RING_PAGE_BYTES = 32 << 10
LAYERS, LAYER_BYTES = 28, 8 << 20  # about 8,192 tokens of Qwen2-VL-7B
ROUNDS = 9
GAIN = 0.02  # another way must beat the ring by this much, and a ring of fewer blocks may lose as much
CHUNK_BYTES = 8 << 20
BUFFERS, BUFFER_BYTES = 3, 16 << 20
WIDTH = 4096  # of the matrices that compute beside loads multiplies


class Times(NamedTuple):
    """Medians, in seconds, of one transfer."""

    ring: float
    batch: float


class LayerTimes(NamedTuple):
    """Medians, in seconds: a transfer by layers, and a fixed piece of compute concurrent with it."""

    transfer: float
    compute: float


def rows_of(times: Mapping[tuple[int, int], Times]) -> tuple[tuple[int, int], ...]:
    """Rows (count, least fragment bytes) from the times by (count, fragment bytes): with that many fragments a batch
    pays for this length and all longer ones measured. Leaves out rows that follow from smaller counts."""
    rows: list[tuple[int, int]] = []
    for count in sorted({count for count, _ in times}):
        pays = None
        for size in sorted((size for c, size in times if c == count), reverse=True):
            if times[count, size].batch > times[count, size].ring * (1 - GAIN):
                break
            pays = size
        if pays is not None and all(pays < least for _, least in rows):
            rows.append((count, pays))
    return tuple(rows)


def layer_blocks_of(ring: LayerTimes, kernels: Mapping[int, LayerTimes]) -> int:
    """How many blocks of a kernel should do transfers by layers: the fastest number that beats the ring without slowing
    concurrent compute more; 0: use the ring."""
    good = {
        times.transfer: blocks
        for blocks, times in kernels.items()
        if times.transfer < ring.transfer * (1 - GAIN) and times.compute < ring.compute * (1 + GAIN)
    }
    return good[min(good)] if good else 0


def ring_blocks_of(times: Mapping[int, float]) -> int:
    """The fewest blocks of the ring's kernels with which a transfer is about as fast as possible."""
    return min(blocks for blocks, seconds in times.items() if seconds <= min(times.values()) * (1 + GAIN))


class Bench:
    """Transfers of synthetic pages of one GPU."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pages = torch.randint(0, 256, (2 * MOST_BYTES,), dtype=torch.uint8, device=device)
        self._host = torch.empty(MOST_BYTES, dtype=torch.uint8, pin_memory=True)
        self._ring = torch.empty(BUFFERS * BUFFER_BYTES, dtype=torch.uint8, device=device)
        self._staging = {direction: self._new_staging(direction, 0) for direction in ("store", "load")}

    def use_ring_blocks(self, blocks: int) -> None:
        self._staging = {direction: self._new_staging(direction, blocks) for direction in self._staging}

    def _new_staging(self, direction: str, blocks: int) -> _C.CudaStaging:
        ring = (self._ring.data_ptr(), BUFFER_BYTES, BUFFERS)  # one direction at a time
        return _C.CudaStaging(self._device.index, *ring, direction == "load", blocks)

    def _move(
        self, direction: str, layout: KVLayout, parts: list[Any], ends: list[int], least: int, blocks: int = 0
    ) -> list[int]:
        behind = _C.CudaEvent(self._device.index, torch.cuda.current_stream(self._device).cuda_stream)
        if direction == "store":
            job = self._staging[direction].store(layout._compiled, parts, ends, True, least, blocks)
        else:
            job = self._staging[direction].load(layout._compiled, parts, ends, True, behind, least, blocks)
        job.go_on(ends[-1], behind)
        return job.wait()

    def times(self, direction: str, count: int, size: int) -> Times:
        """Times a transfer of `count` fragments, in shuffled order."""
        layout = self._layout(self._pages[: 2 * count * size], size)
        order = torch.randperm(2 * count)[:count]
        chunks = order.split(max(1, CHUNK_BYTES // size))
        parts = []
        at = self._host.data_ptr()
        for ids in chunks:
            parts.append((ids.data_ptr(), True, len(ids), len(ids), at, 0))
            at += len(ids) * size

        def run(least: int) -> list[int]:
            return self._move(direction, layout, parts, [1], least)

        if run(0) != run(1):
            raise RuntimeError(f"calibrate: {direction}: a batch copies different bytes than the ring")
        return Times(*medians([lambda: run(0), lambda: run(1)]))

    def layer_times(self, direction: str, blocks: int) -> LayerTimes:
        """Times a transfer of LAYERS layers, one after another, and concurrent compute. blocks: 0 for the ring."""
        size = 32 << 10
        count = LAYER_BYTES // size
        layout = self._layout(self._pages[: LAYERS * 2 * LAYER_BYTES], size, LAYERS)
        ids = torch.randperm(2 * count)[:count]
        a = torch.randn(WIDTH, WIDTH, device=self._device, dtype=torch.bfloat16)
        compute_stream = torch.cuda.Stream(self._device)
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        compute: list[float] = []

        def move(blocks: int = blocks) -> list[int]:
            part = (ids.data_ptr(), True, count, count, self._host.data_ptr(), 0)
            return self._move(direction, layout, [part], list(range(1, LAYERS + 1)), 0, blocks)

        if move() != move(0):
            raise RuntimeError(f"calibrate: {direction}: {blocks} blocks copy different bytes than the ring")

        def beside() -> None:
            with torch.cuda.stream(compute_stream):
                begin.record()
                for _ in range(16):
                    a @ a
                end.record()
            move()
            end.synchronize()
            compute.append(begin.elapsed_time(end) / 1e3)

        (moved,) = medians([move])
        medians([beside])
        return LayerTimes(moved, statistics.median(compute))

    def _layout(self, pages: torch.Tensor, size: int, layers: int = 1) -> KVLayout:
        return KVLayout.from_tensors(list(pages.view(layers, -1, size)), page_tokens=1, page_dim=0, opaque=True)


def medians(works: list[Callable[[], object]]) -> list[float]:
    """The works' medians in seconds, timed in turn, after one untimed round."""
    times: list[list[float]] = [[] for _ in works]
    for _ in range(ROUNDS + 1):
        for work, of_work in zip(works, times, strict=True):
            torch.cuda.synchronize()
            begun = time.perf_counter()
            work()
            of_work.append(time.perf_counter() - begun)
    return [statistics.median(of_work[1:]) for of_work in times]


def measure(device: torch.device) -> Iterator[str | Paths]:
    """Yields its findings, line by line, and then the choice."""
    bench = Bench(device)
    by_ring_blocks = {}
    count = MOST_BYTES // RING_PAGE_BYTES
    for blocks in RING_BLOCKS:
        bench.use_ring_blocks(blocks)
        seconds = [bench.times(direction, count, RING_PAGE_BYTES).ring for direction in ("store", "load")]
        by_ring_blocks[blocks] = sum(seconds)
        speeds = ", ".join(f"{MOST_BYTES / s / 1e9:5.1f}" for s in seconds)
        yield f"ring of {blocks:2} blocks: store, load {speeds} GB/s"
    ring_blocks = ring_blocks_of(by_ring_blocks)
    bench.use_ring_blocks(ring_blocks)
    rows = {}
    for direction in ("store", "load"):
        times = {}
        for count in COUNTS:
            for size in FRAGMENT_BYTES:
                if count * size > MOST_BYTES:
                    continue
                found = times[count, size] = bench.times(direction, count, size)
                ring, batch = (count * size / seconds / 1e9 for seconds in found)
                fragments = f"{direction:5} {count:5} fragments of {size >> 10:5} KiB"
                yield f"{fragments}: ring {ring:5.1f}, batch {batch:5.1f} GB/s"
        rows[direction] = rows_of(times)
    layer_blocks = []
    for direction in ("store", "load"):
        by_blocks = {blocks: bench.layer_times(direction, blocks) for blocks in (0, *LAYER_BLOCKS)}
        for blocks, found_layers in by_blocks.items():
            speed = LAYERS * LAYER_BYTES / found_layers.transfer / 1e9
            way = f"{direction:5} by layers, {f'{blocks:2} blocks' if blocks else 'ring':9}"
            yield f"{way}: {speed:5.1f} GB/s, compute beside it {found_layers.compute * 1e3:.2f} ms"
        layer_blocks.append(layer_blocks_of(by_blocks.pop(0), by_blocks))
    yield Paths(rows["store"], rows["load"], layer_blocks[0], layer_blocks[1], ring_blocks)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = "Find the fastest way to copy between a GPU and the host, and save it."
    parser.epilog = (
        "This needs a GPU that nothing else uses, 1.2 GiB of its memory, and 0.5 GiB of pinned memory. Processes that "
        "start later use what it has saved. Without it they use defaults."
    )
    parser.add_argument("--device", type=int, default=0, metavar="N", help="the GPU, by its number (default: 0)")
    parser.add_argument("--dry-run", action="store_true", help="measure and print, but save nothing")


def run(args: argparse.Namespace) -> int:
    count, why = _C.cuda_devices() if _C.cuda_version else (0, "this build has CPU operations only")
    if not torch.cuda.is_available() or not 0 <= args.device < count:
        reason = why or f"there are {count} GPUs"
        print(f"lmcache-mm calibrate: GPU {args.device} cannot be used: {reason}", file=sys.stderr)
        return 2
    device = torch.device("cuda", args.device)
    for found in measure(device):
        if isinstance(found, str):
            print(found, flush=True)
        else:
            print(found)
            if not args.dry_run:
                file = transfer_paths.save(found, torch.cuda.get_device_name(device))
                print(f"saved in {file}")
    return 0
