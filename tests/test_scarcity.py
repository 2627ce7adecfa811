"""A lack of threads or memory costs a miss or a dropped put, never an exception, a hang or an abort."""

from __future__ import annotations

import contextlib
import errno
import json
import mmap
import os
import shutil
import subprocess
import sys
import threading
import uuid
from pathlib import Path

import numpy as np
import pytest
import torch

import lmcache_mm as lmc
from lmcache_mm.secret import Seal
from lmcache_mm.stores import open_store, slab_directory
from lmcache_mm.stores.local import slab
from lmcache_mm.stores.peers.server import Server
from lmcache_mm.stores.remote.remote import RemoteStore
from programs import CXX
from servers import Kept
from test_stores import OWNER, key, payload

# Preloaded: makes the n-th start of a thread or C++ allocation fail in the thread that arms it.
FAIL_NTH = r"""
#include <dlfcn.h>
#include <pthread.h>
#include <cerrno>
#include <cstdlib>
#include <new>
static thread_local long left = 0;
static bool fails() { return left > 0 && --left == 0; }
extern "C" long fail_nth(long n) {  // 0: none. How many were still to come.
  const long was = left;
  left = n;
  return was;
}
void* operator new(std::size_t bytes) {
  void* memory = fails() ? nullptr : std::malloc(bytes ? bytes : 1);
  return memory ? memory : throw std::bad_alloc();
}
extern "C" int pthread_create(pthread_t* thread, const pthread_attr_t* how, void* (*run)(void*), void* argument) {
  if (fails()) return EAGAIN;
  static const auto create = reinterpret_cast<decltype(&pthread_create)>(dlsym(RTLD_NEXT, "pthread_create"));
  return create(thread, how, run, argument);
}
"""

# Every operation of the module on the CPU, with the n-th thing failing, until nothing fails any more.
OPERATIONS = """
import ctypes, json, sys
import numpy as np, torch
from lmcache_mm import Item, KVLayout, _C, ops

fail_nth = ctypes.PyDLL(None).fail_nth
fail_nth.argtypes, fail_nth.restype = [ctypes.c_long], ctypes.c_long
pages = torch.arange(4 * 16 * (1 << 18), dtype=torch.int32).view(4, 16, 1 << 18)  # 64 MiB: worth several threads
layout = KVLayout.from_tensors([pages], page_tokens=16, page_dim=0, token_dim=1)
want = ops.gather_pages(layout, [2, 0, 3, 1])
want_sum = ops.checksum(want)
items = [("image", "a", 3, 300), ("image", "b", 100, 500)]
tokens, cuts = np.arange(3000), np.arange(0, 3001, 100)
keys = ops.prefix_keys(tokens, [Item(i, o, n) for _, i, o, n in items], bytes(32), cuts)
overwritten = ops.apply_mm_hashes_to_token_ids(torch.arange(3000), ["a", "b"], [(3, 300), (100, 500)])
out, ids, sums = torch.empty_like(want), torch.tensor([2, 0, 3, 1]), np.zeros(1, np.uint64)
chunk = (ids.data_ptr(), True, 4, 64, out.data_ptr(), 0)

n, left = 0, 0

def failing(call, *arguments):
    global left
    fail_nth(n)
    try:
        return call(*arguments)
    finally:
        left = fail_nth(0)

def gather():
    out.zero_()
    failing(_C.gather, layout._compiled, False, [chunk], sums.ctypes.data, 5)
    assert torch.equal(out, want) and sums[0] == want_sum % 2**64

def scatter():
    out.copy_(want)
    failing(_C.scatter, layout._compiled, False, [chunk], sums.ctypes.data, 5)
    assert sums[0] == want_sum % 2**64

def copy():
    out.zero_()
    assert failing(_C.copy, out.data_ptr(), want.data_ptr(), out.nbytes, 5) == want_sum
    assert torch.equal(out, want)

def prefix_keys():
    got = torch.empty_like(keys)
    to = (cuts.ctypes.data, len(cuts), got.data_ptr())
    failing(_C.prefix_keys, tokens.ctypes.data, 3000, True, items, bytes(32), *to)
    assert torch.equal(got, keys)

def overwrite():
    got = torch.arange(3000)
    try:
        failing(_C.apply_mm_hashes_to_token_ids, got.data_ptr(), 3000, items)
    except MemoryError:
        assert torch.equal(got, torch.arange(3000)), "written in part"
        raise
    assert torch.equal(got, overwritten)

running = []

def extend():
    if not running:
        running.append(_C.RunningKeys(items, bytes(32)))
    got, before = torch.empty_like(keys), running[0].tokens
    try:
        failing(running[0].extend, tokens.ctypes.data, 3000, True, cuts.ctypes.data, len(cuts), got.data_ptr())
    except MemoryError:
        assert running[0].tokens == before, "appended in part"
        raise
    running.clear()
    assert torch.equal(got, keys)

failed = {}
for operation in (gather, scatter, copy, prefix_keys, overwrite, extend):
    n, left, raised = 0, 0, 0
    while not left:
        n += 1
        try:
            operation()
        except MemoryError:
            raised += 1
    failed[operation.__name__] = (n - 1, raised)
print(json.dumps(failed))
"""


@pytest.mark.skipif(shutil.which(CXX) is None, reason=f"no {CXX}")
def test_any_thread_or_allocation_in_c_plus_plus_may_fail(tmp_path: Path):
    library = tmp_path / "fail_nth.so"
    compiled = [CXX, "-x", "c++", "-std=c++17", "-O1", "-shared", "-fPIC", "-o", library, "-", "-ldl"]
    subprocess.run(compiled, input=FAIL_NTH, text=True, check=True)
    environment = {**os.environ, "LD_PRELOAD": str(library), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", OPERATIONS], env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]
    failed = {name: tuple(counts) for name, counts in json.loads(done.stdout).items()}
    for name in ("gather", "scatter", "copy"):
        places, raised = failed[name]
        assert places > raised + 4, "the four threads, and the memory of each, are done without"
    for name in ("prefix_keys", "overwrite", "extend"):
        assert failed[name][1] == failed[name][0] > 2


# --- In Python


class Scarce:
    """Makes the n-th start of a thread or larger allocation fail, with its real error."""

    def __init__(self, monkeypatch):
        self.failed, self._left = False, 0
        self._lock = threading.Lock()
        torch_says = "[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory: you tried to allocate"
        self._patch(monkeypatch, threading.Thread, "start", RuntimeError("can't start new thread"))
        self._patch(monkeypatch, np, "empty", MemoryError())
        self._patch(monkeypatch, mmap, "mmap", OSError(errno.ENOMEM, "Cannot allocate memory"))
        for name in ("empty", "zeros"):
            self._patch(monkeypatch, torch, name, RuntimeError(torch_says))

    def _patch(self, monkeypatch, module, name, error):
        real = getattr(module, name)

        def fails_or_does(*arguments, **options):
            with self._lock:
                self._left -= 1
                fails = self._left == 0
                self.failed |= fails
            if fails:
                raise error
            return real(*arguments, **options)

        monkeypatch.setattr(module, name, fails_or_does)

    def fail(self, n):
        """n: 0 for none."""
        self.failed, self._left = False, n


def used(store, by_layers=(False, True)):
    """Uses a store and the caches above it. Returns what was found."""
    found = []
    store.put([key(1), key(2)], [payload(1, 300_000), payload(2)], OWNER)
    store.flush()
    found.append(store.contains([key(1)]) == [True])
    buffer = bytearray(300_000)
    hit = store.get_into([key(1)], [buffer], OWNER) == [True]
    assert not hit or buffer == payload(1, 300_000)
    found.append(hit)
    pages = torch.arange(16 * 4 * 100, dtype=torch.float32).view(16, 4, 100)
    want = pages.clone()
    layout = lmc.KVLayout.from_tensors([pages], page_tokens=4, page_dim=0, token_dim=1)
    prompt = lmc.Prompt(range(60), salt="ours")
    try:
        cache = lmc.KVCache(layout, store, lmc.Namespace(model="m"), 16)
    except (RuntimeError, MemoryError, OSError):
        return found
    for by_layer in by_layers:
        job = cache.store(prompt, range(16), by_layer)
        if by_layer:
            job.layer_written("0", 10)
        job.result(20)
        store.flush()
        match = cache.match(prompt)
        pages.zero_()
        restored = cache.retrieve(prompt, range(16), by_layer=by_layer).result(20)
        assert torch.equal(pages.view(64, -1)[:restored], want.view(64, -1)[:restored])
        pages.copy_(want)
        found += [match == 60, restored == 60]
        cache.forget("ours")
    cache.close()
    items = lmc.EncoderCache(store, lmc.Namespace(model="m"))
    items.save("a", want)
    store.flush()
    loaded = items.load("a")
    assert loaded is None or torch.equal(loaded, want)
    found.append(loaded is not None)
    store.delete([key(1), key(2)])
    assert store.contains([key(1), key(2)]) == [False, False]
    return found


class Opened:
    def __init__(self, kind, folder):
        self.kind, self.folder = kind, folder

    def __call__(self):
        if self.kind == "remote":
            kept = {}  # the server's records, shared by all connections
            return RemoteStore("kept", lambda: Kept(kept), Seal(b"a secret of a deployment"), 20, 2, 100)
        shm = f"shm:///{self.folder.name}?capacity=4MiB"
        urls = {"mem": "mem://?capacity=4MiB", "shm": shm, "file": f"file://{self.folder}/s?capacity=4MiB"}
        named = [urls[one] for one in self.kind.split(",")]
        return open_store(named if len(named) > 1 else named[0])


@pytest.mark.parametrize("kind", ["remote", "mem,file", "shm,mem"])
def test_any_thread_or_piece_of_memory_may_be_lacking_in_python(kind, tmp_path, monkeypatch):
    folder = tmp_path / f"test-{uuid.uuid4().hex}"
    folder.mkdir()
    opened = Opened(kind, folder)
    scarce = Scarce(monkeypatch)
    n, refused, failed = 0, 0, True
    others = set(slab._open)
    while failed:
        n += 1
        scarce.fail(n)
        try:
            store = opened()
        except (RuntimeError, OSError, MemoryError):
            assert scarce.failed
            refused += 1
            continue
        used(store)
        failed = scarce.failed
        scarce.fail(0)
        assert all(used(store, by_layers=[n % 2 == 0])), f"it does not work again after the {n}-th"
        store.close()
        assert set(slab._open) == others
    assert n > refused + 5
    if "shm" in kind:
        assert slab.remove(slab_directory(f"shm:///{folder.name}")[1])


def test_a_peer_without_threads_is_missed_and_not_left_alone_for_it(monkeypatch):
    url = f"shm:///test-{uuid.uuid4().hex}?capacity=16MiB"
    monkeypatch.setenv("LMCACHE_MM_SECRET", "a secret of a deployment")
    seal = Seal(b"a secret of a deployment")
    with (
        contextlib.closing(open_store(url)) as lent,
        contextlib.closing(Server(lent, ("127.0.0.1", 0), seal, None)) as s,
    ):
        lent.put([key(1)], [payload(1)])
        start, failures = threading.Thread.start, []

        def fails_for_readers(thread):
            if thread.name.startswith("lmcache_mm peer") and failures:
                failures.pop()
                raise RuntimeError("can't start new thread")
            start(thread)

        monkeypatch.setattr(threading.Thread, "start", fails_for_readers)
        for attempts in (1, 2, 5):
            with contextlib.closing(open_store(f"peer://127.0.0.1:{s.address[1]}?timeout=20")) as reader:
                failures[:] = [True] * attempts
                for _ in range(attempts):
                    assert reader.get_into([key(1)], [bytearray(100)]) in ([False], [True])
                assert reader.get_into([key(1)], [bytearray(100)]) == [True]
                assert reader.stats()["errors"] == 0
    assert slab.remove(slab_directory(url)[1])
