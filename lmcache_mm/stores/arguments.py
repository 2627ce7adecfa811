"""What callers hand to a store, checked in one way by all of them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from lmcache_mm.stores import Buffer

NO_OWNER = bytes(16)


def check_process(pid: int) -> None:
    """RuntimeError in another process than the one that opened the store."""
    if os.getpid() != pid:
        raise RuntimeError(f"store: opened in process {pid}, used in {os.getpid()}: open it again after a fork")


def check_keys(keys: Sequence[bytes]) -> None:
    """ValueError for keys of another length than 32 to 64 bytes."""
    for key in keys:
        if not 32 <= len(key) <= 64:
            raise ValueError(f"keys: expected 32 to 64 bytes, got {len(key)}")


def checked_owner(owner: bytes) -> bytes:
    """16 bytes, NO_OWNER for none; ValueError for another length."""
    if owner and len(owner) != len(NO_OWNER):
        raise ValueError(f"owner: expected {len(NO_OWNER)} bytes or none, got {len(owner)}")
    return owner or NO_OWNER


def bytes_of(buffer: Buffer) -> np.ndarray:
    """A buffer's bytes, uint8, where they are."""
    return np.frombuffer(buffer, dtype=np.uint8)


def writable(buffers: Sequence[Buffer]) -> list[np.ndarray]:
    """The buffers' bytes; ValueError for one that cannot be written to."""
    arrays = [bytes_of(buffer) for buffer in buffers]
    for i, array in enumerate(arrays):
        if not array.flags.writeable:
            raise ValueError(f"buffers[{i}]: expected a writable one")
    return arrays
