"""The deployment's secret, and what it makes of records that leave this machine."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import TYPE_CHECKING

from blake3 import blake3

if TYPE_CHECKING:
    from lmcache_mm.stores import Buffer

NAME_CONTEXT = "lmcache_mm v1 name"
MAC_CONTEXT = "lmcache_mm v1 mac"
CONNECTION_CONTEXT = "lmcache_mm v1 connection"
MAC_BYTES = 32
LEAST_BYTES = 16
HASHED_AT_ONCE = 1 << 20  # bytes from which on several threads hash one payload


def secret() -> bytes | None:
    """The content of the file LMCACHE_MM_SECRET_FILE (mode 0600), without white space around it, or else the value of
    LMCACHE_MM_SECRET; None where neither is set.

    Raises ValueError for fewer than 16 bytes, PermissionError for a file that others can read, OSError for none."""
    value = os.environb.get(b"LMCACHE_MM_SECRET")
    if name := os.environ.get("LMCACHE_MM_SECRET_FILE"):
        value = read_private("LMCACHE_MM_SECRET_FILE", Path(name))
    if value is not None and len(value) < LEAST_BYTES:
        raise ValueError(f"LMCACHE_MM_SECRET: expected at least {LEAST_BYTES} bytes, got {len(value)}")
    return value


def read_private(variable: str, path: Path) -> bytes:
    """A file's content without white space around it. PermissionError, naming the variable that told of it, if others
    can read it."""
    if path.stat().st_mode & (stat.S_IRWXG | stat.S_IRWXO):
        raise PermissionError(f"{variable}: expected mode 0600 of {path}")
    return path.read_bytes().strip()


class Seal:
    """What those who know the secret, and nobody else, can make and check. Raises ValueError for a short one."""

    def __init__(self, secret: bytes) -> None:
        if len(secret) < LEAST_BYTES:
            raise ValueError(f"secret: expected at least {LEAST_BYTES} bytes, got {len(secret)}")
        self._name_key = blake3(secret, derive_key_context=NAME_CONTEXT).digest()
        self._mac_key = blake3(secret, derive_key_context=MAC_CONTEXT).digest()
        self._connection_key = blake3(secret, derive_key_context=CONNECTION_CONTEXT).digest()

    @classmethod
    def of_deployment(cls, what: str) -> Seal:
        """By the environment's secret. ValueError, naming `what` needs it, where there is none."""
        value = secret()
        if value is None:
            raise ValueError(
                f"{what}: needs the deployment's secret, for its records leave this machine: set "
                f"LMCACHE_MM_SECRET_FILE (a file of mode 0600) or LMCACHE_MM_SECRET, at least {LEAST_BYTES} bytes"
            )
        return cls(value)

    def name(self, key: bytes) -> bytes:
        """32 bytes that stand for a record key outside: keyed_hash(derive_key("lmcache_mm v1 name", secret), key)."""
        return blake3(key, key=self._name_key).digest()

    def mac(self, key: bytes, payload: Buffer, threads: int = blake3.AUTO) -> bytes:
        """32 bytes: keyed_hash(derive_key("lmcache_mm v1 mac", secret), key ‖ u64 length ‖ payload)."""
        view = memoryview(payload).cast("B")
        hasher = blake3(key=self._mac_key, max_threads=threads if len(view) >= HASHED_AT_ONCE else 1)
        return hasher.update(key + len(view).to_bytes(8, "little")).update(view).digest()

    def connection_key(self, transcript: bytes) -> bytes:
        """32 bytes for one connection, by what both sides said when it began:
        keyed_hash(derive_key("lmcache_mm v1 connection", secret), transcript)."""
        return blake3(transcript, key=self._connection_key).digest()
