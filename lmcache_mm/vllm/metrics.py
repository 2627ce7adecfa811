"""The connectors' counters and timings: in vLLM's log lines and, as vllm:lmcache_mm_*, in /metrics."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from statistics import fmean
from typing import Any, TypeVar

from lmcache_mm.stores.metered import BYTES, SECONDS
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
    "raw_bytes": "Bytes of KV that was stored, as pages held it.",
    "stored_bytes": "The same as the store has it: less, with a codec.",
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
HISTOGRAMS = {
    "load_seconds": "Seconds from asking for a load until its pages were filled and verified.",
    "load_bytes": "Bytes of a load.",
    "store_seconds": "Seconds from reading the first page of a save until the store had it.",
    "store_bytes": "Bytes of a save.",
}
ENCODER_HISTOGRAMS = {
    "encoder_load_seconds": "Seconds to read an encoder output from the store and verify it.",
    "encoder_load_bytes": "Bytes of an encoder output that was read.",
    "encoder_store_seconds": "Seconds to write an encoder output to the store.",
    "encoder_store_bytes": "Bytes of an encoder output that was written.",
}
OF_TIERS = " store: its kind; behind the first tier, what that tier itself took."
MOST_OBSERVED = 1024  # observations kept per histogram and store until they are taken


class _Counts:
    """Counters, and observations by store, since they were last taken."""

    data: dict[str, Any]
    prefix = ""  # of the histograms' names

    def __post_init__(self) -> None:
        self._lock = threading.Lock()

    def add(self, **counts: Any) -> None:
        """Adds numbers to counters, and {store: [value, ...]} to histograms."""
        with self._lock:
            for name, count in counts.items():
                if isinstance(count, dict):
                    for store, values in count.items():
                        observed = self.data.setdefault(name, {}).setdefault(store, [])
                        observed += values[: MOST_OBSERVED - len(observed)]
                else:
                    self.data[name] = self.data.get(name, 0) + count

    def observe(self, store: str, direction: str, seconds: float, size: int) -> None:
        """Records a load or a store. May be called from any thread."""
        name = f"{self.prefix}{direction}"
        self.add(**{f"{name}_seconds": {store: [seconds]}, f"{name}_bytes": {store: [size]}})

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
        """Counters and means, for the log."""
        reduced: dict[str, int | float] = {}
        for name, value in self.data.items():
            if isinstance(value, dict):
                reduced |= {f"mean_{name}({store})": round(fmean(values), 6) for store, values in value.items()}
            else:
                reduced[name] = value
        return reduced

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
    prefix = "encoder_"


class _Metrics:
    """The metrics in /metrics. vLLM's base class provides their constructors and the label values of every engine."""

    names: dict[str, str]
    histograms: dict[str, str]

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
        self._histograms = {
            name: self._histogram_cls(  # type: ignore[attr-defined]
                name=f"vllm:lmcache_mm_{name}",
                documentation=text + OF_TIERS,
                labelnames=[*self._labelnames, "store"],  # type: ignore[attr-defined]
                buckets=SECONDS if name.endswith("_seconds") else BYTES,
            )
            for name, text in self.histograms.items()
        }

    def observe(self, transfer_stats_data: dict[str, Any], engine_idx: int = 0) -> None:
        for name, count in transfer_stats_data.items():
            if not isinstance(count, dict):
                self._counters[name][engine_idx].inc(count)
                continue
            for store, values in count.items():
                labels = (*self.per_engine_labelvalues[engine_idx], store)  # type: ignore[attr-defined]
                histogram = self._histograms[name].labels(*labels)
                for value in values:
                    histogram.observe(value)


class PromMetrics(_Metrics, KVConnectorPromMetrics):
    names, histograms = COUNTERS, HISTOGRAMS


class EncoderPromMetrics(_Metrics, ECConnectorPromMetrics):
    names, histograms = ENCODER_COUNTERS, ENCODER_HISTOGRAMS
