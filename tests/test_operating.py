"""What operators see: metrics of transfers, of tiers and of `serve`."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
import uuid
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import pytest
import torch
import yaml
from prometheus_client.parser import text_string_to_metric_families

import lmcache_mm as lmc
from lmcache_mm.commands.cli import main, make_parser
from lmcache_mm.stores import kind_of, open_store
from lmcache_mm.transfer import Chunk, Transfer
from test_stores import key, payload

PAGES, PAGE_TOKENS = 8, 4


def new_transfer(store, moved):
    kv = torch.zeros(2, PAGES, PAGE_TOKENS, 16)
    layout = lmc.KVLayout.from_tensors(
        {f"layer{i}": layer for i, layer in enumerate(kv)}, page_tokens=PAGE_TOKENS, page_dim=0, token_dim=1
    )
    return layout, Transfer(layout, store, layout.payload_bytes(4), moved)


@pytest.mark.parametrize("url", ["mem://?capacity=1MiB", "tiered:mem://?capacity=1MiB,mem://?capacity=1MiB"])
def test_a_transfer_tells_what_moved_and_for_how_long(url):
    told = []
    store = open_store(url)
    layout, transfer = new_transfer(store, lambda *one: told.append(one))
    chunks = [Chunk(key(i), torch.tensor([2 * i, 2 * i + 1]), 2 * PAGE_TOKENS) for i in range(3)]
    begun = time.perf_counter()
    job = transfer.store(chunks[:2], b"", early=True)
    time.sleep(0.2)  # the forward pass: no part of what is told
    job.written()
    assert job.result(10) == 4 * PAGE_TOKENS
    assert transfer.load(chunks, b"").result(10) == 2  # the third is not there
    assert transfer.load(chunks[2:], b"").result(10) == 0  # nothing moved
    lasted = time.perf_counter() - begun - 0.2
    transfer.close()
    store.close()
    size = 2 * layout.payload_bytes(2)
    assert [(direction, moved) for direction, _, moved in told] == [("store", size), ("load", size)]
    assert all(0 < seconds <= lasted for _, seconds, _ in told)


def test_tiers_behind_the_first_tell_what_they_took_themselves(tmp_path):
    told = []
    url = [f"mem://?capacity={n}" for n in ("32KiB", "1MiB")]
    with_ages = [url[0], f"file://{tmp_path}/store?capacity=1MiB"]
    assert [kind_of(one) for one in (with_ages, f"tiered:{','.join(url)}", "valkey://host:1")] == [
        "mem",
        "mem",
        "valkey",
    ]
    store = open_store(with_ages, lambda *one: told.append(one))
    for i in range(4):
        store.put([key(i)], [payload(i, 10_000)])
        store.flush()  # before the first tier evicts it
    assert [(kind, direction) for kind, direction, *_ in told] == [("file", "store")] * len(told)
    assert sum(size for *_, size in told) == 40_000
    del told[:]
    buffers = [np.zeros(10_000, np.uint8) for _ in range(5)]
    assert store.get_into([key(i) for i in range(5)], buffers) == [True] * 4 + [False]
    store.close()
    ((kind, direction, seconds, size),) = told  # the first tier has room for three
    assert (kind, direction, size) == ("file", "load", 10_000)
    assert 0 < seconds < 10


@contextmanager
def serving_metrics(url):
    """(process, port of the store, base URL of the metrics)."""
    command = [sys.executable, "-m", "lmcache_mm", "serve", "--store", url]
    command += ["--listen", "127.0.0.1:0", "--metrics", "127.0.0.1:0"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        lent, where = process.stdout.readline(), process.stdout.readline()
        assert "/metrics" in where, process.stderr.read()
        port = int(lent.partition(" is lent at ")[2].partition(",")[0].rpartition(":")[2])
        yield process, port, where.removeprefix("metrics at ").split("/metrics")[0]
    finally:
        process.kill()
        process.communicate()


def fetch(url):
    with urllib.request.urlopen(url, timeout=10) as answer:
        return answer.status, answer.headers["Content-Type"], answer.read().decode()


def samples(text):
    return {
        s.name + "".join(s.labels.values()): s.value for f in text_string_to_metric_families(text) for s in f.samples
    }


@pytest.fixture
def shm(monkeypatch):
    monkeypatch.setenv("LMCACHE_MM_SECRET", "a secret of a deployment")
    url = f"shm:///test-{uuid.uuid4().hex}"
    yield url
    main(["clear", url])


def test_serve_answers_prometheus_and_those_who_ask_whether_it_lives(shm):
    store = open_store(f"{shm}?capacity=8MiB")
    store.put([key(0), key(1)], [payload(0, 50_000), payload(1, 70_000)])
    with serving_metrics(shm) as (process, port, base):
        before = samples(fetch(f"{base}/metrics")[2])
        assert before["lmcache_mm_store_capacity_bytes"] == 8 << 20
        assert (before["lmcache_mm_store_used_bytes"], before["lmcache_mm_store_records"]) == (120_000, 2)
        assert (before["lmcache_mm_store_processes"], before["lmcache_mm_serve_connections"]) == (2, 0)
        reader = open_store(f"peer://127.0.0.1:{port}?timeout=20")
        buffers = [np.zeros(n, np.uint8) for n in (50_000, 70_000, 10)]
        assert reader.get_into([key(0), key(1), key(2)], buffers) == [True, True, False]
        _, kind, text = fetch(f"{base}/metrics")
        after = samples(text)
        assert kind.startswith("text/plain")
        assert after["lmcache_mm_serve_connections"] > 0
        assert (after["lmcache_mm_serve_hits_total"], after["lmcache_mm_serve_misses_total"]) == (2, 1)
        assert after["lmcache_mm_serve_bytes_sum"] == 120_000
        assert 0 < after["lmcache_mm_serve_seconds_sum"] < 20
        assert fetch(f"{base}/healthz")[::2] == (200, "ok\n")
        with pytest.raises(urllib.error.HTTPError, match="404"):
            fetch(f"{base}/keys")
        reader.close()
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0
    store.close()


def test_metrics_that_cannot_be_shown_are_a_sentence(shm, capsys):
    open_store(f"{shm}?capacity=1MiB").close()
    arguments = ["serve", "--store", shm, "--listen", "127.0.0.1:0", "--metrics"]
    assert main([*arguments, "9400"]) == 2
    assert "HOST:PORT" in capsys.readouterr().err
    code = (
        f"import sys; sys.modules['prometheus_client'] = None; from lmcache_mm.commands.cli import main; "
        f"sys.exit(main({[*arguments, '127.0.0.1:0']}))"
    )
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
    assert done.returncode == 2
    assert "pip install -e '.[metrics]'" in done.stderr


def test_healthz_says_what_is_wrong(shm):
    metrics = pytest.importorskip("lmcache_mm.commands.metrics")
    store = open_store(f"{shm}?capacity=1MiB")

    class Server:
        open = True

        def accepts(self):
            return self.open

    figures = metrics._Figures(store, Server())
    assert figures.wrong() == ""
    Server.open = False
    assert figures.wrong() == "no connections are accepted"
    store.close()
    assert figures.wrong().startswith("the store cannot be used: ")


# --- examples/operating

OPERATING = Path(__file__).parent.parent / "examples" / "operating"


def documents(name):
    return list(yaml.safe_load_all((OPERATING / name).read_text()))


SERVICES = documents("compose.yaml")[0]["services"]
KUBERNETES = {(one["kind"], one["metadata"]["name"]): one for one in documents("kubernetes.yaml")}


def pod(name):
    return KUBERNETES["Deployment", name]["spec"]["template"]["spec"]


def containers():
    """Of the pods, by name."""
    return {one["name"]: one for name in ("vllm", "valkey") for one in pod(name)["containers"]}


def stores_of(arguments):
    """URLs that an engine's arguments name."""
    configs = [json.loads(arguments[i + 1]) for i, one in enumerate(arguments) if one.endswith("-transfer-config")]
    assert configs
    return [u for c in configs for u in c[f"{'kv' if 'kv_role' in c else 'ec'}_connector_extra_config"]["store"]]


def test_the_stores_of_the_deployments_open_and_their_servers_are_there(monkeypatch):
    monkeypatch.setenv("LMCACHE_MM_SECRET", "a secret of a deployment")
    ports = {
        one["metadata"]["name"]: one["spec"]["ports"][0] for (kind, _), one in KUBERNETES.items() if kind == "Service"
    }
    lent = {one[one.index("--store") + 1] for one in (SERVICES["metrics"]["command"], containers()["metrics"]["args"])}
    assert lent == {"shm:///vllm"}
    for urls in (stores_of(SERVICES["vllm"]["command"]), stores_of(containers()["vllm"]["args"])):
        for url in urls:
            parts = urlsplit(url)
            if parts.scheme == "shm":
                assert f"shm://{parts.path}" in lent
                name = f"shm:///test-{uuid.uuid4().hex}"
                small = f"{name}?{parts.query}".replace("32GiB", "1MiB")
            else:
                assert parts.hostname in SERVICES
                assert ports[parts.hostname]["port"] == parts.port == 6379  # Valkey's default
                small = url.replace(parts.netloc, "127.0.0.1:1")
            open_store(small).close()
            if parts.scheme == "shm":
                main(["clear", name])


@pytest.mark.parametrize("where", ["compose", "kubernetes"])
def test_the_metrics_are_scraped_where_they_are_answered(where):
    arguments = SERVICES["metrics"]["command"] if where == "compose" else containers()["metrics"]["args"]
    args = make_parser().parse_args(arguments)
    port = int(args.metrics.rpartition(":")[2])
    assert args.run
    if where == "compose":
        assert f"http://127.0.0.1:{port}/healthz" in SERVICES["metrics"]["healthcheck"]["test"][-1]
        assert "http://127.0.0.1:8000/health'" in SERVICES["vllm"]["healthcheck"]["test"][-1]
        (config,) = documents("prometheus.yml")
        targets = {job["static_configs"][0]["targets"][0] for job in config["scrape_configs"]}
        assert targets == {f"metrics:{port}", "vllm:8000"}
        assert SERVICES["metrics"]["ipc"] == "service:vllm"
        (source,) = documents("grafana-datasource.yaml")[0]["datasources"]
        assert urlsplit(source["url"]).hostname in SERVICES
        assert f"127.0.0.1:9090:{urlsplit(source['url']).port}" in SERVICES["prometheus"]["ports"]
    else:
        sidecar = containers()["metrics"]
        assert sidecar["ports"] == [{"name": "metrics", "containerPort": port}]
        assert sidecar["livenessProbe"]["httpGet"] == {"path": "/healthz", "port": "metrics"}
        assert containers()["vllm"]["readinessProbe"]["httpGet"]["port"] == containers()["vllm"]["ports"][0]["name"]
    engine = SERVICES["vllm"]["command"] if where == "compose" else containers()["vllm"]["args"]
    assert "--port=8000" in engine


def test_files_secrets_and_memory_of_the_deployments_are_there():
    (compose,) = documents("compose.yaml")
    for service in SERVICES.values():
        for volume in service.get("volumes", []):
            source = volume.split(":")[0]
            assert source in compose["volumes"] or (OPERATING / source).is_file()
        for name in service.get("secrets", []):
            assert compose["secrets"][name]["file"] == f"./{name}"
            assert name in (OPERATING / ".gitignore").read_text().split()
            assert f"/run/secrets/{name}" in json.dumps(service)
        assert not set(service.get("depends_on", [])) - SERVICES.keys()
        image, build = service.get("image"), service.get("build")
        assert image
        assert not build or (OPERATING / build["context"] / build["dockerfile"]).is_file()
    (provider,) = documents("grafana-dashboards.yaml")[0]["providers"]
    assert any(v.split(":")[1].startswith(provider["options"]["path"]) for v in SERVICES["grafana"]["volumes"])
    for name in ("vllm", "valkey"):
        volumes = {one["name"]: one for one in pod(name)["volumes"]}
        assert volumes["secrets"]["secret"]["defaultMode"] == 0o400  # what lmcache_mm.secret accepts
        assert "shm" not in volumes or volumes["shm"]["emptyDir"]["medium"] == "Memory"
        for container in pod(name)["containers"]:
            for mount in container["volumeMounts"]:
                assert mount["name"] in volumes
        labels = KUBERNETES["Deployment", name]["spec"]["template"]["metadata"]["labels"]
        assert KUBERNETES["Service", name]["spec"]["selector"] == labels
        ports = {port["name"] for container in pod(name)["containers"] for port in container["ports"]}
        assert KUBERNETES["Service", name]["spec"]["ports"][0]["targetPort"] in ports
    said = SERVICES["vllm"]["environment"] | {one["name"]: one["value"] for one in containers()["vllm"]["env"]}
    assert said.keys() == {"LMCACHE_MM_SECRET_FILE", "LMCACHE_MM_VALKEY_PASSWORD_FILE"}


@pytest.mark.parametrize("where", ["compose", "kubernetes"])
def test_their_valkey_starts_with_its_options_and_lets_those_in_who_know_the_password(where, tmp_path, monkeypatch):
    servers = pytest.importorskip("servers")
    pytest.importorskip("glide_sync")
    shell = SERVICES["valkey"]["command"][-1].replace("$$", "$")
    if where == "kubernetes":
        shell = containers()["valkey"]["args"][0]
    (tmp_path / "password").write_text("of a deployment\n".replace(" ", "-"))
    (tmp_path / "password").chmod(0o600)
    port = servers.free_port()
    shell = re.sub(r"/\S+/valkey-password", str(tmp_path / "password"), shell)
    shell = shell.replace("valkey-server -", f"{servers.valkey_program('valkey-server')} - --port {port}")
    monkeypatch.setenv("LMCACHE_MM_SECRET", "a secret of a deployment")
    monkeypatch.setenv("LMCACHE_MM_VALKEY_PASSWORD_FILE", str(tmp_path / "password"))
    server = servers.Server(["sh", "-c", shell], port, tmp_path, f"valkey://127.0.0.1:{port}?timeout=20")
    try:
        store = open_store(server.url)
        store.put([key(1)], [payload(1)])
        buffer = bytearray(len(payload(1)))
        assert store.get_into([key(1)], [buffer]) == [True]
        store.close()
        monkeypatch.setenv("LMCACHE_MM_VALKEY_PASSWORD_FILE", "")
        monkeypatch.setenv("LMCACHE_MM_VALKEY_PASSWORD", "another one")
        with pytest.raises(Exception, match=r"(?i)password|auth|wrong"):
            open_store(server.url)
    finally:
        server.stop()
