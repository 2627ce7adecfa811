"""What the encoder connector's sides in the scheduler and in the workers tell each other."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

from lmcache_mm.encoder_cache import Packed
from lmcache_mm.vllm.api import ECConnectorMetadata, ECConnectorWorkerMetadata


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
    """What a worker stored since its last report."""

    stored: int = 0
    failed: int = 0

    def aggregate(self, other: ECConnectorWorkerMetadata) -> EncoderWorkerMetadata:
        assert isinstance(other, EncoderWorkerMetadata)
        return EncoderWorkerMetadata(self.stored + other.stored, self.failed + other.failed)
