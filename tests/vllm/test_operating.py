"""What the connectors show in /metrics."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from test_sessions import pytestmark  # noqa: F401

OPERATING = Path(__file__).parent.parent.parent / "examples" / "operating"


def shown(connector: str, *observed: dict[str, object]) -> dict[str, float]:
    """All samples of a connector's metrics, by name, labels and value, of one engine."""
    registry = CollectorRegistry()
    kinds = {
        kind: lambda *, kind=kind, **arguments: kind(**arguments, registry=registry)  # vLLM names all arguments
        for kind in (Counter, Gauge, Histogram)
    }
    config = SimpleNamespace(kv_transfer_config=None, ec_transfer_config=None)
    module = importlib.import_module("lmcache_mm.vllm.metrics")
    made = getattr(module, connector)(config, kinds, ["model_name", "engine"], {0: ["m", "0"]})
    for data in observed:
        made.observe(data, 0)
    lines = [line for line in generate_latest(registry).decode().splitlines() if not line.startswith("#")]
    return {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in lines}


def names_of(samples: dict[str, float]) -> set[str]:
    return {name.partition("{")[0] for name in samples}


def test_what_workers_observe_is_in_the_histograms_of_its_store():
    metrics = importlib.import_module("lmcache_mm.vllm.metrics")
    first, second = metrics.Stats(), metrics.Stats()
    first.add(loaded_tokens=64)
    for stats, seconds in ((first, 0.003), (second, 0.3)):
        stats.observe("shm", "load", seconds, 1 << 20)
        stats.observe("valkey", "load", seconds / 2, 1 << 20)
    first.aggregate(second)
    assert first.reduce() == {
        "loaded_tokens": 64,
        **{"mean_load_seconds(shm)": 0.1515, "mean_load_seconds(valkey)": 0.07575},
        **{"mean_load_bytes(shm)": 1 << 20, "mean_load_bytes(valkey)": 1 << 20},
    }
    data = json.loads(json.dumps(first.take().data))  # as it goes to another process
    assert first.take() is None
    samples = shown("PromMetrics", data)
    assert samples['vllm:lmcache_mm_loaded_tokens_total{engine="0",model_name="m"}'] == 64
    labels = 'engine="0",model_name="m",store="shm"'
    assert samples[f"vllm:lmcache_mm_load_seconds_count{{{labels}}}"] == 2
    assert samples[f"vllm:lmcache_mm_load_seconds_sum{{{labels}}}"] == pytest.approx(0.303)
    assert samples['vllm:lmcache_mm_load_seconds_bucket{engine="0",le="0.005",model_name="m",store="shm"}'] == 1
    assert samples[f"vllm:lmcache_mm_load_bytes_sum{{{labels}}}"] == 2 << 20
    encoder = metrics.EncoderStats()
    encoder.observe("shm", "store", 0.1, 5000)
    assert shown("EncoderPromMetrics", encoder.data)[f"vllm:lmcache_mm_encoder_store_bytes_sum{{{labels}}}"] == 5000


def test_observations_that_nobody_takes_are_bounded():
    metrics = importlib.import_module("lmcache_mm.vllm.metrics")
    stats = metrics.Stats()
    for _ in range(metrics.MOST_OBSERVED + 10):
        stats.observe("shm", "load", 0.1, 1)
    assert len(stats.data["load_seconds"]["shm"]) == metrics.MOST_OBSERVED


def test_what_encoder_workers_count_adds_up():
    messages = importlib.import_module("lmcache_mm.vllm.encoder.messages")
    counts = {"encoder_stored_items": 1, "encoder_store_seconds": {"shm": [0.5]}}
    news = messages.EncoderWorkerMetadata(dict(counts)).aggregate(messages.EncoderWorkerMetadata(dict(counts)))
    assert news.counts == {"encoder_stored_items": 2, "encoder_store_seconds": {"shm": [0.5, 0.5]}}
