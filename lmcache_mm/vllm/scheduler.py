"""The connector's side in the scheduler: what the store has of a request, and what each step loads and stores."""

from __future__ import annotations

import itertools
import logging
import time
import uuid
from collections.abc import Callable, Iterable
from concurrent.futures import wait
from dataclasses import dataclass, field
from typing import Any

from blake3 import blake3

from lmcache_mm.cache import Record, chain, record_key
from lmcache_mm.lane import Lane, Work
from lmcache_mm.prompt import Item, Namespace, owner_of
from lmcache_mm.stores import Store, open_store
from lmcache_mm.vllm import identity
from lmcache_mm.vllm.api import (
    MEDIUM_CPU,
    MEDIUM_STORAGE,
    BlockStored,
    KVCacheEvent,
    KVConnectorOutput,
    Request,
    SchedulerOutput,
    VllmConfig,
)
from lmcache_mm.vllm.messages import NULL_BLOCK, Layout, Load, Metadata, RecordPages, Save, WorkerMetadata
from lmcache_mm.vllm.metrics import Stats
from lmcache_mm.vllm.options import ASK_AGAIN_S, GROUPS_OF_TABLE, NAME, Group, Options, wishes_of
from lmcache_mm.vllm.request_tracker import RequestTracker

AT_ONCE_S = 0.001  # how long the scheduler itself waits for a store; longer, and it asks again in its next step

logger = logging.getLogger("vllm.lmcache_mm")


@dataclass
class _Request:
    request: Request
    loads: bool
    saves: bool
    waits: bool  # for what another engine promised
    identifying: Work | None = None  # its tracker under way
    tracker: RequestTracker | None = None  # if there is none and none under way, it is not cached
    planned_until: int = 0  # tokens up to which saves are planned
    asked_at: float = 0.0  # when it was matched first
    ask_at: float = 0.0  # not before, if it waits
    counted: bool = False
    lookup: Work | None = None  # its next hit under way
    hit: list[Record] = field(default_factory=list)
    local_tokens: int = 0  # when it was matched last


class Scheduler:
    """See the module. unit: tokens that are whole pages in all groups."""

    def __init__(self, config: VllmConfig, options: Options, groups: list[Group], chunk_tokens: int, unit: int) -> None:
        self.stats = Stats()
        self._options, self._chunk_tokens, self._unit = options, chunk_tokens, unit
        self._loads, self._saves = config.kv_transfer_config.is_kv_consumer, config.kv_transfer_config.is_kv_producer
        self._tables = {group.table: group for group in groups}
        self._windows = {group.table: group.window for group in groups if group.window is not None}
        self._base = identity.namespace_of(config, [group.kv_dtype for group in groups], options.weights)
        self._store: Store = open_store(options.store)
        self._ranks = config.parallel_config.tensor_parallel_size * config.parallel_config.pipeline_parallel_size
        self._layouts: dict[int, Layout] = {}  # of ranks
        self._places: list[tuple[int, int]] = []  # of a record: groups' numbers and ranks
        self._epoch: str | None = None  # since the last reset
        self._namespace: Namespace | None = None  # once all layouts are known
        self._identifiers, self._adapters = identity.Identifiers(), identity.Adapters()
        self._identifying, self._lookups = Lane("lmcache_mm identify"), Lane("lmcache_mm lookup")
        self._requests: dict[str, _Request] = {}
        self._failed: set[str] = set()  # requests that are matched no more
        self._planned: list[Load] = []  # for the next step
        self._loading: dict[int, tuple[Load, Callable[[], object]]] = {}  # not ended, and what gives its records free
        self._serials = itertools.count()
        self._at_once_left_s = AT_ONCE_S  # of this step
        self._saving = 0  # saves that workers have not told about
        self._saves_until = 0.0
        events = config.kv_events_config
        self._tells = events is not None and events.enable_kv_cache_events
        self._untold: dict[bytes, tuple[int, BlockStored]] = {}  # how many ranks have not stored it
        self._events: list[KVCacheEvent] = []

    def learn_layouts(self, layouts: dict[int, Layout]) -> None:
        """Of ranks, as they tell. Inside MultiConnector a handshake may be another connector's, so that workers tell
        again in their first step; what arrives before is not cached."""
        if self._layouts | layouts == self._layouts:
            return
        for layout in layouts.values():
            unknown = {number // GROUPS_OF_TABLE for number in layout.groups} - set(self._tables)
            if unknown:
                raise ValueError(f"{NAME}: a worker has layers of KV cache group {min(unknown)}, the scheduler has not")
        self._layouts |= layouts
        self._places = [(number, rank) for rank, one in sorted(self._layouts.items()) for number in one.groups]
        self._make_namespace()

    def _make_namespace(self) -> None:
        if len(self._layouts) < self._ranks:
            return
        prints = [self._layouts[rank].fingerprint for rank in sorted(self._layouts)]
        layout = prints[0] if len(prints) == 1 else blake3(b"".join(prints)).digest()
        base = self._base.with_weights(self._epoch) if self._epoch else self._base
        self._namespace = base.with_layout(layout)

    def reset(self) -> None:
        """What was stored before is never matched again by this engine: its weights may be others now."""
        self._epoch = identity.epoch = f"after a reset {uuid.uuid4().hex}"
        self._make_namespace()
        for ours in self._requests.values():
            ours.loads = ours.saves = False
            ours.tracker = ours.lookup = None

    def take_stats(self) -> Stats | None:
        return self.stats.take()

    def close(self) -> None:
        for _, release in self._loading.values():
            release()
        for lane in (self._identifying, self._lookups):
            lane.close(self._options.timeout_s)
        self._store.close()

    # --- Requests

    def add(self, request: Request) -> None:
        wishes = wishes_of(request.kv_transfer_params)
        # A session that goes on gets tokens and items that nobody tells of.
        cached = self._namespace is not None and not getattr(request, "resumable", False)
        loads, saves = cached and self._loads and wishes.load, cached and self._saves and wishes.store
        # After a reset no other engine's records have this one's keys.
        ours = _Request(request, loads, saves, waits=wishes.wait and self._epoch is None)
        self._requests[request.request_id] = ours
        if ours.loads or ours.saves or request.mm_features:
            namespace = self._namespace if cached else None
            ours.identifying = self._identifying.submit(lambda _: self._identify(request, namespace))

    def _identify(self, request: Request, namespace: Namespace | None) -> RequestTracker | None:
        """The tracker of a request, which has the keys of its prompt then; None if what decides its KV is not known.
        Runs beside the scheduler. Items are looked at whether the request is cached or not: vLLM's caches hold under
        their identifiers what they were computed from."""
        try:
            names = self._names_of_items(request)
            if namespace is None:
                return None
            places = [(feature.mm_position, feature.modality) for feature in request.mm_features]
            items = [
                Item(name, place.offset, place.length, modality)
                for name, (place, modality) in zip(names, places, strict=True)
            ]
            lora = self._adapters.digest(request.lora_request)
            embeds = identity.digest_of_embeds(request.prompt_embeds, getattr(request, "prompt_is_token_ids", None))
        except Exception as error:  # of the request's data, whatever they are
            logger.warning("%s: request %s is not cached: %s", NAME, request.request_id, error)
            return None
        salt = request.cache_salt or None
        whole = 1 if self._options.opaque_tails else self._unit
        prompt_tokens = request.num_prompt_tokens
        root = namespace.root(salt, lora, embeds)
        tracker = RequestTracker(items, root, owner_of(salt), prompt_tokens, self._chunk_tokens, whole)
        tracker.records(request.all_token_ids, prompt_tokens)
        return tracker

    def _names_of_items(self, request: Request) -> list[str]:
        """Unknown if one of them has no digest, or an identifier that has stood for something else."""
        if self._options.identifiers == "trust":
            return [feature.identifier for feature in request.mm_features]
        names = []
        for feature in request.mm_features:
            try:
                names.append(identity.digest_of_item(feature))
            except Exception:  # whatever data they are
                names.append("")
        agreed = [
            bool(name) and self._identifiers.agree(feature.identifier, name)
            for feature, name in zip(request.mm_features, names, strict=True)
        ]
        for feature, name, good in zip(request.mm_features, names, agreed, strict=True):
            if not name:
                raise identity.Unknown(f"the data of the item {feature.identifier!r} have no digest")
            if not good:
                raise identity.Unknown(f"the identifier {feature.identifier!r} stood for other data before")
        return names

    def _still_agreed(self, request: Request) -> bool:
        """Whether all items' identifiers still stand for one content each."""
        if self._options.identifiers == "trust":
            return True
        return not any(self._identifiers.distrusted(feature.identifier) for feature in request.mm_features)

    def _tracker(self, ours: _Request) -> RequestTracker | None:
        """None if the request is not cached, or not known yet."""
        if ours.identifying is not None and ours.identifying.future.done():
            ours.tracker, ours.identifying = ours.identifying.future.result(), None
        return ours.tracker if ours.loads or ours.saves else None

    def promise(self, request: Request) -> dict[str, Any] | None:
        """Of the answer to a request that another engine is to decode: what that engine may wait for. It names nothing,
        for whoever loads computes the keys from its own request."""
        ours = self._requests.get(request.request_id)
        asked = isinstance(request.kv_transfer_params, dict) and request.kv_transfer_params.get("do_remote_decode")
        tracker = self._tracker(ours) if ours and ours.saves else None
        if asked is not True or tracker is None or self._epoch is not None:
            return None
        records = tracker.records(request.all_token_ids, request.num_prompt_tokens)
        if not records or tracker.stored_tokens < records[-1].end:
            return None
        return {"lmcache_mm": {"wait": True}}

    def drop(self, request: Request) -> None:
        """A load that is under way stays: until workers report it vLLM keeps the pages."""
        self._requests.pop(request.request_id, None)
        self._failed.discard(request.request_id)

    # --- Matching

    def match(self, request: Request, local_tokens: int) -> tuple[int | None, bool]:
        """How many tokens behind the first `local_tokens` could be loaded, None if that is not known yet, and whether
        in the background."""
        ours = self._requests.get(request.request_id)
        if ours is None:
            return 0, False
        ours.asked_at = ours.asked_at or time.monotonic()
        if ours.identifying is not None and not self._is_done(ours.identifying):
            return self._later(ours, self._identifying)
        tracker = self._tracker(ours)
        if tracker is None or not ours.loads or request.request_id in self._failed or not self._still_agreed(request):
            return 0, False
        if ours.waits and time.monotonic() < ours.ask_at:
            return None, False
        found = self._found(ours, tracker)
        if found is None:
            return self._later(ours, self._lookups)
        if ours.waits and self._more_may_come(ours, tracker, max(local_tokens, found[-1].end if found else 0)):
            return None, False
        ours.waits = False
        ours.hit, ours.local_tokens, ours.asked_at = found, local_tokens, 0.0
        if not ours.counted:
            ours.counted = True
            self.stats.add(queried_tokens=request.num_tokens)
        end = ours.hit[-1].end if ours.hit else 0
        if self._windows:
            # After a hit of all tokens vLLM computes the last one again, and has dropped a page that its window needs.
            end = min(end, request.num_tokens - 1)
        new = end - local_tokens
        return max(0, new), new > 0 and self._options.load == "async"

    def _more_may_come(self, ours: _Request, tracker: RequestTracker, tokens: int) -> bool:
        """Whether the store is to be asked again, for a prompt of which `tokens` are there."""
        prompt_tokens = ours.request.num_prompt_tokens
        ends = [record.end for record in self._loadable(ours.request, tracker) if record.end <= prompt_tokens]
        if not ends or tokens >= ends[-1]:
            return False
        ours.ask_at = time.monotonic() + ASK_AGAIN_S
        if ours.ask_at < ours.asked_at + self._options.timeout_s:
            return True
        self.stats.add(broken_promises=1)
        return False

    def _is_done(self, work: Work) -> bool:
        """Waits for it, all together for a moment in each step."""
        if not work.future.done() and self._at_once_left_s > 0:
            begun = time.monotonic()
            wait([work.future], self._at_once_left_s)
            self._at_once_left_s -= time.monotonic() - begun
        return work.future.done()

    def _found(self, ours: _Request, tracker: RequestTracker) -> list[Record] | None:
        """What the store has of the request; None if it has not told yet."""
        if ours.lookup is None:
            records = self._loadable(ours.request, tracker)
            if self._store.local:
                return self._look_up(ours, records)
            ours.lookup = self._lookups.submit(lambda _: self._look_up(ours, records))
        if not self._is_done(ours.lookup):
            return None
        found: list[Record] = ours.lookup.future.result()
        ours.lookup = None
        return found

    def _look_up(self, ours: _Request, records: list[Record]) -> list[Record]:
        try:
            return self._longest(records)
        except Exception:
            logger.exception("%s: a store could not be asked", NAME)
            ours.waits = False
            self.stats.add(failed_lookups=1)
            return []

    def _later(self, ours: _Request, lane: Lane) -> tuple[int | None, bool]:
        """Ask again, unless the request has waited for too long, or waits for what does not move."""
        timeout_s = self._options.timeout_s
        if lane.stalled_s() < timeout_s and time.monotonic() - ours.asked_at < timeout_s:
            return None, False
        if lane is self._identifying:  # what its items are will be known when vLLM's caches have them
            self._identifiers.distrust(feature.identifier for feature in ours.request.mm_features)
            ours.saves = False
        ours.loads = False
        ours.identifying = ours.lookup = None
        self.stats.add(failed_lookups=1)
        return 0, False

    def _loadable(self, request: Request, tracker: RequestTracker) -> list[Record]:
        """The request's records that a hit may end with."""
        limit = request.num_tokens
        if self._options.load != "async":
            # A token is left to be computed in the same step. And vLLM sends no data of items that lie wholly within
            # what is loaded to its workers, which then could not compute them if the load failed.
            ends = [f.mm_position.offset + f.mm_position.length for f in request.mm_features]
            limit = min([request.num_tokens, *ends]) - 1
        records = tracker.records(request.all_token_ids, limit)
        if self._options.load == "layers":
            # A layer's pages are written whole, when the step's new tokens are in them already.
            records = [record for record in records if record.end % self._unit == 0]
        return records

    def _longest(self, records: list[Record]) -> list[Record]:
        """Those of `records` that cover the longest prefix whose KV is there, as far as each group needs it."""
        present = iter(self._store.contains([key for record in records for key in self._keys(record)]))
        tables = set(self._tables)
        there = {
            r.end: tables - {number // GROUPS_OF_TABLE for number, _ in self._places if not next(present)}
            for r in records
        }
        whole = tables - set(self._windows) or tables  # without full attention, every record of every group
        found = chain((r for r in records if whole <= there[r.end]), self._chunk_tokens)
        while found:
            hit = found[-1].end
            if all(
                table in there[r.end] for table, window in self._windows.items() for r in found if r.end > hit - window
            ):
                return found
            found = chain(found[:-1], self._chunk_tokens)
        return []

    def _keys(self, record: Record) -> list[bytes]:
        return [record_key(record.key, number, rank) for number, rank in self._places]

    # --- Loads

    def plan_load(self, request: Request, block_ids: tuple[list[int], ...], tokens: int) -> None:
        """Of what was matched last, the first `tokens` that vLLM does not have. The records stay in the store until
        workers report it."""
        ours = self._requests[request.request_id]
        assert ours.tracker is not None
        first, end = ours.local_tokens, ours.local_tokens + tokens
        records = [record for record in ours.hit if record.end > first and record.begin < end]
        pages = self._pages(records, block_ids, first, end)
        load = Load(next(self._serials), request.request_id, ours.tracker.owner, pages)
        self._planned.append(load)
        self._loading[load.serial] = (load, self._hold([key for record in records for key in self._keys(record)]))
        whole = [record.end for record in records if record.end <= end]
        ours.tracker.stored_tokens = max([ours.tracker.stored_tokens, *whole])
        self.stats.add(hit_tokens=tokens)

    def _hold(self, keys: list[bytes]) -> Callable[[], object]:
        """Store.hold; on a lane, for stores that may wait."""
        if self._store.local:
            return self._store.hold(keys)
        held = self._lookups.submit(lambda _: self._store.hold(keys))
        return lambda: self._lookups.submit(lambda _: held.future.result()())

    def _pages(
        self, records: list[Record], block_ids: tuple[list[int], ...], first: int = 0, end: int | None = None
    ) -> list[RecordPages]:
        """The records of every group, less pages that are null or wholly outside of tokens [first, end), and records
        without a page."""
        out = []
        for table, group in self._tables.items():
            size, blocks = group.page_tokens, block_ids[table]
            for record in records:
                numbers = range(record.begin // size, -(-record.end // size))
                stop = numbers.stop if end is None else -(-end // size)
                pages = [blocks[i] if first // size <= i < stop else NULL_BLOCK for i in numbers]
                if any(page != NULL_BLOCK for page in pages):
                    out.append(RecordPages(table, record.key, pages, record.end - record.begin))
        return out

    # --- Steps

    def plan_step(self, step: SchedulerOutput) -> Metadata:
        metadata = Metadata(loads=self._planned)
        self._planned = []
        self._at_once_left_s = AT_ONCE_S
        if self._loading and self._options.load != "async":
            # What is computed with pages that are being loaded, by requests that share them too, is good if all ranks
            # report so. It is saved then.
            return metadata
        blocks = step.kv_connector_block_state
        for request_id, scheduled in step.num_scheduled_tokens.items():
            ours = self._requests.get(request_id)
            tracker = self._tracker(ours) if ours and ours.saves else None
            if ours is None or tracker is None:
                continue
            if not self._still_agreed(ours.request):
                continue
            request = ours.request
            drafts = len(step.scheduled_spec_decode_tokens.get(request_id, ()))
            until = min(request.num_computed_tokens + scheduled - drafts, request.num_tokens)
            if not self._options.store_generated:
                until = min(until, request.num_prompt_tokens)
            if until <= ours.planned_until:
                continue
            records = tracker.records(request.all_token_ids, until, tracker.stored_tokens)
            block_ids = blocks.get_block_ids(request_id) if records else ()
            if block_ids is None:
                continue
            ours.planned_until = until
            if not records:
                continue
            whole = [one for one in self._pages(records, block_ids) if NULL_BLOCK not in one.pages]
            if whole:
                metadata.saves.append(Save(tracker.owner, whole))
                if self._tells:
                    saved = {one.key for one in whole}
                    self._will_tell(request, tracker, [record for record in records if record.key in saved])
            tracker.stored_tokens = records[-1].end
        if metadata.saves:
            self._saving += len(metadata.saves) * self._ranks
            self._saves_until = time.monotonic() + 2 * self._options.timeout_s
        return metadata

    def saves_are_under_way(self) -> bool:
        """Whether it pays to make another step, so that workers can tell what they have stored."""
        return self._saving > 0 and time.monotonic() < self._saves_until

    def take_output(self, output: KVConnectorOutput) -> None:
        """Requests whose load failed are computed, and never matched again: a store that claims and does not deliver
        would be asked for ever."""
        finished = set(output.finished_recving or ()) | set(output.failed_recving or ())
        ended = {serial for serial, (load, _) in self._loading.items() if load.request_id in finished}
        failed = {serial for serial in ended if self._loading[serial][0].request_id in (output.failed_recving or ())}
        told = output.kv_connector_worker_meta
        if isinstance(told, WorkerMetadata):
            self.learn_layouts(told.layouts)
            bad_pages = output.invalid_block_ids or set()
            for serial in told.loaded & self._loading.keys():
                ended.add(serial)
                records = self._loading[serial][0].records
                if not bad_pages.isdisjoint(page for one in records for page in one.pages):
                    failed.add(serial)
            self._saving -= told.saves
            self._tell(told)
        for serial in ended:  # what else has ended is another connector's
            load, release = self._loading.pop(serial)
            release()
            ours = self._requests.get(load.request_id)
            if serial in failed and ours is not None:
                self._failed.add(load.request_id)
                self.stats.add(failed_loads=1)
                ours.planned_until = 0
                if ours.tracker:
                    ours.tracker.stored_tokens = 0

    # --- Events: what routers are told

    def _will_tell(self, request: Request, tracker: RequestTracker, records: Iterable[Record]) -> None:
        token_ids = request.all_token_ids
        url = self._options.store if isinstance(self._options.store, str) else self._options.store[0]
        for record in records:
            before = tracker.records(token_ids, record.begin, record.begin - 1) if record.begin else []
            event = BlockStored(
                block_hashes=[record.key],
                parent_block_hash=before[-1].key if before else None,
                token_ids=list(token_ids[record.begin : record.end]),
                block_size=self._chunk_tokens,
                lora_id=None,
                lora_name=request.lora_request.lora_name if request.lora_request else None,
                medium=MEDIUM_CPU if url.startswith(("shm:", "tiered:shm:")) else MEDIUM_STORAGE,
            )
            self._untold[record.key] = (self._ranks, event)

    def _tell(self, told: WorkerMetadata) -> None:
        for key in told.dropped:
            self._untold.pop(key, None)
        for key, ranks in told.stored.items():
            if key in self._untold:
                missing, event = self._untold.pop(key)
                if missing > ranks:
                    self._untold[key] = (missing - ranks, event)
                else:
                    self._events.append(event)

    def take_events(self) -> list[Any]:
        events, self._events = self._events, []
        return events
