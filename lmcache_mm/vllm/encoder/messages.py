"""What the encoder connector's sides in the scheduler and in the workers tell each other."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

from lmcache_mm.encoder_cache import Packed
from lmcache_mm.vllm.api import ECConnectorMetadata, ECConnectorWorkerMetadata
from lmcache_mm.vllm.metrics import EncoderStats


class OutputKey(NamedTuple):
    """The key that an encoder output is stored under, and its owner."""

    key: bytes
    owner: bytes


@dataclass
class EncoderMetadata(ECConnectorMetadata):
    """For one step, by vLLM's identifiers: outputs that workers use instead of encoding (loads), and the keys of the
    outputs that they compute and store (saves)."""

    loads: dict[str, Packed] = field(default_factory=dict)
    saves: dict[str, OutputKey] = field(default_factory=dict)


@dataclass
class EncoderWorkerMetadata(ECConnectorWorkerMetadata):
    """What a worker counted since its last report, as in EncoderStats."""

    counts: dict[str, Any] = field(default_factory=dict)

    def aggregate(self, other: ECConnectorWorkerMetadata) -> EncoderWorkerMetadata:
        assert isinstance(other, EncoderWorkerMetadata)
        return EncoderWorkerMetadata(EncoderStats(self.counts).aggregate(EncoderStats(other.counts)).data)
