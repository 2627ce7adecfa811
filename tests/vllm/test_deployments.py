"""What the connectors show in /metrics, and the dashboard and deployments in examples/operating, which name it."""

from __future__ import annotations

import importlib
import importlib.util
import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from lmcache_mm.commands.metrics import COUNTERS, GAUGES, Metrics
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


def exported() -> set[str]:
    """Names of all samples, once everything was observed."""
    metrics = importlib.import_module("lmcache_mm.vllm.metrics")
    kv, encoder = metrics.Stats(), metrics.EncoderStats()
    for stats in (kv, encoder):
        for direction in ("load", "store"):
            stats.observe("shm", direction, 0.1, 1)
    names = names_of(shown("PromMetrics", kv.data)) | names_of(shown("EncoderPromMetrics", encoder.data))
    answering = Metrics(("127.0.0.1", 0))
    store = SimpleNamespace(stats=lambda: dict.fromkeys([*GAUGES, *COUNTERS], 0))
    answering.watch(store, SimpleNamespace(connections=lambda: 0))
    _, _, text = answering._answer("/metrics", "")
    answering.close()
    return names | {re.split(r"[{ ]", line)[0] for line in text.decode().splitlines() if not line.startswith("#")}


def test_the_dashboard_loads_and_asks_for_what_is_exported_and_for_all_of_it():
    dashboard = json.loads((OPERATING / "dashboard.json").read_text())
    expressions = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    asked = {name for one in expressions for name in re.findall(r"(?:vllm:)?lmcache_mm_\w+", one)}
    assert asked - exported() == set()
    whole = {re.sub(r"_(bucket|sum|count)$", "", name) for name in exported() if not name.endswith("_created")}
    assert whole - {re.sub(r"_(bucket|sum|count)$", "", name) for name in asked} == set()
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(dashboard["panels"]) > 10
    places = {(panel["gridPos"]["x"], panel["gridPos"]["y"]) for panel in dashboard["panels"]}
    assert len(places) == len(dashboard["panels"])
    assert all(one.count("(") == one.count(")") for one in expressions)
    variables = {one["name"] for one in dashboard["templating"]["list"]}
    assert {panel["datasource"]["uid"] for panel in dashboard["panels"]} <= {f"${{{name}}}" for name in variables}


def arguments_of_engines() -> list[list[str]]:
    compose = yaml.safe_load((OPERATING / "compose.yaml").read_text())
    kubernetes = list(yaml.safe_load_all((OPERATING / "kubernetes.yaml").read_text()))
    (engine,) = (one for one in kubernetes if (one["kind"], one["metadata"]["name"]) == ("Deployment", "vllm"))
    return [compose["services"]["vllm"]["command"], engine["spec"]["template"]["spec"]["containers"][0]["args"]]


@pytest.mark.parametrize("place", [0, 1], ids=["compose", "kubernetes"])
def test_vllm_and_the_connectors_know_the_options_of_the_deployments(place):
    there = importlib.util.find_spec("vllm.entrypoints.launchers.cli_args")  # in vLLM 0.32
    cli = importlib.import_module(f"vllm.entrypoints.{'launchers' if there else 'common'}.cli_args")
    parser = importlib.import_module("vllm.utils.argparse_utils").FlexibleArgumentParser()
    args = cli.make_arg_parser(parser).parse_args(arguments_of_engines()[place])
    options = importlib.import_module("lmcache_mm.vllm.options")
    connectors = 0
    for name, kind in (("kv", options.Options), ("ec", options.EncoderOptions)):
        config = getattr(args, f"{name}_transfer_config")
        if config is None:
            continue
        connectors += 1
        module = importlib.import_module(getattr(config, f"{name}_connector_module_path"))
        assert hasattr(module, getattr(config, f"{name}_connector"))
        kind.of(dict(getattr(config, f"{name}_connector_extra_config")))
    assert connectors == 2
    assert args.port == 8000
