"""Stores: content-addressed maps from record keys to payloads, opened by URL."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol
from urllib.parse import parse_qsl, urlsplit

from lmcache_mm.stores.mem import MemStore

__all__ = ["Store", "open_store"]

Buffer = bytes | bytearray | memoryview  # or anything else with the buffer protocol

UNITS: dict[str, int] = {"": 1, "B": 1} | {
    prefix + suffix: base**power
    for power, prefix in enumerate("KMGT", start=1)
    for suffix, base in (("iB", 1024), ("B", 1000))
}


class Store(Protocol):
    """What every store does. Keys are bytes of 32 to 64. Methods may be called from any thread.

    A store never returns a wrong payload: what does not have the key's length and checksum is a miss, and counted.
    A put that cannot be done (full, down, slow) is dropped and counted, never an exception.
    """

    def contains(self, keys: Sequence[bytes]) -> list[bool]:
        """Which records could be read now."""
        ...

    def get_into(self, keys: Sequence[bytes], buffers: Sequence[Buffer]) -> list[bool]:
        """Fills each writable buffer with its key's payload. False: not there, or another length than the buffer's, or
        damaged; the buffer then holds garbage."""
        ...

    def put(
        self,
        keys: Sequence[bytes],
        buffers: Sequence[Buffer],
        owner: bytes = b"",
        checksums: Sequence[int] | None = None,
    ) -> None:
        """Stores payloads, copied before it returns. A key that is there keeps its record. `owner`: 16 bytes that name
        a tenant, or empty. `checksums`: the payloads' (see `ops.checksum`) where the caller has them."""
        ...

    def delete(self, keys: Sequence[bytes]) -> None: ...

    def flush(self) -> None:
        """Returns when every put accepted before is visible to all readers."""
        ...

    def stats(self) -> Mapping[str, int]:
        """Counters since it was opened, and `capacity_bytes`, `used_bytes`, `records` as they are now."""
        ...

    def close(self) -> None: ...


def open_store(url: str) -> Store:
    """Opens the store that `url` names; ValueError for what is no URL of a store.

    mem://?capacity=1GiB    one buffer in this process
    """
    parts = urlsplit(url)
    if parts.scheme != "mem":
        raise ValueError(f"store: expected a URL such as mem://?capacity=1GiB, got {url!r}")
    if parts.netloc or parts.path:
        raise ValueError(f"store: mem:// takes no host and no path, got {url!r}")
    options = dict(parse_qsl(parts.query, keep_blank_values=True, strict_parsing=bool(parts.query)))
    capacity = parse_bytes("capacity", options.pop("capacity", None), url)
    if options:
        raise ValueError(f"store: unknown option {next(iter(options))!r} in {url!r}; mem:// takes capacity")
    return MemStore(capacity)


def parse_bytes(name: str, text: str | None, url: str) -> int:
    """A positive size such as 512MiB, 8GiB, 2GB or 4096."""
    if text is None:
        raise ValueError(f"store: {name} is missing in {url!r}, such as {name}=8GiB")
    digits = text.rstrip("iBKMGT")
    unit = text[len(digits) :]
    if unit not in UNITS or not digits.isascii() or not digits.isdigit() or not int(digits):
        raise ValueError(f"store: {name}: expected a size such as 512MiB or 8GiB, got {text!r}")
    return int(digits) * UNITS[unit]
