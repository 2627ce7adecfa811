"""What tests do with a store of shm: or file:, also in another process."""

import subprocess
import sys
from pathlib import Path

import test_stores
from test_stores import key, payload

MIB = 1 << 20
REST_S = 10  # how long a dead process's reserved slots rest
IN_ANOTHER = f"""
import sys, pathlib
sys.path.insert(0, {str(Path(test_stores.__file__).parent)!r})
from test_stores import *
from lmcache_mm import stores
store = getattr(stores, sys.argv[1]).open(pathlib.Path(sys.argv[2]), None)
"""


def python(code, *arguments):
    """Runs code in another process; returns its output."""
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)], check=False, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def in_another_process(store, code):
    return python(IN_ANOTHER + code, type(store).__name__, store.directory)


def fill(store, first=100, size=100_000, count=12):
    for i in range(first, first + count):
        store.put([key(i)], [payload(i, size)])


def pinned(store, i):
    return store._index.find(key(i), 0)[2]


def overwrite(path, offset, content):
    with open(path, "r+b") as file:
        file.seek(offset)
        file.write(content)


def no_room_is_lost(store):
    """Asserts that the store is empty and all its room is free."""
    assert store._index.check(store._terms(1)) == ""
    store.clear()
    stats = store.stats()
    assert (stats["records"], stats["used_bytes"], stats["pending"], stats["owners"]) == (0, 0, 0, 0)
    return stats["free_bytes"] == stats["capacity_bytes"]
