"""Messages between the scheduler and worker sides of the encoder connector."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

from lmcache_mm.encoder_cache import Packed
from lmcache_mm.vllm.api import ECConnectorMetadata, ECConnectorWorkerMetadata
from lmcache_mm.vllm.metrics import EncoderStats


class OutputKey(NamedTuple):
    """The key of an encoder output in the store, and its owner."""

    key: bytes
    owner: bytes


@dataclass
class EncoderMetadata(ECConnectorMetadata):
    """For one step, by vLLM's identifiers: outputs that workers use instead of encoding (loads), and keys of outputs
    that workers compute and store (saves)."""

    loads: dict[str, Packed] = field(default_factory=dict)
    saves: dict[str, OutputKey] = field(default_factory=dict)


@dataclass
class EncoderWorkerMetadata(ECConnectorWorkerMetadata):
    """What a worker has counted since its last report, as in EncoderStats."""

    counts: dict[str, Any] = field(default_factory=dict)

    def aggregate(self, other: ECConnectorWorkerMetadata) -> EncoderWorkerMetadata:
        assert isinstance(other, EncoderWorkerMetadata)
        return EncoderWorkerMetadata(EncoderStats(self.counts).aggregate(EncoderStats(other.counts)).data)
