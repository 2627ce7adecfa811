"""What the KV connector's sides in the scheduler and in the workers tell each other."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

from lmcache_mm.vllm.api import (
    KVConnectorHandshakeMetadata,
    KVConnectorMetadata,
    KVConnectorWorkerMetadata,
)

NULL_BLOCK = 0


class Layout(NamedTuple):
    """What a worker's pages are like, and its weights."""

    fingerprint: bytes
    groups: tuple[int, ...]  # numbers of its groups, see Group
    weights: bytes  # their digest at start, see weights.digest_of


@dataclass
class RecordPages:
    """A record, in pages of one block table: those of NULL_BLOCK are left out of a load."""

    table: int
    key: bytes  # of the prefix
    pages: list[int]
    tokens: int


@dataclass
class Load:
    """What one request loads in one go."""

    serial: int
    request_id: str
    owner: bytes
    records: list[RecordPages]


@dataclass
class Save:
    """What one request stores in one step."""

    owner: bytes
    records: list[RecordPages]


@dataclass
class Metadata(KVConnectorMetadata):
    """One step's work for the workers."""

    loads: list[Load] = field(default_factory=list)
    saves: list[Save] = field(default_factory=list)
    written: set[int] = field(default_factory=set)  # pages that the step writes; saves under way must have read them
    look: int | None = None  # workers digest their weights and report the digest under this number


@dataclass
class Handshake(KVConnectorHandshakeMetadata):
    """A worker's layout, told once, at start."""

    layout: Layout


@dataclass
class WorkerMetadata(KVConnectorWorkerMetadata):
    """What a worker, or several together, did since the last report."""

    layouts: dict[int, Layout] = field(default_factory=dict)  # of ranks, told once
    loaded: set[int] = field(default_factory=set)  # serials of loads within a step that ended, well or not
    saves: int = 0  # that ended
    weights: dict[tuple[int, int], bytes] = field(default_factory=dict)  # digests, by Metadata.look and rank

    def aggregate(self, other: KVConnectorWorkerMetadata) -> WorkerMetadata:
        assert isinstance(other, WorkerMetadata)
        return WorkerMetadata(
            self.layouts | other.layouts,
            self.loaded | other.loaded,
            self.saves + other.saves,
            self.weights | other.weights,
        )
