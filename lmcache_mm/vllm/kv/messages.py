"""Messages between the scheduler and worker sides of the KV connector."""

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
    """The layout of a worker's pages, and its weights."""

    fingerprint: bytes
    groups: tuple[int, ...]  # numbers of its groups, see Group
    weights: bytes  # their digest at startup, see weights.digest_of


@dataclass
class RecordPages:
    """A record's pages in one block table. Loads skip NULL_BLOCK."""

    table: int
    key: bytes  # of the prefix
    pages: list[int]
    tokens: int


@dataclass
class Load:
    """What one request loads at once."""

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
    """The workers' work in one step."""

    loads: list[Load] = field(default_factory=list)
    saves: list[Save] = field(default_factory=list)
    written: set[int] = field(default_factory=set)  # pages that the step writes, after saves have read them
    look: int | None = None  # workers digest their weights and report the digest under this number


@dataclass
class Handshake(KVConnectorHandshakeMetadata):
    """A worker's layout, reported once, at startup."""

    layout: Layout


@dataclass
class WorkerMetadata(KVConnectorWorkerMetadata):
    """What a worker, or several combined, did since the last report."""

    layouts: dict[int, Layout] = field(default_factory=dict)  # by rank, reported once
    loaded: set[int] = field(default_factory=set)  # serials of loads within a step that have succeeded or failed
    saves: int = 0  # how many have ended
    weights: dict[tuple[int, int], bytes] = field(default_factory=dict)  # digests, by Metadata.look and rank

    def aggregate(self, other: KVConnectorWorkerMetadata) -> WorkerMetadata:
        assert isinstance(other, WorkerMetadata)
        return WorkerMetadata(
            self.layouts | other.layouts,
            self.loaded | other.loaded,
            self.saves + other.saves,
            self.weights | other.weights,
        )
