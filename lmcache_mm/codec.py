"""The codec "split", payload version 2: payloads of bf16 numbers, 22 % shorter and bit for bit the same when restored.

docs/design.md specifies the format. A payload has its coded length or, if its numbers do not fit, its raw length, so a
reader knows by the length whether it is coded.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from lmcache_mm import _C, operands, ops
from lmcache_mm.layout import KVLayout

SPLIT = "split"
HEADER_BYTES = 64
LANE_BYTES = 16  # size of a checksum lane
SUMS = 3  # per chunk: the checksums of its raw payload and of its coded tiles, and whether a tile does not fit


def check_name(codec: str | None) -> None:
    """ValueError for a codec that does not exist."""
    if codec not in (None, SPLIT):
        raise ValueError(f"codec: expected {SPLIT!r} or None, got {codec!r}")


def of_layout(codec: str | None, layout: KVLayout) -> str | None:
    """The codec for payloads of a layout if the user asks for `codec`: None (raw) unless they are bf16 numbers and
    pages and, on a GPU, all addresses, strides and tokens are multiples of 16 bytes. ValueError for a codec that does
    not exist."""
    check_name(codec)
    lengths = [layout.page_bytes]
    if layout.device.type == "cuda":
        lengths += [*layout.planes, layout.page_stride, layout.run_bytes, layout.run_stride, layout.token_bytes]
    if codec is None or layout.spec.partition(";")[0] != "bfloat16" or any(size % LANE_BYTES for size in lengths):
        return None
    return codec


def coded_bytes(planes: int, plane_bytes: int) -> int | None:
    """The length of a coded payload; None if it would not be shorter than the raw payload, which is then stored."""
    size = HEADER_BYTES + planes * _C.coded_plane_bytes(plane_bytes)
    return size if size < planes * plane_bytes else None


def header(checksum: int, raw_bytes: int) -> bytes:
    """The header of a coded payload. `checksum`: of the raw payload."""
    facts = (checksum % 2**64).to_bytes(8, "little") + raw_bytes.to_bytes(8, "little")
    return (b"lmcache_mm" + (2).to_bytes(2, "little") + bytes(4) + facts).ljust(HEADER_BYTES, b"\0")


def put_header(payload: torch.Tensor, raw_sum: int, tiles_sum: int, raw_bytes: int) -> int:
    """Writes a coded payload's header. Returns the coded payload's checksum, signed. raw_sum, tiles_sum: see
    `gather_coded` in csrc/ops.h."""
    payload[:HEADER_BYTES].numpy().data[:] = header(raw_sum, raw_bytes)
    of_header = _C.checksum_part(payload.data_ptr(), HEADER_BYTES, 0, HEADER_BYTES)
    return ops.checksum_of_parts([of_header, tiles_sum])


def encode(raw: torch.Tensor) -> torch.Tensor | None:
    """The coded payload of contiguous bf16 numbers on the CPU, uint8 [n], as one plane; None if it must stay raw."""
    size = coded_bytes(1, len(raw))
    if size is None:
        return None
    coded = torch.empty(size, dtype=torch.uint8)
    sums = _copy(_C.gather_coded, raw, coded)
    if sums[2]:
        return None
    put_header(coded, sums[0], sums[1], len(raw))
    return coded


def decode(raw: torch.Tensor, coded: torch.Tensor) -> bool:
    """Decodes `coded` into `raw`. False: `coded` is damaged, and `raw` holds garbage."""
    raw_sum = _copy(_C.scatter_coded, raw, coded)[0]
    return coded[:HEADER_BYTES].numpy().tobytes() == header(raw_sum, len(raw))


def _copy(copy: Any, raw: torch.Tensor, coded: torch.Tensor) -> Sequence[int]:
    size = len(raw)
    page = _C.PagedCache(
        planes=[raw.data_ptr()],
        num_pages=1,
        page_stride=size,
        page_bytes=size,
        run_bytes=size,
        run_stride=0,
        page_tokens=1,
        token_bytes=size,
    )
    first = torch.zeros(1, dtype=torch.int64)
    sums = torch.empty(SUMS, dtype=torch.uint64)
    chunk = (first.data_ptr(), True, 1, 1, coded.data_ptr() + HEADER_BYTES, 0)
    copy(page, [chunk], sums.data_ptr(), operands.THREADS)
    result: list[int] = sums.tolist()
    return result
