"""KV events: announce to routers which of vLLM's blocks this host's stores hold, in the form of vLLM's own events.

A record is announced as the whole blocks that it covers, with vLLM's own hashes, once the store has its parts from all
ranks and the preceding block is announced: routers drop a block whose parent they do not know. It does not matter
whether this engine stored the record or found it. When a record is gone, it is announced as removed, together with
everything that follows it, because that can no longer be loaded.

A lane looks the records up in the stores. Each lookup is bounded, and does not count as a use of the record.
"""

from __future__ import annotations

import copy
import logging
import time
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from itertools import takewhile
from typing import NamedTuple

from lmcache_mm.cache import Record, record_key
from lmcache_mm.lane import Lane, Work
from lmcache_mm.stores.local.file import FileStore
from lmcache_mm.stores.local.shm import ShmStore
from lmcache_mm.stores.store import Store
from lmcache_mm.stores.tiered import TieredStore
from lmcache_mm.vllm.api import (
    MEDIUM_CPU,
    MEDIUM_STORAGE,
    BlockPool,
    BlockRemoved,
    BlockStored,
    ExternalBlockHash,
    KVCacheEvent,
    Request,
    VllmConfig,
    generate_block_hash_extra_keys,
    maybe_convert_block_hash,
    resolve_block_hashes,
    to_event_extra_keys,
)
from lmcache_mm.vllm.options import GROUPS_OF_TABLE, NAME, Group

LOCAL = "LOCAL"  # locality: on the host that publishes
ROUND_S = 1.0  # how often all waiting and announced records are looked up, if the engine runs enough steps
MOST_AT_ONCE = 128  # announced records looked up per step
MOST_BLOCKS = 1 << 19  # announced blocks
MOST_WAITING = 1 << 12  # records not announced yet

logger = logging.getLogger("vllm.lmcache_mm")


class _Id(NamedTuple):
    """A record's blocks in one block table, in one store."""

    store: int
    table: int
    key: bytes  # of the prefix
    last: ExternalBlockHash  # vLLM hashes clients' names for items, so one prefix may have several hashes


class _Told(NamedTuple):
    parent: ExternalBlockHash | None
    hashes: list[ExternalBlockHash]


@dataclass(slots=True)
class _Waiting:
    event: BlockStored  # with all blocks, for any store
    until: float


def _stores_of_host(store: Store) -> Iterator[tuple[Store, str]]:
    """This host's stores and their mediums. Leaves out stores that hosts share or that are on another host."""
    if isinstance(store, TieredStore):
        for tier in store.tiers:
            yield from _stores_of_host(tier)
    elif isinstance(store, ShmStore):
        yield store, MEDIUM_CPU
    elif isinstance(store, FileStore):
        yield store, MEDIUM_STORAGE


class Events:
    """See the module. timeout_s: how long a store may do nothing while the engine runs steps only to wait for it."""

    def __init__(self, store: Store, groups: Iterable[Group], timeout_s: float) -> None:
        self._stores = list(_stores_of_host(store))
        groups = {group.table: group for group in groups}.values()
        whole = [group for group in groups if group.window is None and not group.states]
        self._groups = [*whole, *(group for group in groups if group not in whole)]  # parents first
        self._parents = {group.table for group in whole or groups}  # tables that decide whether a parent is announced
        self._timeout_s = timeout_s
        self._places: dict[int, list[tuple[int, int]]] = {}
        self._pool: BlockPool | None = None
        self._pool_map: object = None
        self._waiting: dict[_Id, _Waiting] = {}
        self._told: dict[_Id, _Told] = {}  # announced records, the most recently used last
        self._blocks: defaultdict[tuple[int, int], Counter[ExternalBlockHash]] = defaultdict(Counter)
        self._children: defaultdict[tuple[int, ExternalBlockHash | None], set[_Id]] = defaultdict(set)
        self._blocks_told = 0
        self._lane = Lane("lmcache_mm events")
        self._looking: Work | None = None
        self._at_waiting = False  # whether the lookup under way includes the waiting records
        self._wanted = False  # whether the waiting records need another lookup
        self._round: list[_Id] = []  # announced records that this round has not looked up yet
        self._next_round = 0.0
        self._events: list[KVCacheEvent] = []

    @classmethod
    def of(cls, config: VllmConfig, store: Store, groups: Iterable[Group], timeout_s: float) -> Events | None:
        """None if events are off, or if no store is on this host."""
        if config.kv_events_config is None or not config.kv_events_config.enable_kv_cache_events:
            return None
        if not any(True for _ in _stores_of_host(store)):
            logger.info("%s: no KV events: they are sent for shm: and file: stores only", NAME)
            return None
        return cls(store, groups, timeout_s)

    def bind(self, pool: BlockPool) -> None:
        """Takes vLLM's block pool. Events use its hashes; when it is reset, routers forget this engine's blocks."""
        self._pool, self._pool_map = pool, pool.cached_block_hash_to_block

    def learn_places(self, places: Iterable[tuple[int, int]]) -> None:
        """Takes the group numbers and ranks that a record has parts for."""
        by_table: defaultdict[int, list[tuple[int, int]]] = defaultdict(list)
        for number, rank in places:
            by_table[number // GROUPS_OF_TABLE].append((number, rank))
        self._places = by_table

    def close(self) -> None:
        self._lane.close(self._timeout_s)

    # --- Announcements

    def expect(self, request: Request, records: Iterable[Record], found: bool, states: Collection[int] = ()) -> None:
        """Takes records of the request, ascending, that a store has (`found`) or will have. states: the ends of records
        at which it has states; a state is announced as the block that ends there."""
        if self._pool is None:
            return
        until = time.monotonic() + 2 * self._timeout_s
        records = list(records)
        for group in self._groups:
            size = group.page_tokens
            hashes = resolve_block_hashes(request.block_hashes, self._pool.hash_block_size, size)
            for record in records:
                first, end = record.begin // size, min(record.end // size, len(hashes))
                if group.states:
                    first = end - 1 if record.end in states else end
                if first >= end:
                    continue
                last = maybe_convert_block_hash(hashes[end - 1])
                ids = [_Id(store, group.table, record.key, last) for store in range(len(self._stores))]
                new = [one for one in ids if not self._is_known(one)]
                if new and len(self._waiting) + len(new) <= MOST_WAITING:
                    waiting = _Waiting(_stored(request, group, hashes[max(first - 1, 0) : end], first, end), until)
                    self._waiting |= dict.fromkeys(new, waiting)
                    self._wanted |= found

    def _is_known(self, one: _Id) -> bool:
        if (told := self._told.pop(one, None)) is not None:
            self._told[one] = told
            return True
        return one in self._waiting

    def look(self) -> None:
        """Requests a lookup of the waiting records, because saves have ended."""
        self._wanted = bool(self._waiting)

    def are_under_way(self) -> bool:
        """Whether the engine should run another step for events."""
        looked_for = self._wanted or (self._looking is not None and self._at_waiting)
        return looked_for and self._lane.stalled_s() < self._timeout_s

    def forget(self) -> None:
        """Announces all records as removed: this engine will not use them anymore."""
        self._remove(list(self._told))
        self._waiting.clear()
        self._wanted = False

    def take(self) -> list[KVCacheEvent]:
        if self._pool is not None and self._pool.cached_block_hash_to_block is not self._pool_map:
            # vLLM has reset its own cache and told routers to forget all blocks of this engine, in all mediums. Records
            # that a request finds from now on are announced again.
            self._pool_map = self._pool.cached_block_hash_to_block
            self._told.clear()
            self._blocks.clear()
            self._children.clear()
            self._blocks_told = 0
        if self._looking is not None and self._looking.future.done():
            there: dict[_Id, bool] = self._looking.future.result()
            self._looking = None
            self._remove([one for one, is_there in there.items() if not is_there])
            for one, is_there in there.items():
                if is_there and one in self._waiting:
                    self._tell(one)
        if self._looking is None:
            self._look_further()
        events, self._events = self._events, []
        return events

    def _tell(self, one: _Id) -> None:
        event = self._waiting[one].event
        hashes, parent = event.block_hashes, event.parent_block_hash
        if parent is not None and not self._is_told(one.store, parent):
            return
        del self._waiting[one]
        told = self._blocks[one.store, one.table]
        known = sum(1 for _ in takewhile(told.__contains__, hashes))  # announced with a shorter record
        if known < len(hashes):
            event = copy.copy(event)
            event.medium = self._stores[one.store][1]
            if known:
                event.parent_block_hash, event.block_hashes = hashes[known - 1], hashes[known:]
                event.token_ids = event.token_ids[known * event.block_size :]
                event.extra_keys = event.extra_keys and event.extra_keys[known:]
            self._events.append(event)
        told.update(hashes)
        self._told[one] = _Told(parent, hashes)
        if parent is not None:
            self._children[one.store, parent].add(one)
        self._blocks_told += len(hashes)
        while self._blocks_told > MOST_BLOCKS:
            self._remove([next(iter(self._told))])

    def _is_told(self, store: int, block: ExternalBlockHash) -> bool:
        return any(block in self._blocks[store, table] for table in self._parents)

    def _remove(self, ids: list[_Id]) -> None:
        """Announces these records, if they were announced, and all that follow them as removed."""
        gone: defaultdict[tuple[int, int], list[ExternalBlockHash]] = defaultdict(list)
        left = ids[::-1]
        while left:
            one = left.pop()
            told = self._told.pop(one, None)
            if told is None:
                continue
            self._blocks_told -= len(told.hashes)
            siblings = self._children.get((one.store, told.parent), set())
            siblings.discard(one)
            if not siblings:
                self._children.pop((one.store, told.parent), None)
            blocks = self._blocks[one.store, one.table]
            for block in told.hashes:
                blocks[block] -= 1
                if blocks[block]:
                    continue  # another record has this block too
                del blocks[block]
                gone[one.store, one.table].append(block)
                if not self._is_told(one.store, block):
                    left += self._children.pop((one.store, block), ())
        for (store, table), hashes in gone.items():
            medium = self._stores[store][1]
            # Children first.
            self._events.append(BlockRemoved(hashes[::-1], medium, group_idx=table, locality=LOCAL))

    # --- Lookups

    def _look_further(self) -> None:
        now = time.monotonic()
        ids: list[_Id] = []
        if now >= self._next_round:
            self._next_round = now + ROUND_S
            self._round = self._round or list(self._told)
            self._waiting = {one: waiting for one, waiting in self._waiting.items() if waiting.until > now}
            self._wanted = bool(self._waiting)
        self._at_waiting = self._wanted
        if self._wanted:
            ids += self._waiting
            self._wanted = False
        ids += [one for one in self._round[-MOST_AT_ONCE:] if one in self._told]
        del self._round[-MOST_AT_ONCE:]
        if ids:
            self._looking = self._lane.submit(lambda _: self._look(ids))

    def _look(self, ids: list[_Id]) -> dict[_Id, bool]:
        """Whether the store has all parts of each record. Records whose lookup fails are left out."""
        there: dict[_Id, bool] = {}
        for number, (store, _) in enumerate(self._stores):
            of_store = [one for one in ids if one.store == number]
            for begin in range(0, len(of_store), MOST_AT_ONCE):
                some = of_store[begin : begin + MOST_AT_ONCE]
                keys = [[record_key(one.key, *place) for place in self._places.get(one.table, ())] for one in some]
                try:
                    present = iter(store.contains([key for parts in keys for key in parts], peek=True))
                except Exception:
                    logger.warning("%s: a lookup for KV events failed", NAME, exc_info=True)
                    break
                whole = [bool(parts) and all([next(present) for _ in parts]) for parts in keys]
                there |= zip(some, whole, strict=True)
        return there


def _stored(request: Request, group: Group, hashes: list[bytes], first: int, end: int) -> BlockStored:
    """The event for blocks [first, end) of a request, as vLLM's pool makes it. hashes: of the block before, if there is
    one, and of these blocks."""
    size = group.page_tokens
    extra_keys, item = [], 0
    for begin in range(first * size, end * size, size):
        of_block, item = generate_block_hash_extra_keys(request, begin, begin + size, item)
        extra_keys.append(of_block)
    external = [maybe_convert_block_hash(one) for one in hashes]
    lora = request.lora_request
    return BlockStored(
        block_hashes=external[1:] if first else external,
        parent_block_hash=external[0] if first else None,
        token_ids=request.all_token_ids[first * size : end * size],
        block_size=size,
        lora_id=lora.adapter_id if lora else None,
        medium=None,
        lora_name=lora.name if lora else None,
        extra_keys=to_event_extra_keys(extra_keys),
        group_idx=group.table,
        kv_cache_spec_kind=group.kind,
        kv_cache_spec_sliding_window=group.window,
        locality=LOCAL,
        session_id=request.session_id,
    )
