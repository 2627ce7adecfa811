"""What operators see: figures of transfers, of tiers and of `serve`."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
import uuid
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from prometheus_client.parser import text_string_to_metric_families

import lmcache_mm as lmc
from lmcache_mm.commands.cli import main
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
    assert job.wait(10) == 4 * PAGE_TOKENS
    assert transfer.load(chunks, b"").wait(10) == 2  # the third is not there
    assert transfer.load(chunks[2:], b"").wait(10) == 0  # nothing moved
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
def serving_figures(url):
    """(process, port of the store, base URL of the figures)."""
    command = [sys.executable, "-m", "lmcache_mm", "serve", "--store", url]
    command += ["--listen", "127.0.0.1:0", "--metrics", "127.0.0.1:0"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        lent, figures = process.stdout.readline(), process.stdout.readline()
        assert "/metrics" in figures, process.stderr.read()
        port = int(lent.partition(" is lent at ")[2].partition(",")[0].rpartition(":")[2])
        yield process, port, figures.removeprefix("figures at ").split("/metrics")[0]
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
    with serving_figures(shm) as (process, port, base):
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


def test_figures_that_cannot_be_shown_are_a_sentence(shm, capsys):
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
    assert "pip install '.[metrics]'" in done.stderr


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
