"""Stores on other hosts: sealed records, and owners that are forgotten from every host."""

from __future__ import annotations

import math
import os
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from lmcache_mm import _C
from lmcache_mm.secret import Seal
from lmcache_mm.stores.arguments import (
    check_forgotten,
    check_keys,
    check_process,
    checked_owner,
    checked_records,
    writable,
)
from lmcache_mm.stores.breaker import PAUSE_S
from lmcache_mm.stores.remote.hands import Call, Calls, Engine, Hand, LeftAlone, first_line
from lmcache_mm.stores.remote.record import HEADER_BYTES, MAGIC, VERSION, Head, Headers, of_this_version

if TYPE_CHECKING:
    from lmcache_mm.stores.arguments import Buffer

MOST_UNSETTLED = 4096  # puts
FORGOTTEN_KEPT_S = 86_400  # how long a `forget` stays written down; no put takes as long


class _Unsettled(NamedTuple):
    """A put whose owner may have been forgotten meanwhile; still to be checked."""

    after: float  # by time.monotonic(), when to check
    owner: bytes
    moment: int
    keys: list[bytes]


class RemoteStore:
    """See `Store`.

    name: for messages. connect: makes a connection, on each lane. If it raises PermissionError (wrong credentials) or
    ValueError (wrong configuration), the constructor raises it; after any other error it warns and counts the store as
    down. seal: the deployment's. timeout_s: how long a call waits. connections: the most requests at a time.
    names_at_once: the most names per request. ttl_s: after that a record counts as gone; 0: never.

    A call that fails or is not answered in time gives misses or dropped puts. All calls in the next 10 s do the same,
    then one call tries again. Only `forget` and `clear` raise RuntimeError if they fail.
    """

    local = read_only = False

    def __init__(
        self,
        name: str,
        connect: Callable[[], Engine],
        seal: Seal,
        timeout_s: float,
        connections: int,
        names_at_once: int,
        ttl_s: float = 0,
    ) -> None:
        self.name = name
        self._seal, self._timeout_s, self._ttl_s = seal, timeout_s, ttl_s
        self._headers = Headers(seal)
        deployment = f"lmcache_mm-{VERSION}-{seal.digest(b'deployment')[:8].hex()}"
        self._records, self._forgets = f"{deployment}-record-", f"{deployment}-forgotten-"  # prefixes of names
        self._pid = os.getpid()
        self._closed = False
        self._unsettled: deque[_Unsettled] = deque(maxlen=MOST_UNSETTLED)
        self._counts: Counter[str] = Counter(dict.fromkeys(("hits", "misses", "corrupt", "puts", "dropped_puts"), 0))
        self._counting = threading.Lock()
        self._calls = Calls(name, connect, timeout_s, connections, names_at_once)
        _, error = self._calls.do(lambda hand, call, item: hand.engine, 1)
        if isinstance(error, (PermissionError, ValueError)):
            self.close()
            raise error

    def _check(self) -> None:
        check_process(self._pid)
        if self._closed:
            raise RuntimeError("store: it is closed")

    def _count(self, name: str, by: int = 1) -> None:
        with self._counting:
            self._counts[name] += by

    def _name(self, key: bytes) -> str:
        return self._records + self._seal.digest(key).hex()

    # --- Records

    def _read(self, hand: Hand, name: str, payload: np.ndarray, call: Call | None = None) -> Head | None:
        """Reads a record whose payload has the length of `payload`; None if there is none, or if the call is over. A
        damaged record is removed; one of another length or version may belong to somebody else and stays.

        Verifies the caller's copy, since a request that was given up may still write to the hand's memory."""
        record = hand.memory(HEADER_BYTES + payload.nbytes)
        size = hand.engine.read(name, record.data)
        if size is None or size > len(record):
            return None
        header = record[:HEADER_BYTES].tobytes()
        if size >= HEADER_BYTES and header.startswith(MAGIC):
            if not of_this_version(header):
                return None
            head = self._headers.parse(name, header)
            if head is not None and head.payload_bytes + HEADER_BYTES == size:
                if size < len(record):
                    return None
                if call is not None and not call.touch(lambda: np.copyto(payload, record[HEADER_BYTES:])):
                    return None
                if self._seal.verify(head.signed, payload.data, head.mac):
                    return head
                if call is not None and call.over:  # the caller has its buffer back
                    return None
        self._count("corrupt")
        hand.engine.delete([name])
        return None

    def contains(self, keys: Sequence[bytes], peek: bool = False) -> list[bool]:
        self._check()
        check_keys(keys)
        return self._contains([self._name(key) for key in keys], peek)

    def _contains(self, names: Sequence[str], peek: bool, until: float | None = None) -> list[bool]:
        def look(engine: Engine, part: list[str]) -> list[bool]:
            if not self._ttl_s or engine.expires:
                return engine.exists(part, peek)
            heads = self._heads(engine, part)
            return [head is not None and head.age_s <= self._ttl_s for head in heads]

        return self._calls.in_parts(look, names, False, until)

    def _heads(self, engine: Engine, names: Sequence[str]) -> list[Head | None]:
        headers = engine.heads(names, HEADER_BYTES)
        return [
            self._headers.parse(name, header) if header else None for name, header in zip(names, headers, strict=True)
        ]

    def hold(self, keys: Sequence[bytes]) -> Callable[[], None]:
        """Does nothing: the server decides what is evicted."""
        self._check()
        check_keys(keys)
        return lambda: None

    def get_into(
        self, keys: Sequence[bytes], buffers: Sequence[Buffer], owner: bytes = b"", peek: bool = False
    ) -> list[bool]:
        self._check()
        check_keys(keys)
        checked_owner(owner)
        self._settle()
        arrays = writable(buffers, len(keys))
        wanted = list(zip(keys, arrays, strict=True))

        def get(hand: Hand, call: Call, item: int) -> bool:
            key, array = wanted[item]
            head = self._read(hand, self._name(key), array, call)
            return head is not None and not (self._ttl_s and head.age_s > self._ttl_s)

        found = [result is True for result in self._calls.do(get, len(wanted))[0]]
        self._count("hits", found.count(True))
        self._count("misses", found.count(False))
        return found

    def put(
        self,
        keys: Sequence[bytes],
        buffers: Sequence[Buffer],
        owner: bytes = b"",
        checksums: Sequence[int] | None = None,
        as_of: int | None = None,
        age_s: float = 0.0,
    ) -> None:
        self._check()
        checked, sums = checked_records(keys, buffers, owner, checksums)
        whose = checked_owner(owner)
        self._settle()
        arrays = dict(zip(keys, checked, strict=True))
        given = {} if sums is None else dict(zip(keys, sums, strict=True))
        until = time.monotonic() + self._timeout_s
        moment = self.moment() if as_of is None else as_of
        stored_at = self.moment() - int(age_s * 1e6)
        there = self._contains([self._name(key) for key in arrays], False, until)
        lacking = [key for key, is_there in zip(arrays, there, strict=True) if not is_there]

        def send(hand: Hand, call: Call, item: int) -> bool:
            key = lacking[item]
            name = self._name(key)
            record = hand.memory(HEADER_BYTES + arrays[key].nbytes)
            payload = record[HEADER_BYTES:]
            # A copy that stays in the caches: it is read twice more, for the MAC and by the client.
            if not call.touch(lambda: np.copyto(payload, arrays[key])):
                return False
            if given and given[key] != _C.checksum(payload.ctypes.data, payload.nbytes):
                self._count("corrupt")
                return False
            self._headers.write(record, name, stored_at, whose)
            ttl_s = max(1.0, self._ttl_s - age_s) if self._ttl_s else 0.0
            stored = hand.engine.write(name, record.data, ttl_s, False)
            if call.over and owner and self._forgotten_at(hand, owner) >= moment:  # the caller no longer checks this
                hand.engine.delete([name])
            return stored

        if as_of is not None and owner and self._forgotten(owner, moment, until):
            return
        sent, error = self._calls.do(send, len(lacking), until)
        self._count("puts", sent.count(True))
        self._count("dropped_puts", len(lacking) - sent.count(True))
        # `forget` first writes itself down and then looks for records: it finds these, or this finds what it wrote.
        if owner and lacking and not isinstance(error, LeftAlone):
            forgotten = self._forgotten(owner, moment, even_if_down=True)
            if forgotten:
                self.delete(lacking)
            if forgotten is None or error is not None:  # unknown, or some records may still arrive
                self._unsettled.append(_Unsettled(time.monotonic() + PAUSE_S, owner, moment, lacking))

    def _settle(self) -> None:
        """Does the check for a put that could not do it."""
        try:
            put = self._unsettled.popleft()
        except IndexError:
            return
        forgotten = None
        if time.monotonic() >= put.after and not self._calls.breaker.open:
            forgotten = self._forgotten(put.owner, put.moment)
        if forgotten:
            self.delete(put.keys)
        if forgotten is None:
            self._unsettled.append(put)

    def moment(self) -> int:
        """Microseconds since 1970, by this host's clock."""
        return time.time_ns() // 1000

    def ages(self, keys: Sequence[bytes]) -> list[float]:
        self._check()
        check_keys(keys)
        heads = self._calls.in_parts(self._heads, [self._name(key) for key in keys], None)
        return [head.age_s if head is not None else math.inf for head in heads]

    def delete(self, keys: Sequence[bytes]) -> None:
        self._check()
        check_keys(keys)
        self._calls.in_parts(lambda engine, part: engine.delete(part), [self._name(key) for key in keys], None)

    # --- Owners

    def _forgets_of(self, owner: bytes) -> str:
        """The name of the record, without payload, that says when the owner was last forgotten."""
        return self._forgets + self._seal.digest(b"forgotten:" + owner).hex()  # shorter than a record's key

    def _forgotten(
        self, owner: bytes, since: int, until: float | None = None, even_if_down: bool = False
    ) -> bool | None:
        """Whether the owner was forgotten after the moment `since`; None if that is unknown now."""
        (at,), _ = self._calls.do(lambda hand, call, item: self._forgotten_at(hand, owner), 1, until, even_if_down)
        return None if at is None else bool(at >= since)

    def _forgotten_at(self, hand: Hand, owner: bytes) -> int:
        head = self._read(hand, self._forgets_of(owner), np.empty(0, np.uint8))
        return 0 if head is None else head.stored_at

    def forget(self, owner: bytes) -> int:
        """Removes all records of an owner, from every host; returns their number. Reads every record's header. Raises
        RuntimeError if it could not read all of them."""
        self._check()
        check_forgotten(owner)
        whose = self._seal.digest(owner)
        name = self._forgets_of(owner)

        def write_down(hand: Hand) -> None:
            record = hand.memory(HEADER_BYTES)
            self._headers.write(record, name, self.moment(), owner)
            if not hand.engine.write(name, record.data, FORGOTTEN_KEPT_S, True):
                raise RuntimeError("there is no room to record it")

        return self._remove("forget", lambda head: head is not None and head.owner == whose, write_down)

    def clear(self) -> int:
        """Removes everything that this deployment has on the server; returns the number of records. Raises RuntimeError
        if it fails."""
        self._check()
        return self._remove("clear", lambda head: True, lambda hand: None)

    def _remove(self, what: str, chosen: Callable[[Head | None], bool], first: Callable[[Hand], None]) -> int:
        def remove(hand: Hand, call: Call, item: int) -> int:
            first(hand)
            removed = 0
            for names, heads in self._all_heads(hand.engine, call):
                gone = [name for name, head in zip(names, heads, strict=True) if chosen(head)]
                if gone:
                    hand.engine.delete(gone)
                    call.extend()
                removed += len(gone)
            return removed

        (removed,), error = self._calls.do(remove, 1)
        if error is not None:
            raise RuntimeError(f"{what}: not everything could be removed: {self.name}: {first_line(error)}")
        return int(removed)

    def _all_heads(self, engine: Engine, call: Call) -> Iterator[tuple[list[str], list[Head | None]]]:
        """Names and headers of all records of the deployment, some at a time."""
        seen: set[str] = set()
        for listed in engine.names(self._records):
            if call.over:
                return
            call.extend()  # many names of others may come in between
            names = [name for name in listed if name not in seen]
            seen.update(names)
            for part in self._calls.parts(names):
                headers = engine.heads(part, HEADER_BYTES)
                there = [(name, header) for name, header in zip(part, headers, strict=True) if header is not None]
                yield [name for name, _ in there], [self._headers.parse(name, header) for name, header in there]

    def sizes(self) -> Mapping[str, int]:
        """`records` and `used_bytes` of the deployment, from every record's header. Raises RuntimeError if it fails."""
        self._check()

        def look(hand: Hand, call: Call, item: int) -> dict[str, int]:
            heads = [head for _, heads in self._all_heads(hand.engine, call) for head in heads if head is not None]
            return {"records": len(heads), "used_bytes": sum(HEADER_BYTES + head.payload_bytes for head in heads)}

        (sizes,), error = self._calls.do(look, 1)
        if error is not None:
            raise RuntimeError(f"{self.name}: {first_line(error)}")
        found: dict[str, int] = sizes
        return found

    def flush(self) -> None:
        """Every put is visible when it returns."""
        self._check()

    def stats(self) -> Mapping[str, int]:
        """Counters, and `down`: whether the store is left alone now. `sizes` says what is on the server."""
        self._check()
        with self._counting:
            return {**self._counts, **self._calls.counts, "down": int(self._calls.breaker.open)}

    def close(self) -> None:
        """Returns within the time budget; abandons connections that hang."""
        if self._closed or os.getpid() != self._pid:
            return
        self._closed = True
        self._calls.close()
