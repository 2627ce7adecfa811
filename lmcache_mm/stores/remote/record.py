"""A record on a server: a header that says what the payload is, and a MAC over both, so that nobody without the secret
can forge a record, exchange it for another or make it look younger."""

from __future__ import annotations

import hmac
import struct
import time
from typing import NamedTuple

import numpy as np

from lmcache_mm.secret import MAC_BYTES, Seal
from lmcache_mm.stores.arguments import bytes_of

VERSION = 1
MAGIC = b"lmcache_mm"
# A record's header: magic, version, when it was stored (µs since 1970), its payload's bytes and its owner; then a keyed
# digest of these and the MAC. The payload follows.
FACTS = struct.Struct("<10sH4xQQ32s")
HEADER = struct.Struct(f"<{FACTS.size}s32s{MAC_BYTES}s")  # 128
HEADER_BYTES = HEADER.size


class Head(NamedTuple):
    """A record's header, authenticated by its keyed digest."""

    stored_at: int
    payload_bytes: int
    owner: bytes  # the owner's keyed digest
    signed: bytes  # what the MAC covers besides the payload
    mac: bytes

    @property
    def age_s(self) -> float:
        return max(0.0, time.time() - self.stored_at / 1e6)


class Headers:
    """Writes and reads headers with a deployment's seal."""

    def __init__(self, seal: Seal) -> None:
        self._seal = seal

    def write(self, record: np.ndarray, name: str, stored_at: int, owner: bytes) -> None:
        """Writes the header in front of a payload."""
        facts = FACTS.pack(MAGIC, VERSION, stored_at, len(record) - HEADER_BYTES, self._seal.digest(owner))
        signed = _digest_in(name) + facts
        mac = self._seal.mac(signed, record[HEADER_BYTES:].data)
        record[:HEADER_BYTES] = bytes_of(HEADER.pack(facts, self._seal.digest(signed), mac))

    def parse(self, name: str, header: bytes) -> Head | None:
        """The parsed header of the record `name`; None for another version, or if it has been altered."""
        if len(header) < HEADER_BYTES or not of_this_version(header):
            return None
        facts, digest, mac = HEADER.unpack_from(header)
        signed = _digest_in(name) + facts
        if not hmac.compare_digest(digest, self._seal.digest(signed)):
            return None
        _, _, stored_at, payload_bytes, owner = FACTS.unpack(facts)
        return Head(stored_at, payload_bytes, owner, signed, mac)


def of_this_version(header: bytes) -> bool:
    magic, version, *_ = FACTS.unpack_from(header)
    return (magic, version) == (MAGIC, VERSION)


def _digest_in(name: str) -> bytes:
    """The keyed digest at the end of a record's name; other bytes for a name that is not ours."""
    return name[-64:].encode()
