"""tiered: several stores as one, the fastest first. Puts reach slower tiers in the background; hits are promoted."""

from __future__ import annotations

import logging
import math
import os
import threading
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np

from lmcache_mm.lane import close_at_exit
from lmcache_mm.stores.arguments import (
    check_forgotten,
    check_keys,
    check_process,
    checked_owner,
    checked_records,
    is_lack,
    writable,
)
from lmcache_mm.stores.breaker import PAUSE_S
from lmcache_mm.stores.write_behind import Waiting, WriteBehind

if TYPE_CHECKING:
    from lmcache_mm.stores.arguments import Buffer
    from lmcache_mm.stores.store import Store

MOST_TOLD = 4096  # moments
MOVES = {"get_into": "load", "put": "store"}  # methods that move payloads, as they are observed

logger = logging.getLogger("lmcache_mm")


class Promotion:
    """Records that are being copied from one tier to the tiers above it."""

    def __init__(self, keys: Sequence[bytes]) -> None:
        self.deleted: set[bytes] = set()  # keys deleted meanwhile
        self.lock = threading.Lock()  # held while putting, and while adding to `deleted`
        self._keys = frozenset(keys)

    def delete(self, keys: Set[bytes]) -> None:
        if not self._keys.isdisjoint(keys):
            with self.lock:
                self.deleted |= keys


class TieredStore:
    """See `Store`; `tiers`: the stores, the fastest first; they are closed with this one.

    A put is in the first tier when it returns, and in the others some time later. The number of waiting records is
    bounded. `flush` and `close` wait for them; interpreter exit waits for EXIT_S at most; a killed process loses
    them. A hit in a slower tier is copied to the tiers above; a record that this process deletes meanwhile does not
    come back. A tier that raises counts as empty for 10 s; read-only tiers are never written. stats() includes the
    tiers' own, as `tier0.hits` and so on. Raises RuntimeError if no thread can be started.
    """

    def __init__(self, tiers: Sequence[Store], observe: Callable[[int, str, float, int], None] | None = None) -> None:
        """observe: gets the number of a tier after the first, "load" or "store", seconds and bytes, for every read that
        found something and every put."""
        if not tiers:
            raise ValueError("tiers: expected at least one store, got none")
        self._tiers, self._observe = list(tiers), observe
        self._written = [tier for tier in range(1, len(tiers)) if not tiers[tier].read_only]  # in the background
        self._pid = os.getpid()
        self._down_until = [0.0] * len(tiers)
        self._counts: Counter[str] = Counter(dict.fromkeys(("hits", "misses", "promoted", "dropped_puts", "errors"), 0))
        self._state = threading.Lock()  # guards the counts and the fields below
        self._closing = False
        self._promotions: set[Promotion] = set()  # in progress
        self._deletions: dict[int, frozenset[bytes]] = {}  # in progress
        self._told: OrderedDict[int, tuple[int, ...]] = OrderedDict()  # the tiers' moments, by our own moment
        self._behind = WriteBehind(self._write_down, lambda records: self._count("dropped_puts", records))
        close_at_exit(self._end)

    @property
    def tiers(self) -> Sequence[Store]:
        return tuple(self._tiers)

    @property
    def local(self) -> bool:
        return all(tier.local for tier in self._tiers)

    @property
    def read_only(self) -> bool:
        return self._tiers[0].read_only

    def _ask(self, tier: int, otherwise: Any, method: str, *arguments: Any) -> Any:
        """Returns what the tier's method returns; `otherwise` if it raises or has raised a short while ago."""
        if time.monotonic() < self._down_until[tier]:
            return otherwise
        begun = time.perf_counter()
        try:
            answer = getattr(self._tiers[tier], method)(*arguments)
        except Exception as error:
            if not is_lack(error):
                logger.warning("tier %d failed and is left alone for %g s", tier, PAUSE_S, exc_info=True)
                self._down_until[tier] = time.monotonic() + PAUSE_S
            self._count("errors")
            return otherwise
        if self._observe and tier and method in MOVES:
            moved = answer if method == "get_into" else [True] * len(arguments[1])
            size = sum(memoryview(buffer).nbytes for buffer, there in zip(arguments[1], moved, strict=True) if there)
            if size:
                self._observe(tier, MOVES[method], time.perf_counter() - begun, size)
        return answer

    def _check(self) -> None:
        check_process(self._pid)
        if self._closing:
            raise RuntimeError("store: it is closed")

    def _count(self, name: str, by: int = 1) -> None:
        with self._state:
            self._counts[name] += by

    def contains(self, keys: Sequence[bytes], peek: bool = False) -> list[bool]:
        self._check()
        check_keys(keys)
        return self._contains(keys, range(len(self._tiers)), peek)

    def _contains(self, keys: Sequence[bytes], tiers: Sequence[int], peek: bool) -> list[bool]:
        found = [False] * len(keys)
        for tier in tiers:
            missing = [i for i, there in enumerate(found) if not there]
            if missing:
                there = self._ask(tier, [False] * len(missing), "contains", [keys[i] for i in missing], peek)
                for i, is_there in zip(missing, there, strict=True):
                    found[i] = is_there
        return found

    def _moments(self) -> tuple[int, ...]:
        return tuple(self._ask(tier, 0, "moment") for tier in range(len(self._tiers)))

    def get_into(
        self, keys: Sequence[bytes], buffers: Sequence[Buffer], owner: bytes = b"", peek: bool = False
    ) -> list[bool]:
        self._check()
        check_keys(keys)
        checked_owner(owner)
        writable(buffers, len(keys))
        found = [False] * len(keys)
        self._get(0, keys, buffers, owner, peek, found)
        if not all(found):
            with self._promoting([key for key, is_there in zip(keys, found, strict=True) if not is_there]) as promotion:
                moments = self._moments()  # before reading anything that would be promoted
                for tier in range(1, len(self._tiers)):
                    hits = self._get(tier, keys, buffers, owner, peek, found)
                    if up := self._ages(tier, keys, hits):
                        self._put_up(promotion, tier, keys, buffers, owner, up, moments)
        self._count("hits", found.count(True))
        self._count("misses", found.count(False))
        return found

    def _get(
        self,
        tier: int,
        keys: Sequence[bytes],
        buffers: Sequence[Buffer],
        owner: bytes,
        peek: bool,
        found: list[bool],
    ) -> list[int]:
        """Fills what is still missing from this tier. Returns the places of its hits."""
        missing = [i for i, there in enumerate(found) if not there]
        if not missing:
            return []
        wanted, into = [keys[i] for i in missing], [buffers[i] for i in missing]
        there = self._ask(tier, [False] * len(missing), "get_into", wanted, into, owner, peek)
        hits = [i for i, is_there in zip(missing, there, strict=True) if is_there]
        for i in hits:
            found[i] = True
        return hits

    def _put_up(
        self,
        promotion: Promotion,
        tier: int,
        keys: Sequence[bytes],
        buffers: Sequence[Buffer],
        owner: bytes,
        ages: dict[int, float],
        moments: tuple[int, ...],
    ) -> None:
        """Puts what `tier` had, at the places of `ages`, into the tiers above."""
        with promotion.lock:
            up = [i for i in ages if keys[i] not in promotion.deleted]
            if not up:
                return
            up_keys, up_buffers = [keys[i] for i in up], [buffers[i] for i in up]
            for above in (t for t in range(tier) if t == 0 or t in self._written):
                age_s = max(ages.values())
                self._ask(above, None, "put", up_keys, up_buffers, owner, None, moments[above], age_s)
        self._count("promoted", len(up))

    @contextmanager
    def _promoting(self, keys: Sequence[bytes]) -> Iterator[Promotion]:
        promotion = Promotion(keys)
        with self._state:
            self._promotions.add(promotion)
            for keys_deleted in self._deletions.values():
                promotion.deleted |= keys_deleted
        try:
            yield promotion
        finally:
            with self._state:
                self._promotions.discard(promotion)

    def _ages(self, tier: int, keys: Sequence[bytes], places: Sequence[int]) -> dict[int, float]:
        """The ages of the keys at these places, by place, if the tier knows them: others are not promoted."""
        if not places:
            return {}
        ages = self._ask(tier, [math.inf] * len(places), "ages", [keys[i] for i in places])
        return {i: age for i, age in zip(places, ages, strict=True) if age < math.inf}

    def hold(self, keys: Sequence[bytes]) -> Callable[[], None]:
        self._check()
        releases = [self._ask(tier, None, "hold", keys) for tier in range(len(self._tiers))]

        def release() -> None:
            for release_of_tier in releases:
                if release_of_tier:
                    release_of_tier()

        return release

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
        arrays, given = checked_records(keys, buffers, owner, checksums)
        moments = self._moments_of(as_of)
        failed = self._ask(0, True, "put", keys, buffers, owner, given, moments[0], age_s)  # a put returns None
        if failed and not self._written:
            self._count("dropped_puts", len(keys))
        taken = self._contains(keys, [0], peek=True)
        if self._written:
            self._behind.add(
                Waiting(key, array.nbytes, owner, None if there else array, moments)
                for key, array, there in zip(keys, arrays, taken, strict=True)
            )

    def _write_down(self, batch: list[Waiting], staging: np.ndarray) -> None:
        """Writes waiting records to the slower tiers that lack them."""
        keys = [record.key for record in batch]
        lacking = {tier: self._contains(keys, [tier], peek=True) for tier in self._written}
        lacking = {tier: there for tier, there in lacking.items() if not all(there)}
        if not lacking:
            return
        payloads: list[np.ndarray | None] = []
        begin = 0
        for record in batch:
            payload = record.payload
            if payload is None:
                payload = staging[begin : begin + record.payload_bytes]
                begin += record.payload_bytes
                if not self._ask(0, [False], "get_into", [record.key], [payload], b"", True)[0]:
                    payload = None  # evicted meanwhile
                    self._count("dropped_puts")
            payloads.append(payload)
        for tier, there in lacking.items():
            down = [(k, p) for k, p, t in zip(keys, payloads, there, strict=True) if p is not None and not t]
            down_keys, down_payloads = [k for k, _ in down], [p for _, p in down]
            as_of = batch[0].as_of[tier]
            failed = self._ask(tier, True, "put", down_keys, down_payloads, batch[0].owner, None, as_of)
            if failed:  # a put returns None
                self._count("dropped_puts", len(down))

    def delete(self, keys: Sequence[bytes]) -> None:
        self._check()
        check_keys(keys)
        gone = frozenset(keys)
        self._behind.settle(lambda record: record.key in gone)
        with self._state:
            self._deletions[id(gone)] = gone  # seen by promotions that begin meanwhile
            promotions = list(self._promotions)
        try:
            for promotion in promotions:
                promotion.delete(gone)
            for tier in range(len(self._tiers)):
                self._ask(tier, None, "delete", keys)
        finally:
            with self._state:
                del self._deletions[id(gone)]

    def moment(self) -> int:
        self._check()
        moments = self._moments()
        with self._state:
            last, last_moments = next(reversed(self._told.items()), (0, ()))
            if moments != last_moments:
                last += 1
                self._told[last] = moments
                if len(self._told) > MOST_TOLD:
                    self._told.popitem(last=False)
            return last

    def _moments_of(self, as_of: int | None) -> tuple[int, ...]:
        """The tiers' moments at `as_of`, the current ones for None, zeros if `as_of` is too long ago."""
        if as_of is None:
            return self._moments()
        with self._state:
            return self._told.get(as_of, (0,) * len(self._tiers))

    def ages(self, keys: Sequence[bytes]) -> list[float]:
        self._check()
        of_tiers = [self._ages(tier, keys, range(len(keys))) for tier in range(len(self._tiers))]
        return [max((ages[i] for ages in of_tiers if i in ages), default=math.inf) for i in range(len(keys))]

    def forget(self, owner: bytes) -> int:
        self._check()
        check_forgotten(owner)
        self._behind.settle(lambda record: record.owner == owner)
        removed = 0
        failed = []
        for tier, store in enumerate(self._tiers):
            try:
                removed = max(removed, store.forget(owner))
            except Exception as error:
                failed.append(f"tier {tier}: {error}")
        if failed:
            raise RuntimeError(f"forget: not everything could be removed: {'; '.join(failed)}")
        return removed

    def flush(self) -> None:
        self._check()
        self._behind.flush()
        for tier in range(len(self._tiers)):
            self._ask(tier, None, "flush")

    def stats(self) -> Mapping[str, int]:
        self._check()
        with self._state:
            out = {**self._counts, "waiting": self._behind.waiting}
        of_tiers: list[Mapping[str, int]] = [self._ask(tier, {}, "stats") for tier in range(len(self._tiers))]
        if all("capacity_bytes" in of_tier for of_tier in of_tiers):  # servers do not say theirs
            out["capacity_bytes"] = sum(of_tier["capacity_bytes"] for of_tier in of_tiers)
        out["used_bytes"] = sum(of_tier.get("used_bytes", 0) for of_tier in of_tiers)
        for tier, of_tier in enumerate(of_tiers):
            out |= {f"tier{tier}.{name}": value for name, value in of_tier.items()}
        return out

    def close(self) -> None:
        self._end(None)

    def _end(self, patience_s: float | None) -> bool:
        """Closes. Returns whether all waiting records were written, within `patience_s` if given. If not, they count as
        dropped, and the tiers stay open, since they may still be writing."""
        if os.getpid() != self._pid:
            return True
        with self._state:
            if self._closing:
                return not self._behind.given_up
            self._closing = True
        if not self._behind.end(patience_s):
            return False
        for tier, store in enumerate(self._tiers):
            try:
                store.close()
            except Exception:
                logger.warning("tier %d cannot be closed", tier, exc_info=True)
        return True
