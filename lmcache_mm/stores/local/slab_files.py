"""The files of a slab: their owner, the processes that have them open, and their headers."""

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

from lmcache_mm import _C

LEAST_GRANULE_BYTES = 16 << 10
MOST_GRANULES = 1 << 22
SEGMENT_BYTES = 1 << 30
ROWS = 64  # processes that may have a store open
VERSION = 2
OPEN_WAIT_S = 60.0  # for another process to create the store: 64 GiB of memory take 20 s
REGISTER_WAIT_S = 120.0

_OPENING = ROWS  # the lock file's byte that a process holds while it opens or removes the store
REGISTERING = ROWS + 1  # while it registers the slab with a GPU
WRITING = ROWS + 2  # while it changes the index
_PARTS = ("lock", "table", "slab", "slab.new")
_OF_VERSION_1 = re.compile(r"index|checkpoint(\.\d+)?")
_FLOCK = struct.Struct("@hhqqi4x")
_PAGE_BYTES = 4096
SHM = "/dev/shm"
MOST_DIRECTORIES = 100  # that others may have made under our name

# Descriptors of all lock files that this process ever opened: closing any descriptor of a file would release all POSIX
# locks that the process holds on it.
_locks: dict[tuple[int, int], int] = {}


def boot_id() -> bytes:
    return bytes.fromhex(Path("/proc/sys/kernel/random/boot_id").read_text().strip().replace("-", ""))


def boot_clock() -> float:
    """Seconds since the machine booted, including suspension. Unlike the time of day, nobody can set this clock."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def granules_of(capacity: int) -> tuple[int, int]:
    granule_bytes = LEAST_GRANULE_BYTES
    while capacity // granule_bytes > MOST_GRANULES:
        granule_bytes *= 2
    return capacity // granule_bytes, granule_bytes


def no_store(directory: Path) -> ValueError:
    return ValueError(
        f"store: there is no store in {directory} yet: start the engine that creates it, or create it by adding "
        "?capacity=8GiB (or another size) to its URL"
    )


def own_directory(path: Path) -> None:
    """Makes the directory if there is none; PermissionError if other users could change it."""
    try:
        with suppress(FileExistsError):
            os.mkdir(path, 0o700)
    except FileNotFoundError as error:
        raise FileNotFoundError(error.errno, "store: its parent directory does not exist", str(path)) from None
    found = os.lstat(path)
    if not stat.S_ISDIR(found.st_mode):
        raise NotADirectoryError(errno.ENOTDIR, "store: expected a directory", str(path))
    if found.st_uid != os.geteuid() or found.st_mode & 0o077:
        raise PermissionError(
            errno.EPERM,
            f"store: expected a directory of user {os.geteuid()} with mode 0700, since a user who can read a "
            f"store reads everybody's KV; it belongs to user {found.st_uid} and has mode {found.st_mode & 0o777:04o}",
            str(path),
        )


def check_file(path: Path, found: os.stat_result) -> None:
    if not stat.S_ISREG(found.st_mode) or found.st_uid != os.geteuid() or found.st_mode & 0o077:
        raise PermissionError(errno.EPERM, "store: expected a file of this user with mode 0600", str(path))


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
    return _holder(fd, byte) is not None


def _holder(fd: int, byte: int) -> int | None:
    """The process that holds the byte, 0 if it is in another PID namespace; None if nobody or this process does."""
    kind, _, _, _, pid = _FLOCK.unpack(
        fcntl.fcntl(fd, fcntl.F_GETLK, _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, byte, 1, 0))
    )
    return None if kind == fcntl.F_UNLCK else pid


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
def holding(fd: int, byte: int, wait_s: float, what: str) -> Iterator[None]:
    """Waits for the byte, and holds it. After `wait_s` raises TimeoutError, which says who does `what`."""
    until, pause = time.monotonic() + wait_s, 0.001
    while not try_lock(fd, byte):
        if time.monotonic() > until:
            pid = _holder(fd, byte)
            who = f"process {pid}" if pid else "another process"
            raise TimeoutError(f"store: {who} {what} for more than {wait_s:g} s; is it stopped?")
        time.sleep(pause)
        pause = min(2 * pause, 0.05)
    try:
        yield
    finally:
        unlock(fd, byte)


@contextmanager
def opening(directory: Path) -> Iterator[int]:
    """Makes `directory` and lets one process at a time open, create or remove the store in it; yields the lock file's
    descriptor."""
    while True:
        own_directory(directory)
        check_contents(directory)
        fd = lock_file(directory / "lock")
        with holding(fd, _OPENING, OPEN_WAIT_S, f"has been opening {directory}"):
            if _is_at(fd, directory / "lock"):  # else the last holder removed the file
                yield fd
                return


def _is_at(fd: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(fd), os.lstat(path))
    except FileNotFoundError:
        return False


def map_file(path: Path, size: int, make: bool = False) -> mmap.mmap:
    """Maps a file of the user's, resized to `size`, with all its space allocated: on a full tmpfs, writing to
    unallocated pages raises SIGBUS."""
    flags = os.O_CREAT | os.O_EXCL if make else 0
    fd = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC | flags, 0o600)
    try:
        found = os.fstat(fd)
        check_file(path, found)
        if found.st_size > size:
            os.ftruncate(fd, size)
        if found.st_size < size or found.st_blocks * 512 < size:
            os.posix_fallocate(fd, 0, size)
        return mmap.mmap(fd, size)
    finally:
        os.close(fd)


def check_version(directory: Path) -> tuple[int, int, bytes] | None:
    """(granules, granule bytes, boot id) from the store's header; None if there is no store or no header. ValueError
    for a store of another version."""
    header = None
    with suppress(FileNotFoundError):
        fd = os.open(directory / "table", os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            check_file(directory / "table", os.fstat(fd))
            header = _C.slab_header(os.pread(fd, _PAGE_BYTES, 0))
        finally:
            os.close(fd)
    version = 1 if (directory / "index").is_dir() else header[0] if header else VERSION
    if version != VERSION:
        raise ValueError(f"store: {directory} has version {version}, expected {VERSION}; remove it")
    return header and header[1:]


def check_contents(directory: Path) -> None:
    """ValueError if the directory holds anything besides a store, which could be lost or in the way."""
    others = [name for name in os.listdir(directory) if name not in _PARTS and not _OF_VERSION_1.fullmatch(name)]
    if others:
        raise ValueError(f"store: expected a directory of its own, {directory} also holds {others[0]!r}")


def remove_files(directory: Path) -> None:
    """Removes a store's files, except its lock."""
    for path in directory.glob("checkpoint*"):
        path.unlink()
    for name in ("slab", "slab.new", "table"):  # without a slab there is no store
        (directory / name).unlink(missing_ok=True)
    shutil.rmtree(directory / "index", ignore_errors=True)


def shm_directory(name: str) -> Path:
    """The directory of this user's store shm:///name."""
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,63}", name):
        raise ValueError(f"store: expected a name of letters, digits, '.', '_' and '-', got {name!r}")
    return _shm_parent() / name


def _shm_parent() -> Path:
    """The user's directory in shared memory. Another user may make one of that name first: then the next name is tried,
    and so on. A user who has a directory keeps it, even if an earlier name becomes free."""
    base = f"{SHM}/lmcache_mm-{os.geteuid()}"
    paths = [Path(base), *(Path(f"{base}.{i}") for i in range(1, MOST_DIRECTORIES))]
    for path in paths:
        with suppress(FileNotFoundError):
            if os.lstat(path).st_uid == os.geteuid():
                own_directory(path)
                return path
    for path in paths:
        with suppress(PermissionError, NotADirectoryError):
            own_directory(path)
            return path
    own_directory(paths[0])  # raises an error that names the owner
    return paths[0]
