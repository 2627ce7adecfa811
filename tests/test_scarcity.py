"""What a thread or memory that cannot be had costs: a miss or a dropped put, never an exception, a hang or an abort."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

CXX = os.environ.get("CXX", "c++")

# Preloaded: of the thread that arms it, the n-th start of a thread or allocation in C++ fails.
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
    failing(_C.gather, layout.compiled, False, [chunk], sums.ctypes.data, 5)
    assert torch.equal(out, want) and sums[0] == want_sum % 2**64

def scatter():
    out.copy_(want)
    failing(_C.scatter, layout.compiled, False, [chunk], sums.ctypes.data, 5)
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
