"""The directories of shm: and file: stores: made, refused and removed."""

import contextlib
import gc
import os
import struct
import subprocess
import sys
import time

import pytest

from lmcache_mm.stores.local import slab, slab_files
from lmcache_mm.stores.local.shm import ShmStore
from slabs import IN_ANOTHER, MIB, fill, in_another_process, no_room_is_lost, overwrite, python
from test_stores import get, key, payload


def test_a_directory_that_holds_other_things_is_left_alone(kind, directory):
    directory.mkdir(mode=0o700)
    (directory / "index").mkdir()
    (directory / "index" / "precious").write_text("x")
    (directory / "checkpoint.pt").write_text("y")
    for refused in (lambda: kind.open(directory, MIB), lambda: slab.remove(directory)):
        with pytest.raises(ValueError, match=r"expected a directory of its own, .* also holds 'checkpoint.pt'"):
            refused()
    assert sorted(path.name for path in directory.rglob("*")) == ["checkpoint.pt", "index", "precious"]


def test_one_store_under_two_names_is_refused_and_the_first_lives_on(kind, directory, tmp_path):
    store = kind.open(directory, MIB)
    store.put([key(1)], [payload(1)])
    other = tmp_path / "other"
    directory.rename(other)
    with pytest.raises(ValueError, match="is open in this process under another name"):
        kind.open(other, MIB)
    assert slab.remove(other) is False
    assert slab.locked_by_another(store._lock_fd, store._row) is False
    assert python(IN_ANOTHER + "print(store.stats()['processes'])", kind.__name__, other) == "2"
    other.rename(directory)
    assert get(store, 1) == payload(1)


def test_an_open_that_fails_late_leaves_nothing_open(kind, directory, monkeypatch):
    def fail(self):
        raise OSError("no")

    with monkeypatch.context() as patch:
        patch.setattr(kind, "_open_slab", fail)
        with pytest.raises(OSError, match="no"):
            kind.open(directory, MIB)
    assert in_another_process(kind.open(directory, MIB), "print(store.stats()['processes'])") == "2"


def version_3(table):
    """Writes a later version's header: every version promises this check of the first 64 bytes."""
    words = bytearray(table.read_bytes()[:64])
    words[8] = 3
    check = 0x6C6D636D6D203200
    for word in struct.unpack("<8Q", words):
        check = (check ^ word) * 0x9E3779B97F4A7C15 % 2**64
        check ^= check >> 29
    overwrite(table, 0, bytes(words) + struct.pack("<Q", check))


@pytest.mark.parametrize(
    "damage, error, text",
    [
        (lambda d: os.truncate(d / "slab", MIB - 1), ValueError, "slab.* has changed its size"),
        (lambda d: (d / "index").mkdir(), ValueError, "has version 1, expected 2; remove it"),
        (lambda d: version_3(d / "table"), ValueError, "has version 3, expected 2; remove it"),
        (lambda d: os.chmod(d, 0o755), PermissionError, "expected a directory of user .* with mode 0700"),
        (lambda d: os.chmod(d / "slab", 0o644), PermissionError, "expected a file of this user with mode 0600"),
        (lambda d: os.chmod(d / "lock", 0o644), PermissionError, "expected a file of this user with mode 0600"),
        (lambda d: (d / "slab").symlink_to((d / "slab").rename(d.parent / "x")), OSError, "symbolic link"),
    ],
    ids=["slab", "version 1", "version 3", "directory mode", "slab mode", "lock mode", "link"],
)
def test_what_is_damaged_or_not_the_users_alone_is_refused_with_a_reason(kind, directory, damage, error, text):
    kind.open(directory, MIB).close()
    damage(directory)
    with pytest.raises(error, match=text):
        kind.open(directory, MIB)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
@pytest.mark.parametrize("name", [".", "table", "slab", "lock"])
def test_another_users_files_are_refused(kind, directory, name):
    kind.open(directory, MIB).close()
    os.chown(directory / name, 4242, 4242)
    with pytest.raises(PermissionError, match=r"expected a (file|directory) of"):
        kind.open(directory, MIB)


def test_a_store_whose_making_was_cut_short_is_made_anew(kind, directory, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", interrupted)
        with pytest.raises(KeyboardInterrupt):
            kind.open(directory, MIB)
    with pytest.raises(ValueError, match=r"there is no store in .* yet: .* adding .capacity=8GiB"):
        kind.open(directory, None)
    store = kind.open(directory, MIB)
    fill(store)
    assert no_room_is_lost(store)


def test_a_store_is_removed_only_when_nobody_has_it_open(kind, directory):
    store = kind.open(directory, MIB)
    assert slab.remove(directory) is False
    store.close()
    assert slab.remove(directory) is True
    assert not directory.exists()
    kind.open(directory, 2 * MIB)


LATE = """
import sys, pathlib
from lmcache_mm import stores
print("opening", flush=True)
store = getattr(stores, sys.argv[1]).open(pathlib.Path(sys.argv[2]), 1 << 20)
print("open", flush=True)
sys.stdin.read()
"""


def test_whoever_waited_for_a_store_that_is_removed_makes_it_anew(kind, directory):
    kind.open(directory, MIB).close()
    with slab.opening(directory):
        late = subprocess.Popen(
            [sys.executable, "-c", LATE, kind.__name__, directory], stdout=subprocess.PIPE, stdin=subprocess.PIPE
        )
        assert late.stdout.readline() == b"opening\n"
        time.sleep(0.3)
        slab.remove_files(directory)
        (directory / "lock").unlink()
        directory.rmdir()
    assert late.stdout.readline() == b"open\n"
    assert kind.open(directory, MIB).stats()["processes"] == 2
    late.communicate()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give directories away")
def test_a_directory_that_another_user_made_first_keeps_nobody_out(tmp_path, monkeypatch):
    monkeypatch.setattr(slab_files, "SHM", str(tmp_path))
    first = tmp_path / f"lmcache_mm-{os.geteuid()}"
    first.mkdir()
    os.chown(first, 4242, 4242)
    second = slab_files.shm_directory("x")
    assert second.parent == tmp_path / f"lmcache_mm-{os.geteuid()}.1"
    first.rmdir()
    assert slab_files.shm_directory("x") == second
    monkeypatch.setattr(slab_files, "MOST_DIRECTORIES", 2)
    for path in (first, second.parent):
        path.mkdir(exist_ok=True)
        os.chown(path, 4242, 4242)
    with pytest.raises(PermissionError, match="it belongs to user 4242"):
        slab_files.shm_directory("x")


@pytest.fixture
def small_tmpfs(tmp_path):
    """A tmpfs of 3 MiB."""
    folder = tmp_path / "tmpfs"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", folder], check=False, capture_output=True
    )
    if mounted.returncode:
        pytest.skip("a tmpfs cannot be mounted here")
    yield folder
    for store in list(slab._open.values()):
        while store._opened:
            store.close()
    gc.collect()
    subprocess.run(["umount", "-l", folder], check=True)


def test_full_shared_memory_is_an_error_when_a_store_is_made_and_no_signal_later(small_tmpfs):
    with pytest.raises(OSError, match="no room for 8388608 bytes"):
        ShmStore.open(small_tmpfs / "large", 8 * MIB)
    store = ShmStore.open(small_tmpfs / "store", 2 * MIB)
    with open(small_tmpfs / "rest", "wb", buffering=0) as rest, contextlib.suppress(OSError):
        while True:
            rest.write(bytes(4096))
    for i in range(3000):
        store.put([key(i)], [payload(i, 50)])
    assert get(store, 2999, 50) == payload(2999, 50)
    store.clear()
    store.put([key(1)], [payload(1, 1_900_000)])
    assert get(store, 1, 1_900_000) == payload(1, 1_900_000)
    stats = store.stats()
    assert (stats["errors"], stats["dropped_puts"]) == (0, 0)


@pytest.mark.parametrize("spare", [0, 12 << 10, 256 << 10])
def test_no_room_for_the_index_is_an_error_and_no_signal(small_tmpfs, spare):
    capacity = (3 << 20) - spare
    with pytest.raises(OSError, match=f"no room for {capacity} bytes"):
        ShmStore.open(small_tmpfs / "store", capacity)
    store = ShmStore.open(small_tmpfs / "store", 2 * MIB)
    store.close()
    os.truncate(small_tmpfs / "store" / "table", 4096)  # then what is left of it is reused
    with open(small_tmpfs / "rest", "wb", buffering=0) as rest, contextlib.suppress(OSError):
        while True:
            rest.write(bytes(4096))
    with pytest.raises(OSError, match="no room for 2097152 bytes"):
        ShmStore.open(small_tmpfs / "store", 2 * MIB)
