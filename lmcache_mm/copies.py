"""Copies of chunks between pages and payloads: by the CPU, or through a ring of buffers on a GPU."""

from __future__ import annotations

import mmap
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import cache, partial
from itertools import pairwise
from typing import Any, Protocol, cast

import torch

from lmcache_mm import _C, codec, operands, ops, transfer_paths
from lmcache_mm.layout import KVLayout

RING_BUFFERS, RING_BUFFER_BYTES = 3, 16 << 20  # in GPU memory, per direction
Part = tuple[int, bool, int, int, int, int]  # ids, whether they are int64, pages, tokens, payload, offset: see csrc


class Copies(Protocol):
    """Copies of chunks between pages and payloads, started layer by layer. `behind`: a `current_event`."""

    def go_on(self, planes: int, behind: Any = None) -> None:
        """Starts the copies of the first `planes` planes that have not started, ordered after `behind`. On CUDA, a
        store's copies start only once they make a step. After an exception nothing is in progress."""
        ...

    def order(self, stream: int, planes: int) -> None:
        """Returns when the copies of the first `planes` planes have started, or the job is over. Work that `stream` is
        given after this call runs after them."""
        ...

    def wait(self) -> list[int]:
        """Waits for the copies that have started. Returns the payloads' checksums, if they were requested; RuntimeError
        if not all copies have started."""
        ...


@contextmanager
def ending(copies: Copies) -> Iterator[None]:
    """Waits for the copies before an exception propagates, because the memory that they use is released then."""
    try:
        yield
    except BaseException:
        with suppress(Exception):
            copies.wait()
        raise


class HostCopy:
    """Copies between pages and payloads on the CPU, on the threads that call `go_on`. See `Copies`."""

    def __init__(self, copy_layer: Callable[[int, int], list[int]], ends: list[int]) -> None:
        self._copy_layer, self._layers = copy_layer, list(pairwise([0, *ends]))
        self._sums: list[list[int]] = []  # by layer: checksums of its parts of the payloads, which add up
        self._planes, self._over = 0, False
        self._changed = threading.Condition()

    def go_on(self, planes: int, behind: Any = None) -> None:
        for begin, end in self._layers[len(self._sums) :]:
            if end > planes:
                break
            self._sums.append(self._copy_layer(begin, end))
            with self._changed:
                self._planes = end
                self._changed.notify_all()

    def order(self, stream: int, planes: int) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._planes >= planes or self._over)

    def wait(self) -> list[int]:
        with self._changed:
            self._over = True
            self._changed.notify_all()
        if len(self._sums) < len(self._layers):
            raise RuntimeError(f"it ended at layer {len(self._sums)} of {len(self._layers)}")
        return [ops.checksum_of_parts(of_payload) for of_payload in zip(*self._sums, strict=True)]


class HostCopies:
    """Copies on the CPU. coded: whether each payload is coded (see csrc/tile_codec.h); empty: none is. A store that is
    given it returns codec.SUMS sums per chunk, of which only the first counts for a raw one."""

    def __init__(self, layout: KVLayout) -> None:
        self._layout_of = cache(lambda begin, end: replace(layout, planes=layout.planes[begin:end]))

    def store(self, parts: list[Part], ends: list[int], checksums: bool, coded: Sequence[bool] = ()) -> Copies:
        if coded:
            return HostCopy(partial(self._copy_coded, _C.gather_coded, _C.gather, parts, coded), ends)
        return HostCopy(partial(self._copy, _C.gather, parts, checksums), ends)

    def load(
        self, parts: list[Part], ends: list[int], checksums: bool, behind: Any, coded: Sequence[bool] = ()
    ) -> Copies:
        if coded:
            copy = partial(self._copy_coded, _C.scatter_coded, _C.scatter, parts, coded)
            return HostCopy(lambda begin, end: copy(begin, end)[:: codec.SUMS], ends)
        return HostCopy(partial(self._copy, _C.scatter, parts, checksums), ends)

    def _copy(self, copy: Callable[..., None], parts: list[Part], checksums: bool, begin: int, end: int) -> list[int]:
        """Copies planes [begin, end). Returns the unsigned checksums of the payloads' parts."""
        layout = self._layout_of(begin, end)
        sums = torch.empty(len(parts) if checksums else 0, dtype=torch.uint64)
        of_layer = []
        for ids, wide, count, tokens, payload, _ in parts:
            offset = begin * count * layout.page_bytes
            of_layer.append((ids, wide, count, tokens, payload + offset, offset if checksums else 0))
        copy(layout._compiled, False, of_layer, sums.data_ptr() if checksums else 0, operands.THREADS)
        return cast(list[int], sums.tolist())

    def _copy_coded(
        self,
        copy_coded: Callable[..., None],
        copy: Callable[..., None],
        parts: list[Part],
        coded: Sequence[bool],
        begin: int,
        end: int,
    ) -> list[int]:
        layout = self._layout_of(begin, end)
        sums = torch.zeros(len(parts), codec.SUMS, dtype=torch.uint64)
        of_layer = []
        for (ids, wide, count, tokens, payload, _), is_coded in zip(parts, coded, strict=True):
            plane_bytes = count * layout.page_bytes
            if is_coded:
                at = payload + begin * _C.coded_plane_bytes(plane_bytes)
                of_layer.append((ids, wide, count, tokens, at, begin * plane_bytes))
        made = torch.empty(len(of_layer), codec.SUMS, dtype=torch.uint64)
        copy_coded(layout._compiled, of_layer, made.data_ptr(), operands.THREADS)
        is_coded_chunk = torch.tensor(list(coded), dtype=torch.bool)
        sums.view(torch.int64)[is_coded_chunk] = made.view(torch.int64)
        raw = [part for part, is_coded in zip(parts, coded, strict=True) if not is_coded]
        if raw:
            of_raw = torch.tensor(self._copy(copy, raw, True, begin, end), dtype=torch.uint64)
            sums.view(torch.int64)[~is_coded_chunk, 0] = of_raw.view(torch.int64)
        return cast(list[int], sums.reshape(-1).tolist())


class Ring:
    """Copies between a GPU's pages and pinned memory, in one direction: see csrc/transfer.cu."""

    def __init__(self, layout: KVLayout, largest: int, urgent: bool) -> None:
        self._layout = layout
        buffer_bytes = max(RING_BUFFER_BYTES, whole_pages(largest))
        memory = torch.empty(RING_BUFFERS * buffer_bytes, dtype=torch.uint8, device=layout.device)
        torch.cuda.current_stream(layout.device).synchronize()  # wait for earlier users of this memory
        self.paths = transfer_paths.of_device(layout.device)
        ring = (memory.data_ptr(), buffer_bytes, RING_BUFFERS)
        self._staging = _C.CudaStaging(layout.device.index, *ring, urgent, self.paths.ring_blocks)
        self._memory = memory  # after _staging, so that it is released last

    def store(self, parts: list[Part], ends: list[int], checksums: bool, coded: Sequence[bool] = ()) -> Copies:
        """coded: as in `HostCopies`."""
        least = self.paths.store_fragment_bytes(self._bytes_of(parts))
        blocks = self.paths.store_layer_blocks if len(ends) > 1 else 0
        return self._staging.store(self._layout._compiled, parts, ends, checksums, least, blocks, coded)

    def load(
        self, parts: list[Part], ends: list[int], checksums: bool, behind: Any, coded: Sequence[bool] = ()
    ) -> Copies:
        least = self.paths.load_fragment_bytes(self._bytes_of(parts))
        blocks = self.paths.load_layer_blocks if len(ends) > 1 else 0
        return self._staging.load(self._layout._compiled, parts, ends, checksums, behind, least, blocks, coded)

    def _bytes_of(self, parts: list[Part]) -> int:
        return sum(self._layout.payload_bytes(pages) for _, _, pages, *_ in parts)


def current_stream(device: torch.device) -> int:
    """The handle of the current stream; 0 on the CPU."""
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0


def current_event(device: torch.device) -> Any:
    """An event after the work that the current stream holds now; None on the CPU. RuntimeError if the stream is being
    captured."""
    return _C.CudaEvent(device.index, current_stream(device)) if device.type == "cuda" else None


def whole_pages(size: int) -> int:
    return -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
