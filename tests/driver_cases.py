"""Cases, and the file of them that drivers read (cases.h)."""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch


class Region(NamedTuple):
    name: str
    before: bytes
    after: bytes
    host: bool = False
    misalignment: int = 0


@dataclass
class Case:
    name: str
    op: str
    fields: dict[str, bytes]
    regions: list[Region] = field(default_factory=list)
    small: bool = False  # small enough for TSan, which is slow


def text(value: str) -> bytes:
    return struct.pack("<I", len(value.encode())) + value.encode()


def u64s(values: Iterable[int]) -> bytes:
    return b"".join(struct.pack("<Q", value) for value in values)


def as_bytes(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def write_cases(path: Path, cases: Sequence[Case]) -> Path:
    with path.open("wb") as out:
        out.write(struct.pack("<I", len(cases)))
        for case in cases:
            out.write(text(case.name) + text(case.op) + struct.pack("<I", len(case.fields)))
            for name, value in case.fields.items():
                out.write(text(name) + struct.pack("<Q", len(value)) + value)
            out.write(struct.pack("<I", len(case.regions)))
            for region in case.regions:
                assert len(region.before) == len(region.after), region.name
                out.write(text(region.name) + struct.pack("<BQQ", region.host, region.misalignment, len(region.before)))
                out.write(region.before + region.after)
    return path
