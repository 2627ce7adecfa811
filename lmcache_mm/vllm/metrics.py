"""What the connector counts: in vLLM's log line and, as vllm:lmcache_mm_*_total, in /metrics."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import Any

from lmcache_mm.vllm.api import KVConnectorPromMetrics, KVConnectorStats

COUNTERS = {
    "queried_tokens": "Tokens of requests that the store was asked for.",
    "hit_tokens": "Tokens that the store had beyond vLLM's own prefix cache.",
    "loaded_tokens": "Tokens whose KV was loaded and verified.",
    "stored_tokens": "Tokens whose KV was handed to the store.",
    "failed_lookups": "Requests that were computed because the store failed or took too long to tell what it has.",
    "failed_loads": "Requests whose load failed and that were computed instead.",
    "failed_stores": "Stores that failed.",
}


@dataclass
class Stats(KVConnectorStats):
    """Counts since they were last taken."""

    def __post_init__(self) -> None:
        self._lock = threading.Lock()

    def add(self, **counts: int) -> None:
        with self._lock:
            for name, count in counts.items():
                self.data[name] = self.data.get(name, 0) + count

    def take(self) -> Stats | None:
        with self._lock:
            taken = dict(self.data)
            self.data.clear()
        return Stats(data=taken) if any(taken.values()) else None

    def reset(self) -> None:
        self.data.clear()

    def aggregate(self, other: KVConnectorStats) -> Stats:
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


class PromMetrics(KVConnectorPromMetrics):
    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._counters = {}
        for name, text in COUNTERS.items():
            counter = self._counter_cls(name=f"vllm:lmcache_mm_{name}", documentation=text, labelnames=self._labelnames)
            self._counters[name] = {
                engine: counter.labels(*values) for engine, values in self.per_engine_labelvalues.items()
            }

    def observe(self, transfer_stats_data: dict[str, Any], engine_idx: int = 0) -> None:
        for name, count in transfer_stats_data.items():
            self._counters[name][engine_idx].inc(count)
