"""The codec "split" on KV of a trained model: its ratio and speed beside codecs of bytes, on one thread; caches
with and without it, in turn."""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable, Iterator
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

import bench_peer
import lmcache_mm as lmc
import real_kv
from bench_peer import CONNECTIONS
from bench_remote import servers
from lmcache_mm import _C, codec, operands
from lmcache_mm.commands import cli
from lmcache_mm.stores import open_store
from rivals import byte_codecs

TOKENS, PAGE_TOKENS = 4096, 16
CODECS = [None, "split"]

tls, serve = bench_peer.tls, bench_peer.serve  # fixtures; `serve` starts a server of the store that `lent` gives


@pytest.fixture(scope="module")
def kv() -> list[torch.Tensor]:
    """Pages of a prompt of 4,096 tokens: of each layer, [page, K or V, token, head, size]."""
    pages = TOKENS // PAGE_TOKENS
    layers = [torch.cat([layer] * (TOKENS // real_kv.TOKENS), 1) for layer in real_kv.layers()]
    return [layer.unflatten(1, (pages, PAGE_TOKENS)).transpose(0, 1).contiguous() for layer in layers]


@pytest.fixture
def one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(operands, "THREADS", 1)


@pytest.mark.parametrize("simd", _C.simd_variants())
@pytest.mark.parametrize("direction", ["encode", "decode"])
def test_codec(against, kv, one_thread, direction, simd):
    """As a store of one payload does it, with checksums of raw and coded bytes; the rivals make none."""
    raw = torch.cat([layer.view(-1) for layer in kv]).view(torch.uint8)
    coded, back = codec.encode(raw), torch.empty_like(raw)
    assert coded is not None
    assert codec.decode(back, coded)
    assert torch.equal(back, raw)
    rivals, missing = byte_codecs(raw.numpy())
    peers = {name: rival.encode if direction == "encode" else rival.decode for name, rival in rivals.items()}
    call = (
        partial(codec._copy, _C.gather_coded, raw, coded)
        if direction == "encode"
        else partial(codec._copy, _C.scatter_coded, back, coded)
    )
    _C.use_simd(simd)
    ratios = {name: raw.nbytes / rival.coded_bytes for name, rival in rivals.items()}
    facts = {"codec": direction, "simd": simd, "ratio": raw.nbytes / len(coded), "ratios": ratios, "missing": missing}
    against(call, peers if simd == _C.simd_variants()[0] else {}, 5, bytes=raw.nbytes, **facts)
    _C.use_simd(_C.simd_variants()[0])
    assert torch.equal(back, raw)


class Caches:
    """A cache without and one with the codec, over the same pages and store."""

    def __init__(self, kv: list[torch.Tensor], store: Any) -> None:
        self.kv = kv
        layout = lmc.KVLayout.from_tensors(kv, page_tokens=PAGE_TOKENS, page_dim=0, token_dim=2)
        self.bytes = layout.payload_bytes(TOKENS // PAGE_TOKENS)
        self.block_ids = torch.randperm(TOKENS // PAGE_TOKENS, generator=torch.Generator().manual_seed(0))
        namespace = lmc.Namespace(model="m", dtype=torch.bfloat16)
        self._caches = {name: lmc.KVCache(layout, store, namespace, codec=name) for name in CODECS}
        self._salts = iter(range(10**6))

    def store(self, name: str | None, salt: str | None = None) -> None:
        prompt = lmc.Prompt(torch.arange(TOKENS), salt=salt or f"salt {next(self._salts)}")
        assert self._caches[name].store(prompt, self.block_ids).result() == TOKENS

    def load(self, name: str | None) -> None:
        prompt = lmc.Prompt(torch.arange(TOKENS), salt="loaded")
        assert self._caches[name].retrieve(prompt, self.block_ids, TOKENS).result() == TOKENS

    def check_load(self) -> None:
        before = [layer.clone() for layer in self.kv]
        for name in CODECS:
            for layer in self.kv:
                layer.zero_()
            self.load(name)
            assert all(
                torch.equal(a.view(torch.int16), b.view(torch.int16)) for a, b in zip(self.kv, before, strict=True)
            )


@pytest.fixture(params=["file", "valkey"])
def filled(
    request: pytest.FixtureRequest, kv: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[str, Caches]]:
    """A store with room for a few prompts, which has stored one with and without the codec."""
    monkeypatch.setenv("LMCACHE_MM_SECRET", uuid.uuid4().hex)
    server = servers.valkey(tmp_path) if request.param == "valkey" else None
    folder = os.environ.get("LMCACHE_MM_BENCH_DIR", tmp_path)
    url = server.url if server else f"file://{folder}/codec?capacity={1 << 30}"
    with closing(open_store(url)) as store:
        caches = Caches(kv, store)
        yield request.param, caches
        store.clear()
    if server:
        server.stop()
    else:
        assert cli.main(["clear", url.partition("?")[0]]) == 0


def in_turn(against: Any, caches: Caches, call: Callable[[str | None], None], name: str, direction: str) -> None:
    peers = {"without the codec": lambda: call(None)}
    against(lambda: call("split"), peers, 8, bytes=caches.bytes, coded_store=name, direction=direction)


def test_load_from_a_store(against, filled):
    name, caches = filled
    for codec_name in CODECS:
        caches.store(codec_name, "loaded")
    caches.check_load()
    in_turn(against, caches, caches.load, name, "load")


def test_store_into_a_store(against, filled):
    name, caches = filled
    for _ in range(6 if name == "file" else 1):  # until it is full and evicts
        for codec_name in CODECS:
            caches.store(codec_name)
    in_turn(against, caches, caches.store, name, "store")


@pytest.fixture(scope="module")
def lent(kv: Any) -> Iterator[tuple[Any, str]]:
    url = f"shm:///bench-codec-{os.getpid()}"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LMCACHE_MM_SECRET", bench_peer.SECRET)
        patch.delenv("LMCACHE_MM_SECRET_FILE", raising=False)
        with closing(open_store(f"{url}?capacity=512MiB")) as store:
            caches = Caches(kv, store)
            for codec_name in CODECS:
                caches.store(codec_name, "loaded")
            yield store, url
        assert cli.main(["clear", url]) == 0


@pytest.mark.parametrize("over", ["TLS", "TCP"])
def test_load_from_a_peer(against, serve, kv, tls, over):
    port = serve(*(["--tls", str(tls)] if over == "TLS" else []))
    options = f"timeout=60&connections={CONNECTIONS}" + (f"&tls={tls}" if over == "TLS" else "")
    with closing(open_store(f"peer://127.0.0.1:{port}?{options}")) as store:
        caches = Caches(kv, store)
        caches.check_load()
        in_turn(against, caches, caches.load, f"peer: over {over}", "load")
