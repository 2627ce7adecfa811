"""Checks of the arguments that callers pass to a store, the same for all stores."""

from __future__ import annotations

import errno
import operator
import os
from collections.abc import Callable, Sequence
from typing import TypeVar

import numpy as np

Buffer = bytes | bytearray | memoryview  # or anything else with the buffer protocol

NO_OWNER = bytes(16)
T = TypeVar("T")


def check_process(pid: int) -> None:
    """RuntimeError in a process other than the one that opened the store."""
    if os.getpid() != pid:
        raise RuntimeError(f"store: opened in process {pid}, used in {os.getpid()}: open it again after a fork")


def is_lack(error: BaseException) -> bool:
    """Whether the error says that memory or threads ran out: neither the caller nor the store is at fault, and a later
    call may succeed."""
    if isinstance(error, OSError):
        return error.errno in (errno.ENOMEM, errno.EAGAIN)
    said = str(error) if isinstance(error, RuntimeError) else ""
    return isinstance(error, MemoryError) or "can't allocate memory" in said or "can't start new thread" in said


def unless_lacking(make: Callable[[], T], otherwise: T) -> T:
    """Returns what `make` returns, or `otherwise` if it runs out of memory or threads (`is_lack`)."""
    try:
        return make()
    except Exception as error:
        if is_lack(error):
            return otherwise
        raise


def check_keys(keys: Sequence[bytes]) -> None:
    """TypeError for keys that are not bytes, ValueError for lengths other than 32 to 64."""
    for key in keys:
        if not isinstance(key, bytes):
            raise TypeError(f"keys: expected bytes, got {type(key).__name__}")
        if not 32 <= len(key) <= 64:
            raise ValueError(f"keys: expected 32 to 64 bytes, got {len(key)}")


def checked_owner(owner: bytes) -> bytes:
    """The owner's 16 bytes, NO_OWNER for none; TypeError if it is not bytes, ValueError for another length."""
    if not isinstance(owner, bytes):
        raise TypeError(f"owner: expected bytes, got {type(owner).__name__}")
    if owner and len(owner) != len(NO_OWNER):
        raise ValueError(f"owner: expected {len(NO_OWNER)} bytes or none, got {len(owner)}")
    return owner or NO_OWNER


def bytes_of(buffer: Buffer) -> np.ndarray:
    """A uint8 view of a buffer's bytes."""
    return np.frombuffer(buffer, dtype=np.uint8)


def _bytes_of_all(buffers: Sequence[Buffer], count: int) -> list[np.ndarray]:
    if len(buffers) != count:
        raise ValueError(f"buffers: expected {count}, as many as keys, got {len(buffers)}")
    return [bytes_of(buffer) for buffer in buffers]


def check_forgotten(owner: bytes) -> None:
    """As `checked_owner`, and ValueError for none: records without an owner cannot be forgotten."""
    if not checked_owner(owner).strip(b"\0"):
        raise ValueError(f"owner: expected {len(NO_OWNER)} bytes, got none")


def checked_records(
    keys: Sequence[bytes], buffers: Sequence[Buffer], owner: bytes, checksums: Sequence[int] | None
) -> tuple[list[np.ndarray], list[int] | None]:
    """A put's arguments: the buffers' bytes, and the checksums, signed. TypeError or ValueError, before anything is
    stored, for wrong keys, buffers, owner or checksums, or if their numbers differ."""
    check_keys(keys)
    checked_owner(owner)
    arrays = _bytes_of_all(buffers, len(keys))
    return arrays, None if checksums is None else checked_checksums(checksums, len(keys))


def checked_checksums(checksums: Sequence[int], count: int) -> list[int]:
    """The checksums as integers. ValueError unless there are `count`, TypeError or ValueError for wrong values."""
    if len(checksums) != count:
        raise ValueError(f"checksums: expected {count}, as many as keys, got {len(checksums)}")
    return [_checked_checksum(i, checksum) for i, checksum in enumerate(checksums)]


def _checked_checksum(i: int, checksum: int) -> int:
    try:
        number = operator.index(checksum)
    except TypeError:
        raise TypeError(f"checksums[{i}]: expected an integer, got {type(checksum).__name__}") from None
    if not -(1 << 63) <= number < 1 << 63:
        raise ValueError(f"checksums[{i}]: expected a signed integer of 64 bits, got {number}")
    return number


def writable(buffers: Sequence[Buffer], count: int) -> list[np.ndarray]:
    """The buffers' bytes; ValueError for a read-only buffer, or if there are not `count`."""
    arrays = _bytes_of_all(buffers, count)
    for i, array in enumerate(arrays):
        if not array.flags.writeable:
            raise ValueError(f"buffers[{i}]: expected a writable one")
    return arrays
