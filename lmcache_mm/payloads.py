"""Fills payloads in the host's memory from pages, and pages from payloads; codes, decodes and verifies them."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from lmcache_mm import codec, ops
from lmcache_mm.copies import Copies, HostCopies, Part, Ring, current_event, current_stream, ending
from lmcache_mm.lane import Work
from lmcache_mm.layout import KVLayout


class Chunk(NamedTuple):
    """The pages of `tokens` consecutive tokens, stored under one key."""

    key: bytes
    pages: torch.Tensor  # block ids, int64 on the host; -1: skip the page
    tokens: int
    repeated: int = 0  # how many of these tokens an earlier chunk of the prompt has too, a tail


class Payloads:
    """The payloads of chunks of at most `largest` bytes, of `layout`. coded: whether those that fit are coded."""

    def __init__(self, layout: KVLayout, largest: int, coded: bool) -> None:
        self._layout, self._coded = layout, coded
        self._loading, self._storing = (
            Ring(layout, largest, urgent) if layout.device.type == "cuda" else HostCopies(layout)
            for urgent in (True, False)
        )
        self._planes = len(layout.planes)
        self._ends = sorted({*layout.planes_until.values(), self._planes})  # where each layer's planes end

    def raw_bytes(self, chunk: Chunk) -> int:
        return self._layout.payload_bytes(len(chunk.pages))

    def coded_bytes(self, chunk: Chunk) -> int | None:
        """The length of the chunk's coded payload; None if it is always stored raw."""
        plane_bytes = len(chunk.pages) * self._layout.page_bytes
        return codec.coded_bytes(self._planes, plane_bytes) if self._coded else None

    def scatter(
        self,
        work: Work,
        behind: Any,
        chunks: list[Chunk],
        payloads: list[torch.Tensor],
        coded: list[bool],
        expected: Sequence[int | None],
        by_layer: list[Copies] | None,
    ) -> list[bool]:
        """Fills pages. Returns whether each payload is what was stored. expected: checksums of raw payloads, None for
        those that the store has verified. by_layer: takes the copies, for callers that wait for layers; copies then go
        layer by layer."""
        ends, on_the_way = self._layers(by_layer is not None)
        checksums = any(coded) or any(one is not None for one in expected)
        sums: list[int] = []

        def scatter(_: int) -> bool:
            parts = self._parts(chunks, payloads, whole_pages=True, coded=coded)
            copies = self._loading.load(parts, ends, checksums and on_the_way, behind, coded if any(coded) else ())
            with ending(copies):
                if by_layer is not None:
                    by_layer.append(copies)
                    work.advance()
                copies.go_on(self._planes)
                sums.extend(copies.wait())
            return True

        work.touch_pages(scatter)
        if checksums and not on_the_way:
            sums = [ops.checksum(payload) for payload in payloads]
        matches = []
        for i, chunk in enumerate(chunks):
            if coded[i]:
                header = payloads[i][: codec.HEADER_BYTES].numpy().tobytes()
                matches.append(header == codec.header(sums[i], self.raw_bytes(chunk)))
            else:
                matches.append(expected[i] is None or sums[i] == expected[i])
        return matches

    def gather(
        self,
        work: Work,
        behind: Any,
        by_layer: bool,
        begun: list[float],
        last: bool,
        chunks: list[Chunk],
        payloads: list[torch.Tensor | None],
        raw: Callable[[list[int]], list[torch.Tensor | None]],
    ) -> tuple[list[torch.Tensor | None], list[int]]:
        """Fills host memory with the chunks' payloads, layer by layer as layers are written if `by_layer`. Returns the
        payloads and their checksums. raw: returns memory for raw payloads of chunks that do not fit their coded ones,
        None for those without room. begun: receives the time at which the first page is read."""
        ends, on_the_way = self._layers(by_layer)
        given = [payload for payload in payloads if payload is not None]
        coded = [self.coded_bytes(chunk) is not None for chunk in chunks]
        parts = self._parts(chunks, given, self._layout.opaque, coded)
        copies = self._storing.store(parts, ends, on_the_way, coded if self._coded else ())
        sums: list[int] = []

        def gather(planes: int) -> bool:
            if not begun:
                begun.append(time.perf_counter())
            written = work.written or (current_event(self._layout.device) if work.early else behind)
            copies.go_on(planes, written)
            if planes < self._planes:
                return False
            if self._coded:  # waits, also for early work: what does not fit is read again
                sums[:] = self._finish_coded(chunks, payloads, coded, copies.wait(), raw)
            elif work.early:  # the caller's thread continues; its stream is ordered after the reads
                copies.order(current_stream(self._layout.device), self._planes)
            else:
                copies.wait()
            return True

        with ending(copies):
            work.touch_pages(gather, last)
            if not self._coded:
                sums = copies.wait()
        return payloads, sums if on_the_way else [ops.checksum(payload) for payload in given]

    def _finish_coded(
        self,
        chunks: list[Chunk],
        payloads: list[torch.Tensor | None],
        coded: list[bool],
        found: list[int],
        raw: Callable[[list[int]], list[torch.Tensor | None]],
    ) -> list[int]:
        """Completes coded payloads, and replaces those that do not fit with raw ones. Returns the checksums."""
        sums, misfits = [], []
        for i, (chunk, payload) in enumerate(zip(chunks, payloads, strict=True)):
            raw_sum, tiles_sum, unfit = found[codec.SUMS * i : codec.SUMS * (i + 1)]
            if unfit:
                misfits.append(i)
            if coded[i] and payload is not None and not unfit:
                raw_sum = codec.put_header(payload, raw_sum, tiles_sum, self.raw_bytes(chunk))
            sums.append(raw_sum)
        if misfits:
            for i, payload in zip(misfits, raw(misfits), strict=True):
                payloads[i] = payload
            there = [(i, payload) for i in misfits if (payload := payloads[i]) is not None]
            again, places = [chunks[i] for i, _ in there], [payload for _, payload in there]
            parts = self._parts(again, places, self._layout.opaque)
            copies = self._storing.store(parts, [self._planes], True)
            copies.go_on(self._planes)
            for (i, _), total in zip(there, copies.wait(), strict=True):
                sums[i] = total
        return sums

    def _parts(
        self, chunks: list[Chunk], payloads: list[torch.Tensor], whole_pages: bool, coded: Sequence[bool] = ()
    ) -> list[Part]:
        """The chunks and payloads as copies take them."""
        size = self._layout.page_tokens
        places = [payload.data_ptr() for payload in payloads]
        for i, behind_header in enumerate(coded):
            places[i] += codec.HEADER_BYTES if behind_header else 0
        return [
            (pages.data_ptr(), True, len(pages), len(pages) * size if whole_pages else tokens, place, 0)
            for (_, pages, tokens, _), place in zip(chunks, places, strict=True)
        ]

    def _layers(self, by_layer: bool) -> tuple[list[int], bool]:
        """Where each layer's planes end (one end for all planes if not `by_layer`); and whether copies can compute
        checksums, which requires that each layer's part of a payload begins at a checksum lane."""
        return (self._ends, self._layout.page_bytes % codec.LANE_BYTES == 0) if by_layer else ([self._planes], True)
