"""What the connectors count: in vLLM's log lines and, as vllm:lmcache_mm_*_total, in /metrics."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import Any, TypeVar

from lmcache_mm.vllm.api import (
    ECConnectorPromMetrics,
    ECConnectorStats,
    KVConnectorPromMetrics,
    KVConnectorStats,
)

S = TypeVar("S", bound="_Counts")

COUNTERS = {
    "queried_tokens": "Tokens of requests that were looked up in the store.",
    "hit_tokens": "Tokens found in the store, beyond what vLLM's own prefix cache had.",
    "loaded_tokens": "Tokens whose KV was loaded and verified.",
    "stored_tokens": "Tokens whose KV was stored.",
    "broken_promises": "Requests that stopped waiting because what another engine promised did not arrive in time.",
    "failed_lookups": "Requests that were computed because a lookup in the store failed or took too long.",
    "failed_loads": "Requests that were computed because their load failed.",
    "failed_stores": "Saves that failed, or were dropped because the store was too slow.",
}
ENCODER_COUNTERS = {
    "encoder_queried_items": "Images, videos and audio whose encoder output was looked up in the store.",
    "encoder_hit_items": "Images, videos and audio whose encoder output was found in the store and verified.",
    "encoder_loaded_items": "Images, videos and audio that were not encoded because the store had the output.",
    "encoder_stored_items": "Encoder outputs that were stored.",
    "encoder_broken_promises": "Requests whose items were encoded because a promised output did not come in time.",
    "encoder_failed_lookups": "Lookups of encoder outputs that failed or took too long; the items were encoded.",
    "encoder_failed_stores": "Encoder outputs that could not be stored.",
}


class _Counts:
    """Counts since they were last taken."""

    data: dict[str, Any]

    def __post_init__(self) -> None:
        self._lock = threading.Lock()

    def add(self, **counts: int) -> None:
        with self._lock:
            for name, count in counts.items():
                self.data[name] = self.data.get(name, 0) + count

    def take(self: S) -> S | None:
        with self._lock:
            taken = dict(self.data)
            self.data.clear()
        return type(self)(data=taken) if any(taken.values()) else None  # type: ignore[call-arg]

    def reset(self) -> None:
        self.data.clear()

    def aggregate(self: S, other: Any) -> S:
        self.add(**other.data)
        return self

    def reduce(self) -> dict[str, int | float]:
        return dict(self.data)

    def is_empty(self) -> bool:
        return not any(self.data.values())

    def __getstate__(self) -> dict[str, Any]:
        return {"data": self.data}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(data=state["data"])  # type: ignore[misc]


@dataclass
class Stats(_Counts, KVConnectorStats):
    pass


@dataclass
class EncoderStats(_Counts, ECConnectorStats):
    pass


class _Counters:
    """In /metrics. Of vLLM's base class: how it makes counters, and the label values of every engine."""

    names: dict[str, str]

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._counters: dict[str, dict[int, Any]] = {}
        for name, text in self.names.items():
            counter = self._counter_cls(  # type: ignore[attr-defined]
                name=f"vllm:lmcache_mm_{name}",
                documentation=text,
                labelnames=self._labelnames,  # type: ignore[attr-defined]
            )
            engines = self.per_engine_labelvalues.items()  # type: ignore[attr-defined]
            self._counters[name] = {engine: counter.labels(*values) for engine, values in engines}

    def observe(self, transfer_stats_data: dict[str, Any], engine_idx: int = 0) -> None:
        for name, count in transfer_stats_data.items():
            self._counters[name][engine_idx].inc(count)


class PromMetrics(_Counters, KVConnectorPromMetrics):
    names = COUNTERS


class EncoderPromMetrics(_Counters, ECConnectorPromMetrics):
    names = ENCODER_COUNTERS
