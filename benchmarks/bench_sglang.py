"""Pages between SGLang's host pool and stores, beside SGLang's own backend `file`: `make bench-sglang`.

SGLang's backend `shm` keeps nothing, and its `mmap` is an allocator: `file` is the one that they can be compared with.
"""

from __future__ import annotations

import shutil
import sys
import uuid
from itertools import count
from pathlib import Path

import pytest

pytest.importorskip("sglang.srt", reason="SGLang has an environment of its own: make bench-sglang")
sys.path.insert(0, str(Path(__file__).parent.parent / "tests" / "sglang"))

from sglang.srt.mem_cache.hicache_storage import HiCacheFile, PoolName, PoolTransfer

import hosts
from lmcache_mm.sglang import HiCacheBackend
from lmcache_mm.stores.local.slab_files import shm_directory

PAGES = 32
TOKENS = 64  # of a page
ROUNDS = 8
MEDIA = {"memory": Path("/dev/shm"), "disk": Path.home()}


@pytest.fixture(params=["layer_first", "page_first"])
def pool(request, monkeypatch):
    """Of Qwen2.5-7B: 28 layers of 4 heads of 128, 57,344 bytes per token."""
    monkeypatch.setattr(hosts, "PAGE", TOKENS)
    return hosts.mha(request.param, pages=2 * PAGES + 1, heads=4, width=128, layers=28)


@pytest.fixture(params=MEDIA)
def backends(request, pool, tmp_path, monkeypatch):
    """Ours and SGLang's, on the same medium."""
    hosts.start(hosts.write_model(tmp_path / "model"))
    folder = MEDIA[request.param] / f"bench-sglang-{uuid.uuid4().hex}"
    folder.mkdir()
    in_memory = request.param == "memory"
    url = f"shm:///{folder.name}?capacity=1GiB" if in_memory else f"file://{folder}/ours?capacity=1GiB"
    ours = HiCacheBackend(hosts.storage_config({"store": url}), {})
    theirs = HiCacheFile(hosts.storage_config({"file_storage_path": str(folder / "theirs")}))
    yield [hosts.register(backend, {PoolName.KV: pool}) for backend in (ours, theirs)]
    ours.close()
    shutil.rmtree(folder)
    if in_memory:
        shutil.rmtree(shm_directory(folder.name))


def moved(pool, keys, first):
    indices = hosts.slots(pool, range(first, first + PAGES))
    return [PoolTransfer(name=PoolName.KV, host_indices=indices, keys=keys)]


def facts(pool, request, what):
    size = PAGES * pool.page_size * pool.size_per_token
    layout, medium = request.node.callspec.params["pool"], request.node.callspec.params["backends"]
    return {"bytes": size, "hicache": f"{what}, {layout}, {'shm:' if medium == 'memory' else 'file: on a disk'}"}


@pytest.mark.benchmark(group="SGLang set")
def test_set(against, pool, backends, request):
    """Pages that are not there yet. On a disk, `file` leaves them in the page cache; ours are on the disk."""
    ours, theirs = backends
    hosts.fill(pool, range(PAGES), 1)
    fresh = count()

    def set_in(backend):
        assert all(backend.batch_set_v2(moved(pool, hosts.hashes(PAGES, next(fresh) * PAGES), 0))[PoolName.KV])

    against(lambda: set_in(ours), {"file": lambda: set_in(theirs)}, rounds=ROUNDS, **facts(pool, request, "set"))


@pytest.mark.benchmark(group="SGLang get")
def test_get(against, pool, backends, request):
    """Pages that were stored. On a disk, `file` finds them in the page cache; ours are read from the disk."""
    ours, theirs = backends
    keys = hosts.hashes(PAGES)
    hosts.fill(pool, range(PAGES), 1)
    expected = hosts.pages_of(pool, range(PAGES))

    def get_from(backend):
        assert all(backend.batch_get_v2(moved(pool, keys, PAGES))[PoolName.KV])

    for backend in backends:
        backend.batch_set_v2(moved(pool, keys, 0))
        hosts.fill(pool, range(PAGES, PAGES + 2), 2)
        get_from(backend)
        assert hosts.pages_of(pool, range(PAGES, 2 * PAGES)) == expected
    against(lambda: get_from(ours), {"file": lambda: get_from(theirs)}, rounds=ROUNDS, **facts(pool, request, "get"))
