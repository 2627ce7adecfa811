"""The files of a slab: whose they are, who has them open, and the header that tells what they are."""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import re
import shutil
import stat
import struct
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import lmdb

LEAST_GRANULE_BYTES = 16 << 10
MOST_GRANULES = 1 << 22  # a table of at most 64 MiB
ROWS = 64  # processes that may have a store open

_HEADER = struct.Struct("<8sIIQ16sQII")
_MAGIC, _VERSION = b"lmcmm\0\r\n", 1
_OPENING = ROWS  # the byte of the lock file that is held while a store is opened or removed
REGISTERING = ROWS + 1  # and while a process registers the slab with a GPU
SAVING = ROWS + 2  # and while a process writes a checkpoint, so that the last one is the newest
_OWN_NAMES = re.compile(r"lock|table|slab|index|checkpoint(\.\d+)?")
_FLOCK = struct.Struct("@hhqqi4x")

# The locks of all stores that this process ever had open: closing any descriptor of a file would end all POSIX locks
# that the process holds on it.
_locks: dict[tuple[int, int], int] = {}


def boot_id() -> bytes:
    return bytes.fromhex(Path("/proc/sys/kernel/random/boot_id").read_text().strip().replace("-", ""))


def pid_namespace() -> int:
    return os.stat("/proc/self/ns/pid").st_ino


def granules_of(capacity: int) -> tuple[int, int]:
    granule_bytes = LEAST_GRANULE_BYTES
    while capacity // granule_bytes > MOST_GRANULES:
        granule_bytes *= 2
    return capacity // granule_bytes, granule_bytes


def no_store(directory: Path) -> ValueError:
    return ValueError(
        f"store: there is no store in {directory} yet; add ?capacity=8GiB (or another size) to its URL to create it"
    )


def own_directory(path: Path) -> None:
    """Makes the directory if there is none; PermissionError if anybody else could have a hand in it."""
    with suppress(FileExistsError):
        os.mkdir(path, 0o700)
    found = os.lstat(path)
    if not stat.S_ISDIR(found.st_mode):
        raise NotADirectoryError(errno.ENOTDIR, "store: expected a directory", str(path))
    if found.st_uid != os.geteuid() or found.st_mode & 0o077:
        raise PermissionError(
            errno.EPERM,
            f"store: expected a directory of user {os.geteuid()} with mode 0700, for whoever can read a "
            f"store reads everybody's KV; it is of user {found.st_uid} with mode {found.st_mode & 0o777:04o}",
            str(path),
        )


def check_file(path: Path, found: os.stat_result) -> None:
    if not stat.S_ISREG(found.st_mode) or found.st_uid != os.geteuid() or found.st_mode & 0o077:
        raise PermissionError(errno.EPERM, "store: expected a file of the user's with mode 0600", str(path))


def lock_file(path: Path) -> int:
    with suppress(FileNotFoundError):
        found = os.lstat(path)
        check_file(path, found)
        if known := _locks.get((found.st_dev, found.st_ino)):
            return known
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    found = os.fstat(fd)
    check_file(path, found)
    return _locks.setdefault((found.st_dev, found.st_ino), fd)


def locked_by_another(fd: int, byte: int) -> bool:
    """Whether another process holds the byte."""
    request = _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, byte, 1, 0)
    return bool(_FLOCK.unpack(fcntl.fcntl(fd, fcntl.F_GETLK, request))[0] != fcntl.F_UNLCK)


def try_lock(fd: int, byte: int) -> bool:
    try:
        fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, byte)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            return False
        raise
    return True


def unlock(fd: int, byte: int) -> None:
    fcntl.lockf(fd, fcntl.LOCK_UN, 1, byte)


@contextmanager
def holding(fd: int, byte: int) -> Iterator[None]:
    """Waits for the byte, and holds it."""
    while True:
        try:
            fcntl.lockf(fd, fcntl.LOCK_EX, 1, byte)
            break
        except OSError as error:
            # Threads of two processes that wait for bytes of each other look like a circle, which the threads are not.
            if error.errno != errno.EDEADLK:
                raise
            time.sleep(0.01)
    try:
        yield
    finally:
        unlock(fd, byte)


@contextmanager
def opening(directory: Path) -> Iterator[int]:
    """One process at a time opens, makes or removes the store in a directory, which is made; gives its lock file."""
    while True:
        own_directory(directory)
        check_contents(directory)
        fd = lock_file(directory / "lock")
        with holding(fd, _OPENING):
            if _is_at(fd, directory / "lock"):  # else whoever had it before removed it
                yield fd
                return


def _is_at(fd: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(fd), os.lstat(path))
    except FileNotFoundError:
        return False


def allocate(path: Path, size: int) -> None:
    """A new file with all its room: a write behind a full tmpfs's end would be SIGBUS."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        os.posix_fallocate(fd, 0, size)
    finally:
        os.close(fd)


def map_file(path: Path, size: int) -> mmap.mmap:
    fd = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        found = os.fstat(fd)
        check_file(path, found)
        if found.st_size != size:
            raise ValueError(f"store: {path}: expected {size} bytes, got {found.st_size}; remove the store")
        return mmap.mmap(fd, size)
    finally:
        os.close(fd)


def read_header(directory: Path) -> tuple[int, int, bytes, int] | None:
    """(granule bytes, granules, boot id, PID namespace); None if there is no store, or one that was never finished."""
    try:
        fd = os.open(directory / "table", os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    try:
        check_file(directory / "table", os.fstat(fd))
        content = os.pread(fd, _HEADER.size, 0)
    finally:
        os.close(fd)
    if len(content) < _HEADER.size or not any(content):
        return None
    magic, version, granule_bytes, granules, boot_id, pid_namespace, rows, _ = _HEADER.unpack(content)
    if magic != _MAGIC:
        raise ValueError(f"store: {directory / 'table'} is no table of a slab")
    if version != _VERSION or rows != ROWS:
        raise ValueError(f"store: {directory} is of version {version}, expected {_VERSION}; remove it")
    return granule_bytes, granules, boot_id, pid_namespace


def write_header(directory: Path, granule_bytes: int, granules: int) -> None:
    header = _HEADER.pack(_MAGIC, _VERSION, granule_bytes, granules, boot_id(), pid_namespace(), ROWS, 0)
    fd = os.open(directory / "table", os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        os.pwrite(fd, header, 0)
        os.fsync(fd)  # what is made once has to be there after a power cut
    finally:
        os.close(fd)


def open_env(path: Path, granules: int) -> lmdb.Environment:
    env = lmdb.open(
        str(path),
        map_size=(64 << 20) + (granules << 10),
        max_dbs=16,
        max_readers=1024,
        mode=0o600,
        sync=False,
        metasync=False,
        readahead=False,
        meminit=False,
    )
    if env.info()["last_pgno"] * env.stat()["psize"] > (path / "data.mdb").stat().st_size:
        env.close()
        raise ValueError(f"store: {path / 'data.mdb'} ends before its last page; remove the store")
    return env


def check_contents(directory: Path) -> None:
    """ValueError if something lies in the directory that is no part of a store: it would be in the way, or worse."""
    others = [name for name in os.listdir(directory) if not _OWN_NAMES.fullmatch(name)]
    if others:
        raise ValueError(f"store: expected a directory of its own, {directory} also holds {others[0]!r}")


def remove_files(directory: Path) -> None:
    """All of a store but its lock."""
    for path in directory.glob("checkpoint*"):
        path.unlink()
    for name in ("table", "slab"):  # the header first
        (directory / name).unlink(missing_ok=True)
    shutil.rmtree(directory / "index", ignore_errors=True)


def sync_directory(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def shm_directory(name: str) -> Path:
    """Where the store shm:///name of this user lies."""
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,63}", name):
        raise ValueError(f"store: expected a name of letters, digits, '.', '_' and '-', got {name!r}")
    parent = Path(f"/dev/shm/lmcache_mm-{os.geteuid()}")
    own_directory(parent)
    return parent / name
