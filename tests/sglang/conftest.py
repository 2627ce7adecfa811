"""Backends over stores of all kinds, which are closed and removed after each test."""

from __future__ import annotations

import os
import shutil
import sys
import uuid
from importlib.util import find_spec
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent))
import servers
from lmcache_mm.stores.local.slab_files import shm_directory

if not find_spec("sglang.srt"):
    collect_ignore_glob = ["test_*.py"]  # SGLang has an environment of its own: make test-sglang
# SGLang compiles what hashes pages: once for all runs.
os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(Path(sys.prefix) / "torch_extensions"))
if find_spec("sglang.srt"):
    from sglang.srt.mem_cache.hicache_storage import HiCacheFile

    from hosts import register, start, storage_config, write_model
    from lmcache_mm.sglang import HiCacheBackend

SECRET = "a secret of the deployment"


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("models") / "model")


@pytest.fixture(autouse=True)
def engine(model, monkeypatch):
    monkeypatch.setenv("LMCACHE_MM_SECRET", SECRET)
    return start(model)


@pytest.fixture
def backend_of():
    """A function that makes a backend, to be closed at the end, over a store and pools by name."""
    made = []

    def make(url, pools, options=None, **changes):
        backend = HiCacheBackend(storage_config({"store": url, **(options or {})}, **changes), {})
        made.append(backend)
        return register(backend, pools)

    yield make
    for backend in made:
        backend.close()


@pytest.fixture
def peer_of(tmp_path):
    """SGLang's own backend `file` over the same pools."""

    def make(pools, **changes):
        folder = tmp_path / uuid.uuid4().hex
        folder.mkdir()
        return register(HiCacheFile(storage_config({"file_storage_path": str(folder)}, **changes)), pools)

    return make


@pytest.fixture(scope="session")
def valkey(tmp_path_factory):
    server = servers.valkey(tmp_path_factory.mktemp("valkey"))
    yield server
    server.stop()


@pytest.fixture
def url_of(request, tmp_path):
    """A function that names a new store of a kind."""
    directories = []

    def shm():
        name = f"test-{uuid.uuid4().hex}"
        directories.append(shm_directory(name))
        return f"shm:///{name}?capacity=64MiB"

    def url(kind):
        if kind == "shm":
            return shm()
        if kind == "valkey":
            return request.getfixturevalue("valkey").url
        file = f"file://{tmp_path}/{uuid.uuid4().hex}?capacity=64MiB"
        return {"mem": "mem://?capacity=64MiB", "file": file}.get(kind) or [shm(), file]

    yield url
    for directory in directories:
        shutil.rmtree(directory, ignore_errors=True)
