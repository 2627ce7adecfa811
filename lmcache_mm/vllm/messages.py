"""What the connector's side in the scheduler and its sides in the workers tell each other."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from lmcache_mm.vllm.api import KVConnectorHandshakeMetadata, KVConnectorMetadata, KVConnectorWorkerMetadata

NULL_BLOCK = 0


@dataclass
class RecordPages:
    """A record of one group, in pages: those of NULL_BLOCK are left out of a load."""

    group: int
    key: bytes  # of the prefix
    pages: list[int]
    tokens: int


@dataclass
class Load:
    """What one request loads in one go."""

    request_id: str
    owner: bytes
    records: list[RecordPages]


@dataclass
class Save:
    """What one request stores in one step."""

    request_id: str
    owner: bytes
    records: list[RecordPages]


@dataclass
class Metadata(KVConnectorMetadata):
    """One step's work for the workers."""

    loads: list[Load] = field(default_factory=list)
    saves: list[Save] = field(default_factory=list)


@dataclass
class Handshake(KVConnectorHandshakeMetadata):
    """A worker's layout, told once, at start."""

    fingerprint: bytes


@dataclass
class WorkerMetadata(KVConnectorWorkerMetadata):
    """What a worker did since it last told, or several workers together."""

    fingerprints: dict[int, bytes] = field(default_factory=dict)  # of ranks' layouts, told once
    loaded: set[str] = field(default_factory=set)  # requests whose synchronous load ended, well or not
    saves: int = 0  # that ended
    stored: Counter[bytes] = field(default_factory=Counter)  # prefix keys: how many ranks stored all their records
    dropped: set[bytes] = field(default_factory=set)  # prefix keys that some rank did not

    def aggregate(self, other: KVConnectorWorkerMetadata) -> WorkerMetadata:
        assert isinstance(other, WorkerMetadata)
        return WorkerMetadata(
            self.fingerprints | other.fingerprints,
            self.loaded | other.loaded,
            self.saves + other.saves,
            self.stored + other.stored,
            self.dropped | other.dropped,
        )
